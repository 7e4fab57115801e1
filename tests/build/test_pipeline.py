"""Tests of the pipeline: which variants it builds and skips, and that a failed build changes no artifact."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import make_checkpoint

from toolchain.artifacts import publishing, variants
from toolchain.artifacts.manifest import MANIFEST
from toolchain.artifacts.steps import Export, Import, Optimize, Prune, Quantize
from toolchain.build import pipeline
from toolchain.build.pipeline import ensure, plan, validate_variant
from toolchain.build.states import list_states
from toolchain.build.workspace import Workspace
from toolchain.errors import ArtifactError, GraphError, TamperedError, UnknownVariantError, VerdictError
from toolchain.models.locations import LOCATION

ALL = tuple(variant.name for variant in variants.lineage("onnx-int8"))


def quiet(line):
    pass


def reasons(workspace, names=("onnx-int8",), steps=None):
    return {item.variant.name: item.reason for item in plan(workspace, names, steps or {})}


def digest(workspace):
    """Returns every file under exported/ with its bytes, to check that nothing changed."""
    return {
        str(p.relative_to(workspace.exported)): p.read_bytes()
        for p in sorted(workspace.exported.rglob("*"))
        if p.is_file()
    }


def test_every_variant_of_an_empty_workspace_is_missing(tiny_checkpoint, tmp_path):
    workspace = Workspace.open(str(tiny_checkpoint), tmp_path / "exported")
    assert reasons(workspace) == dict.fromkeys(ALL, "missing")
    assert not (tmp_path / "exported").exists()  # `plan` writes no file


def test_a_second_run_skips_every_artifact(tiny):
    events = []
    files_before = digest(tiny)
    ensure(
        tiny,
        ALL,
        {"torch-fp32": Import(), "onnx-std": Export(), "onnx-fp32": Optimize()},
        lambda event: events.append(str(event)),
    )
    assert events == [f"{name}: fresh, skipped" for name in ALL]
    assert digest(tiny) == files_before


@pytest.mark.slow
def test_the_same_inputs_give_the_same_ids(built_tiny, tiny_checkpoint, tmp_path):
    second_workspace = Workspace.open(str(tiny_checkpoint), tmp_path / "exported")
    ensure(second_workspace, ALL, {}, lambda line: None)
    for name in ALL:
        assert second_workspace.load(name).manifest.id == built_tiny.load(name).manifest.id, name


def test_a_manifest_states_the_origin_of_its_artifact(built_tiny):
    manifests = {name: built_tiny.load(name).manifest for name in ALL}
    for name, manifest in manifests.items():
        parent = variants.get(name).parent
        assert manifest.parent == parent
        assert manifest.parent_id == (manifests[parent].id if parent else None)
        assert manifest.source["revision"].startswith("sha256:")
        assert [spec.name for spec in manifest.inputs] == ["input_ids", "attention_mask"]
        assert [spec.shape for spec in manifest.inputs] == [("batch_size", "sequence_length")] * 2
        assert manifest.labels == ("NEGATIVE", "POSITIVE")
        assert manifest.validation["passed"]
        assert {"config.json", "tokenizer.json"} <= {file.path for file in manifest.files}
        assert manifest.environment["versions"]["torch"]
    assert len({m.facts["parameters"] for m in manifests.values()}) == 1
    assert manifests["onnx-fp32"].facts["rewrites"] == {
        "fuse": 4,
        "residual-sum": 5,
        "first-token": 11,
        "first-query": 1,
    }
    assert manifests["onnx-int8"].size_bytes < manifests["onnx-fp32"].size_bytes / 2


@pytest.mark.slow
def test_new_settings_replace_an_artifact_and_make_its_descendants_stale(tiny):
    steps = {"onnx-std": Export(17)}
    assert reasons(tiny, ["onnx-std"], steps) == {"torch-fp32": "", "onnx-std": "other settings: opset 18 → 17"}
    events = []
    ensure(tiny, ["onnx-std"], steps, lambda event: events.append(str(event)))
    assert "onnx-std: replaced" in events[-1]
    assert tiny.load("onnx-std").manifest.facts["opset"] == {"": 17}
    assert reasons(tiny)["onnx-fp32"] == "onnx-std changed"
    assert reasons(tiny)["onnx-int8"] == "onnx-fp32 is built again"
    assert {item.variant: item.state for item in list_states(tiny)}["onnx-fp32"] == "stale: onnx-std changed"
    # The ancestor onnx-std keeps opset 17 from its last build, although the new command does not name opset 17.
    assert reasons(tiny)["onnx-std"] == ""
    ensure(tiny, ["onnx-int8"], {}, lambda event: events.append(str(event)))
    assert tiny.load("onnx-fp32").manifest.facts["opset"][""] == 17


@pytest.mark.slow
def test_a_changed_checkpoint_is_imported_again(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny", seed=1)
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    ensure(workspace, ["torch-fp32"], {}, lambda line: None)
    make_checkpoint(checkpoint, seed=5)
    assert reasons(workspace, ["torch-fp32"]) == {"torch-fp32": "the checkpoint changed"}


@pytest.mark.slow
def test_an_imported_model_stays_fresh_without_its_checkpoint(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny")
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    ensure(workspace, ["torch-fp32"], {}, lambda line: None)
    checkpoint.rename(tmp_path / "gone")
    reopened = Workspace.open("tiny", tmp_path / "exported")
    assert reasons(reopened, ["torch-fp32"]) == {"torch-fp32": ""}


def test_a_new_version_of_a_step_makes_its_artifacts_stale(tiny, monkeypatch):
    function, version = pipeline.STEPS[Optimize]
    monkeypatch.setitem(pipeline.STEPS, Optimize, (function, version + 1))
    assert reasons(tiny)["onnx-fp32"] == "the version of its build step changed"


def tamper(workspace, name="onnx-fp32"):
    file = workspace.path(name) / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(bytes(content))


def test_a_tampered_parent_stops_the_build(tiny):
    tamper(tiny)
    with pytest.raises(TamperedError, match="does not have the sha256"):
        ensure(tiny, ["onnx-int8"], {}, lambda line: None)
    assert "tampered" in {item.variant: item.state for item in list_states(tiny)}["onnx-fp32"]


def test_an_unreadable_manifest_gives_the_state_unusable(tiny):
    (tiny.path("onnx-int8") / MANIFEST).write_text("{")
    assert {item.variant: item.state for item in list_states(tiny)}["onnx-int8"].startswith("unusable: ")


def test_a_command_that_names_a_tampered_artifact_rebuilds_it(tiny):
    original_id = tiny.load("onnx-fp32").manifest.id
    tamper(tiny)
    steps = {"onnx-fp32": Optimize()}
    assert reasons(tiny, steps, steps)["onnx-fp32"] == "the files were modified after the build"
    ensure(tiny, steps, steps, lambda line: None)
    tiny.load("onnx-fp32").verify()
    assert tiny.load("onnx-fp32").manifest.id == original_id


def test_a_command_that_names_an_artifact_with_an_edited_manifest_rebuilds_it(tiny):
    file = tiny.path("onnx-fp32") / MANIFEST
    file.write_text(file.read_text().replace("POSITIVE", "NEUTRAL"))
    with pytest.raises(TamperedError, match="does not match its own id"):
        ensure(tiny, ["onnx-int8"], {}, lambda line: None)
    steps = {"onnx-fp32": Optimize()}
    ensure(tiny, steps, steps, lambda line: None)
    assert tiny.load("onnx-fp32").manifest.labels == ("NEGATIVE", "POSITIVE")


@pytest.mark.slow
def test_a_build_stops_where_its_parent_is_replaced_meanwhile(tiny, monkeypatch):
    function, version = pipeline.STEPS[Quantize]

    def quantize_and_replace_parent(job):
        result = function(job)
        monkeypatch.setitem(pipeline.STEPS, Quantize, (function, version))
        steps = {"onnx-std": Export(17)}
        ensure(tiny, ["onnx-fp32"], steps, lambda line: None)
        return result

    monkeypatch.setitem(pipeline.STEPS, Quantize, (quantize_and_replace_parent, version + 1))
    id_before = tiny.load("onnx-int8").manifest.id
    with pytest.raises(ArtifactError, match="onnx-fp32 changed during a build"):
        ensure(tiny, ["onnx-int8"], {}, lambda line: None)
    assert tiny.load("onnx-int8").manifest.id == id_before


def test_a_hub_model_is_planned_without_downloading_it(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    info = type("Info", (), {"sha": "abc123", "siblings": ()})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, ref, revision: info)
    workspace = Workspace.open("user/model", tmp_path)
    assert plan(workspace, ["onnx-std"], {})[0].step == Import("abc123")


def test_a_folder_without_a_manifest_is_not_replaced(tiny, tmp_path):
    workspace = Workspace(tmp_path / "other", tiny.model, tiny.source)
    workspace.path("onnx-std").mkdir(parents=True)
    (workspace.path("onnx-std") / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="Move the folder away"):
        ensure(workspace, ["onnx-std"], {}, lambda line: None)
    assert (workspace.path("onnx-std") / "notes.txt").read_text() == "mine"


def test_an_artifact_with_wrong_logits_is_not_published(tiny, monkeypatch):
    """A wrong rewrite changes every logit by 0.001, ten times the limit for fp32 rounding."""
    function, version = pipeline.STEPS[Optimize]

    def optimize_wrongly(job):
        import onnx
        from onnx import numpy_helper

        result = function(job)
        model = onnx.load(job.folder / "model.onnx")
        bias = next(i for i in model.graph.initializer if i.name == "classifier.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.001), "classifier.bias"))
        onnx.save(model, job.folder / "model.onnx")
        return dataclasses.replace(result, step=job.step)

    monkeypatch.setitem(pipeline.STEPS, Optimize, (optimize_wrongly, version + 1))
    files_before = digest(tiny)
    with pytest.raises(VerdictError, match="onnx-fp32 failed validation and was not published") as error:
        ensure(tiny, ["onnx-int8"], {}, lambda line: None)
    assert error.value.exit_code == 3
    assert digest(tiny) == files_before


def test_a_broken_graph_is_not_published(tiny, monkeypatch):
    function, version = pipeline.STEPS[Optimize]

    def write_broken_graph(job):
        result = function(job)
        (job.folder / "model.onnx").write_bytes(b"no graph")
        return result

    monkeypatch.setitem(pipeline.STEPS, Optimize, (write_broken_graph, version + 1))
    files_before = digest(tiny)
    with pytest.raises(GraphError):
        ensure(tiny, ["onnx-fp32"], {}, lambda line: None)
    assert digest(tiny) == files_before


def test_validate_checks_the_existing_artifact(tiny):
    assert validate_variant(tiny, "torch-fp32", lambda line: None)["largest_delta"] == 0
    report = validate_variant(tiny, "onnx-int8", lambda line: None)
    assert report["passed"]
    assert report["largest_delta"] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kill_signal", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_keeps_finished_artifacts_and_the_next_run_builds_the_rest(tmp_path, kill_signal):
    checkpoint = make_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-m", "toolchain", "export", "--model", str(checkpoint)]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if line.startswith("onnx-std: building"):
            break
    scratch = tmp_path / "exported" / "tiny"
    while not (publishing.work_folder(scratch / "onnx-std") / "building").exists():
        time.sleep(0.01)
    os.kill(run.pid, kill_signal)
    output = run.communicate(timeout=60)[1]
    if kill_signal == signal.SIGINT:
        assert run.returncode == 130, output
        assert "Interrupted" in output
        assert [path.name for path in scratch.glob(".*")] == [LOCATION]
    assert not (scratch / "onnx-std").exists()
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    workspace.load("torch-fp32").verify()
    assert reasons(workspace, ["onnx-std"]) == {"torch-fp32": "", "onnx-std": "missing"}
    ensure(workspace, ["onnx-std"], {}, lambda line: None)
    assert [path.name for path in scratch.glob(".*")] == [LOCATION]


@pytest.mark.slow
def test_two_simultaneous_runs_build_one_valid_artifact(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-m", "toolchain", "export", "--model", str(checkpoint), "--optimize", "none"]
    runs = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    manifest = json.loads((tmp_path / "exported" / "tiny" / "onnx-std" / MANIFEST).read_text())
    assert manifest["validation"]["passed"]
    assert [path.name for path in (tmp_path / "exported" / "tiny").glob(".*")] == [LOCATION]
    Workspace.open(str(checkpoint), tmp_path / "exported").load("onnx-std").verify()


@pytest.mark.slow
def test_an_artifact_keeps_any_number_of_labels(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "three", ("bad", "so so", "good"), seed=5)
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    artifact = ensure(workspace, ["onnx-fp32"], {}, lambda line: None)["onnx-fp32"]
    assert artifact.manifest.labels == ("bad", "so so", "good")
    assert artifact.manifest.outputs[0].shape == ("batch_size", 3)
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "so so", "2": "good"}


def test_a_labelled_variant_does_not_replace_the_unlabelled_one(tiny):
    unlabelled = tiny.load("onnx-fp32").manifest
    fuse_only = Optimize("cpu", ("fuse",))
    labelled = ensure(tiny, ["onnx-fp32+fused"], {"onnx-fp32+fused": fuse_only}, quiet)["onnx-fp32+fused"].manifest
    assert (labelled.parent, labelled.variant) == ("onnx-std", "onnx-fp32+fused")
    assert labelled.facts["rewrites"] == {"fuse": 4}
    assert tiny.load("onnx-fp32").manifest.id == unlabelled.id
    # Later commands read the settings of onnx-fp32+fused from its manifest.
    events = []
    rebuilt = ensure(tiny, ["onnx-fp32+fused"], {}, lambda event: events.append(str(event)))["onnx-fp32+fused"].manifest
    assert "onnx-fp32+fused: fresh, skipped" in events
    assert rebuilt.step == fuse_only
    state_of = {item.variant: item.state for item in list_states(tiny)}
    assert state_of["onnx-fp32+fused"] == state_of["onnx-fp32"] == "built"


@pytest.mark.slow
def test_embedding_tables_can_have_other_bits_than_the_layers(tmp_path):
    workspace = Workspace.open(str(make_checkpoint(tmp_path / "decided", leaning=30)), tmp_path / "exported")
    steps = {"onnx-int8+small": Quantize(embeddings="int4"), "onnx-int4": Quantize(scheme="int4")}
    artifacts = ensure(workspace, ["onnx-int8", *steps], steps, quiet)
    size = {name: artifacts[name].manifest.facts["bytes_by_part"] for name in ("onnx-int8", *steps)}
    assert size["onnx-int8+small"]["embeddings"] == size["onnx-int4"]["embeddings"] < size["onnx-int8"]["embeddings"]
    assert size["onnx-int8+small"]["encoder"] == size["onnx-int8"]["encoder"] > size["onnx-int4"]["encoder"]
    with pytest.raises(GraphError, match="no standard operator for embedding tables of 4 bits"):
        ensure(workspace, ["onnx-std-int8"], {"onnx-std-int8": Quantize(embeddings="int4")}, quiet)


@pytest.mark.slow
def test_only_the_named_passes_quantise_their_weights(tmp_path):
    workspace = Workspace.open(str(make_checkpoint(tmp_path / "decided", leaning=30)), tmp_path / "exported")
    steps = {
        "onnx-int8+layers": Quantize(passes=("padding", "quantize-linear")),
        "onnx-int8+tables": Quantize(passes=("quantize-embedding",)),
    }
    artifacts = ensure(workspace, ["onnx-fp32", "onnx-int8", *steps], steps, quiet)
    size = {name: artifacts[name].manifest.facts["bytes_by_part"] for name in ("onnx-fp32", "onnx-int8", *steps)}
    assert size["onnx-int8+layers"] == {**size["onnx-int8"], "embeddings": size["onnx-fp32"]["embeddings"]}
    assert size["onnx-int8+tables"] == {**size["onnx-fp32"], "embeddings": size["onnx-int8"]["embeddings"]}


@pytest.mark.slow
def test_a_labelled_variant_is_built_from_the_labelled_parent(tiny):
    opset = {"onnx-std+old": Export(17)}
    ensure(tiny, ["onnx-std+old"], opset, quiet)
    artifacts = ensure(tiny, ["onnx-fp32+old"], {"onnx-fp32+old": Optimize()}, quiet)
    assert artifacts["onnx-fp32+old"].manifest.parent == "onnx-std+old"
    assert artifacts["onnx-fp32+old"].manifest.facts["opset"][""] == 17
    steps = {"onnx-std+new": Export(17), "onnx-fp32+new": Optimize()}
    new_artifacts = ensure(tiny, steps, steps, quiet)
    assert new_artifacts["onnx-fp32+new"].manifest.parent == "onnx-std+new"
    assert tiny.load("onnx-fp32").manifest.parent == "onnx-std"


@pytest.mark.slow
def test_the_lineage_of_a_labelled_variant_keeps_its_label(tiny):
    prune_step = {"torch-pruned50+mine": Prune(0.5)}
    pruned_artifact = ensure(tiny, prune_step, prune_step, quiet)["torch-pruned50+mine"]
    quantize_step = {"onnx-pruned50-int8+mine": Quantize()}
    artifacts = ensure(tiny, quantize_step, quantize_step, quiet)
    lineage = [variant.name for variant in tiny.lineage("onnx-pruned50-int8+mine")]
    assert lineage == [
        "torch-fp32",
        "torch-pruned50+mine",
        "onnx-std-pruned50+mine",
        "onnx-pruned50+mine",
        "onnx-pruned50-int8+mine",
    ]
    assert artifacts["torch-pruned50+mine"].manifest.id == pruned_artifact.manifest.id
    assert tiny.load("torch-pruned50") is None


def test_a_label_that_was_never_built_gives_an_error(tiny):
    with pytest.raises(UnknownVariantError, match=r"onnx-int8\+nothing is not built"):
        ensure(tiny, ["onnx-int8+nothing"], {}, quiet)
