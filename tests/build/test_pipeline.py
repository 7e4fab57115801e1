"""The pipeline: it builds missing variants, skips fresh ones, and keeps finished work after a failure."""

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
from toolchain.build.pipeline import ensure, plan, states, validate_variant
from toolchain.build.workspace import Workspace
from toolchain.errors import ArtifactError, GraphError, TamperedError, UnknownVariantError, VerdictError

ALL = tuple(variant.name for variant in variants.lineage("onnx-int8"))


def quiet(line):
    pass


def reasons(workspace, names=("onnx-int8",), asked=None):
    return {item.variant.name: item.reason for item in plan(workspace, names, asked or {})}


def digest(workspace):
    """The bytes of every file under `exported/`, by name."""
    return {
        str(p.relative_to(workspace.exported)): p.read_bytes()
        for p in sorted(workspace.exported.rglob("*"))
        if p.is_file()
    }


def test_an_empty_folder_lacks_all_variants(tiny_checkpoint, tmp_path):
    workspace = Workspace.open(str(tiny_checkpoint), tmp_path / "exported")
    assert reasons(workspace) == dict.fromkeys(ALL, "missing")
    assert not (tmp_path / "exported").exists()  # a plan writes nothing


def test_a_second_run_skips_fresh_variants(tiny):
    said = []
    before = digest(tiny)
    ensure(
        tiny,
        ALL,
        {"torch-fp32": Import(), "onnx-std": Export(), "onnx-fp32": Optimize()},
        lambda event: said.append(str(event)),
    )
    assert said == [f"{name}: fresh, skipped" for name in ALL]
    assert digest(tiny) == before


@pytest.mark.slow
def test_the_same_work_gives_the_same_ids(built_tiny, tiny_checkpoint, tmp_path):
    again = Workspace.open(str(tiny_checkpoint), tmp_path / "exported")
    ensure(again, ALL, {}, lambda line: None)
    for name in ALL:
        assert again.load(name).manifest.id == built_tiny.load(name).manifest.id, name


def test_manifests_state_parents_inputs_and_labels(built_tiny):
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
def test_other_settings_replace_and_make_descendants_stale(tiny):
    asked = {"onnx-std": Export(17)}
    assert reasons(tiny, ["onnx-std"], asked) == {"torch-fp32": "", "onnx-std": "other settings: opset 18 → 17"}
    said = []
    ensure(tiny, ["onnx-std"], asked, lambda event: said.append(str(event)))
    assert "onnx-std: replaced" in said[-1]
    assert tiny.load("onnx-std").manifest.facts["opset"] == {"": 17}
    assert reasons(tiny)["onnx-fp32"] == "onnx-std changed"
    assert reasons(tiny)["onnx-int8"] == "onnx-fp32 is built anew"
    assert {v.name: state for v, _, state in states(tiny)}["onnx-fp32"] == "stale: onnx-std changed"
    # An ancestor keeps the settings it was built with: nobody asked for opset 18 again.
    assert reasons(tiny)["onnx-std"] == ""
    ensure(tiny, ["onnx-int8"], {}, lambda event: said.append(str(event)))
    assert tiny.load("onnx-fp32").manifest.facts["opset"][""] == 17


@pytest.mark.slow
def test_a_changed_checkpoint_is_imported_anew(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny", seed=1)
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    ensure(workspace, ["torch-fp32"], {}, lambda line: None)
    make_checkpoint(checkpoint, seed=5)
    assert reasons(workspace, ["torch-fp32"]) == {"torch-fp32": "the checkpoint changed"}


@pytest.mark.slow
def test_a_checkpoint_that_went_away_is_not_needed_any_more(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny")
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    ensure(workspace, ["torch-fp32"], {}, lambda line: None)
    checkpoint.rename(tmp_path / "gone")
    found = Workspace.open("tiny", tmp_path / "exported")
    assert reasons(found, ["torch-fp32"]) == {"torch-fp32": ""}


def test_a_step_of_another_version_is_built_again(tiny, monkeypatch):
    function, version = pipeline.STEPS[Optimize]
    monkeypatch.setitem(pipeline.STEPS, Optimize, (function, version + 1))
    assert reasons(tiny)["onnx-fp32"] == "this release builds it differently"


def tamper(workspace, name="onnx-fp32"):
    file = workspace.path(name) / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(bytes(content))


def test_a_tampered_artifact_is_not_built_upon(tiny):
    tamper(tiny)
    with pytest.raises(TamperedError, match="another sha256"):
        ensure(tiny, ["onnx-int8"], {}, lambda line: None)
    assert "tampered" in {v.name: state for v, _, state in states(tiny)}["onnx-fp32"]


def test_a_manifest_that_cannot_be_read_is_a_state_too(tiny):
    (tiny.path("onnx-int8") / MANIFEST).write_text("{")
    assert {v.name: state for v, _, state in states(tiny)}["onnx-int8"].startswith("unusable: ")


def test_a_tampered_artifact_that_is_asked_for_is_built_again(tiny):
    good = tiny.load("onnx-fp32").manifest.id
    tamper(tiny)
    asked = {"onnx-fp32": Optimize()}
    assert reasons(tiny, asked, asked)["onnx-fp32"] == "it was changed after it was sealed"
    ensure(tiny, asked, asked, lambda line: None)
    tiny.load("onnx-fp32").verify()
    assert tiny.load("onnx-fp32").manifest.id == good


def test_a_manifest_edited_by_hand_is_refused_and_mended_by_asking_for_it(tiny):
    file = tiny.path("onnx-fp32") / MANIFEST
    file.write_text(file.read_text().replace("POSITIVE", "NEUTRAL"))
    with pytest.raises(TamperedError, match="does not add up"):
        ensure(tiny, ["onnx-int8"], {}, lambda line: None)
    asked = {"onnx-fp32": Optimize()}
    ensure(tiny, asked, asked, lambda line: None)
    assert tiny.load("onnx-fp32").manifest.labels == ("NEGATIVE", "POSITIVE")


@pytest.mark.slow
def test_a_parent_replaced_while_its_child_is_built_stops_the_child(tiny, monkeypatch):
    function, version = pipeline.STEPS[Quantize]

    def meanwhile(job):
        built = function(job)
        monkeypatch.setitem(pipeline.STEPS, Quantize, (function, version))
        asked = {"onnx-std": Export(17)}
        ensure(tiny, ["onnx-fp32"], asked, lambda line: None)
        return built

    monkeypatch.setitem(pipeline.STEPS, Quantize, (meanwhile, version + 1))
    before = tiny.load("onnx-int8").manifest.id
    with pytest.raises(ArtifactError, match="onnx-fp32 was replaced while"):
        ensure(tiny, ["onnx-int8"], {}, lambda line: None)
    assert tiny.load("onnx-int8").manifest.id == before


def test_a_hub_model_is_planned_without_downloading_it(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    info = type("Info", (), {"sha": "abc123", "siblings": ()})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, ref, revision: info)
    workspace = Workspace.open("user/model", tmp_path)
    assert plan(workspace, ["onnx-std"], {})[0].step == Import("abc123")


def test_a_foreign_folder_is_not_replaced(tiny, tmp_path):
    workspace = Workspace(tmp_path / "other", tiny.model, tiny.source)
    workspace.path("onnx-std").mkdir(parents=True)
    (workspace.path("onnx-std") / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="move it away"):
        ensure(workspace, ["onnx-std"], {}, lambda line: None)
    assert (workspace.path("onnx-std") / "notes.txt").read_text() == "mine"


def test_a_build_that_answers_wrongly_is_not_published(tiny, monkeypatch):
    """A rewrite that moves every logit by a thousandth, ten times what fp32 rounding may."""
    function, version = pipeline.STEPS[Optimize]

    def wrong(job):
        import onnx
        from onnx import numpy_helper

        built = function(job)
        model = onnx.load(job.folder / "model.onnx")
        bias = next(i for i in model.graph.initializer if i.name == "classifier.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.001), "classifier.bias"))
        onnx.save(model, job.folder / "model.onnx")
        return dataclasses.replace(built, step=job.step)

    monkeypatch.setitem(pipeline.STEPS, Optimize, (wrong, version + 1))
    before = digest(tiny)
    with pytest.raises(VerdictError, match="onnx-fp32 failed validation and was not published") as error:
        ensure(tiny, ["onnx-int8"], {}, lambda line: None)
    assert error.value.exit_code == 3
    assert digest(tiny) == before


def test_a_broken_graph_is_not_published(tiny, monkeypatch):
    function, version = pipeline.STEPS[Optimize]

    def broken(job):
        built = function(job)
        (job.folder / "model.onnx").write_bytes(b"no graph")
        return built

    monkeypatch.setitem(pipeline.STEPS, Optimize, (broken, version + 1))
    before = digest(tiny)
    with pytest.raises(GraphError):
        ensure(tiny, ["onnx-fp32"], {}, lambda line: None)
    assert digest(tiny) == before


def test_validate_reports_on_built_variants(tiny):
    assert validate_variant(tiny, "torch-fp32", lambda line: None)["largest_delta"] == 0
    report = validate_variant(tiny, "onnx-int8", lambda line: None)
    assert report["passed"]
    assert report["largest_delta"] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_run_keeps_finished_variants_for_the_next(tmp_path, sent):
    checkpoint = make_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-m", "toolchain", "export", "--model", str(checkpoint)]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if line.startswith("onnx-std: building"):
            break
    scratch = tmp_path / "exported" / "tiny"
    while not (publishing.work_folder(scratch / "onnx-std") / "building").exists():
        time.sleep(0.01)
    os.kill(run.pid, sent)
    rest = run.communicate(timeout=60)[1]
    if sent == signal.SIGINT:
        assert run.returncode == 130, rest
        assert "Interrupted" in rest
        assert not list(scratch.glob(".*"))
    assert not (scratch / "onnx-std").exists()
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    workspace.load("torch-fp32").verify()
    assert reasons(workspace, ["onnx-std"]) == {"torch-fp32": "", "onnx-std": "missing"}
    ensure(workspace, ["onnx-std"], {}, lambda line: None)
    assert not list(scratch.glob(".*"))


@pytest.mark.slow
def test_two_runs_at_once_build_once(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-m", "toolchain", "export", "--model", str(checkpoint), "--optimize", "none"]
    runs = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    manifest = json.loads((tmp_path / "exported" / "tiny" / "onnx-std" / MANIFEST).read_text())
    assert manifest["validation"]["passed"]
    assert not list((tmp_path / "exported" / "tiny").glob(".*"))
    Workspace.open(str(checkpoint), tmp_path / "exported").load("onnx-std").verify()


@pytest.mark.slow
def test_labels_of_any_number_come_along(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "three", ("bad", "so so", "good"), seed=5)
    workspace = Workspace.open(str(checkpoint), tmp_path / "exported")
    built = ensure(workspace, ["onnx-fp32"], {}, lambda line: None)["onnx-fp32"]
    assert built.manifest.labels == ("bad", "so so", "good")
    assert built.manifest.outputs[0].shape == ("batch_size", 3)
    config = json.loads((built.path / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "so so", "2": "good"}


def test_a_label_lies_beside_the_variant_of_the_same_tags(tiny):
    plain = tiny.load("onnx-fp32").manifest
    fused = Optimize("cpu", ("fuse",))
    built = ensure(tiny, ["onnx-fp32+fused"], {"onnx-fp32+fused": fused}, quiet)["onnx-fp32+fused"].manifest
    assert (built.parent, built.variant) == ("onnx-std", "onnx-fp32+fused")
    assert built.facts["rewrites"] == {"fuse": 4}
    assert tiny.load("onnx-fp32").manifest.id == plain.id
    # Its settings are its manifest's from then on.
    said = []
    again = ensure(tiny, ["onnx-fp32+fused"], {}, lambda event: said.append(str(event)))["onnx-fp32+fused"].manifest
    assert "onnx-fp32+fused: fresh, skipped" in said
    assert again.step == fused
    found = {variant.name: state for variant, _, state in states(tiny)}
    assert found["onnx-fp32+fused"] == found["onnx-fp32"] == "built"


@pytest.mark.slow
def test_embedding_tables_may_have_other_bits_than_the_layers(tmp_path):
    workspace = Workspace.open(str(make_checkpoint(tmp_path / "decided", leaning=30)), tmp_path / "exported")
    asked = {"onnx-int8+small": Quantize(embeddings="int4"), "onnx-int4": Quantize(scheme="int4")}
    built = ensure(workspace, ["onnx-int8", *asked], asked, quiet)
    size = {name: built[name].manifest.facts["bytes_by_part"] for name in ("onnx-int8", *asked)}
    assert size["onnx-int8+small"]["embeddings"] == size["onnx-int4"]["embeddings"] < size["onnx-int8"]["embeddings"]
    assert size["onnx-int8+small"]["encoder"] == size["onnx-int8"]["encoder"] > size["onnx-int4"]["encoder"]
    with pytest.raises(GraphError, match="no standard operator for tables of 4 bits"):
        ensure(workspace, ["onnx-std-int8"], {"onnx-std-int8": Quantize(embeddings="int4")}, quiet)


@pytest.mark.slow
def test_only_the_chosen_passes_quantise_weights(tmp_path):
    workspace = Workspace.open(str(make_checkpoint(tmp_path / "decided", leaning=30)), tmp_path / "exported")
    asked = {
        "onnx-int8+layers": Quantize(passes=("padding", "quantize-linear")),
        "onnx-int8+tables": Quantize(passes=("quantize-embedding",)),
    }
    built = ensure(workspace, ["onnx-fp32", "onnx-int8", *asked], asked, quiet)
    size = {name: built[name].manifest.facts["bytes_by_part"] for name in ("onnx-fp32", "onnx-int8", *asked)}
    assert size["onnx-int8+layers"] == {**size["onnx-int8"], "embeddings": size["onnx-fp32"]["embeddings"]}
    assert size["onnx-int8+tables"] == {**size["onnx-fp32"], "embeddings": size["onnx-int8"]["embeddings"]}
    asked = {"onnx-int8+none": Quantize(passes=())}
    with pytest.raises(GraphError, match="no embedding table left to quantise"):
        ensure(workspace, asked, asked, quiet)


@pytest.mark.slow
def test_a_label_follows_its_lineage(tiny):
    opset = {"onnx-std+old": Export(17)}
    ensure(tiny, ["onnx-std+old"], opset, quiet)
    built = ensure(tiny, ["onnx-fp32+old"], {"onnx-fp32+old": Optimize()}, quiet)
    assert built["onnx-fp32+old"].manifest.parent == "onnx-std+old"
    assert built["onnx-fp32+old"].manifest.facts["opset"][""] == 17
    asked = {"onnx-std+new": Export(17), "onnx-fp32+new": Optimize()}
    both = ensure(tiny, asked, asked, quiet)
    assert both["onnx-fp32+new"].manifest.parent == "onnx-std+new"
    assert tiny.load("onnx-fp32").manifest.parent == "onnx-std"


@pytest.mark.slow
def test_ancestors_of_a_labelled_variant_are_built_with_its_label(tiny):
    pruned = {"torch-pruned50+mine": Prune(0.5, cost="latency")}
    before = ensure(tiny, pruned, pruned, quiet)["torch-pruned50+mine"]
    quantized = {"onnx-pruned50-int8+mine": Quantize()}
    built = ensure(tiny, quantized, quantized, quiet)
    line = [variant.name for variant in tiny.lineage("onnx-pruned50-int8+mine")]
    assert line == [
        "torch-fp32",
        "torch-pruned50+mine",
        "onnx-std-pruned50+mine",
        "onnx-pruned50+mine",
        "onnx-pruned50-int8+mine",
    ]
    assert built["torch-pruned50+mine"].manifest.id == before.manifest.id
    assert tiny.load("torch-pruned50") is None


def test_a_label_without_a_built_variant_is_refused(tiny):
    with pytest.raises(UnknownVariantError, match=r"onnx-int8\+nothing was never built"):
        ensure(tiny, ["onnx-int8+nothing"], {}, quiet)
