"""Tests of exporters: the default exporter, the exporter in a manifest, the errors, and the graphs of dynamo."""

import re

import numpy as np
import onnx
import pytest
import torch

from toolchain import exporters, passes
from toolchain.artifacts.steps import Export, decode_step, settings_of
from toolchain.backends.pytorch import load_model
from toolchain.build.pipeline import ensure, plan
from toolchain.errors import CheckpointError, SettingsError
from toolchain.system import extras

OPTIMUM_IS_UNAVAILABLE = exporters.unmet_requirement("optimum")
DYNAMO_IS_UNAVAILABLE = exporters.unmet_requirement("dynamo")
NAMES = ("input_ids", "attention_mask")
needs_dynamo = pytest.mark.skipif(bool(DYNAMO_IS_UNAVAILABLE), reason=DYNAMO_IS_UNAVAILABLE)


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Returns a function that installs metadata of a package `fake-package`; its arguments are the requirements."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(*requirements):
        folder = tmp_path / "fake_package-1.0.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", "Name: fake-package", "Version: 1.0"]
        (folder / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {text}" for text in requirements]) + "\n")

    return install


@pytest.mark.parametrize(
    ("requirements", "cause"),
    [
        ([], ""),
        (["numpy>=1", "click"], ""),
        (["no-such-package; extra == 'all'"], ""),
        (["numpy<0.1"], "fake-package needs numpy <0.1, but "),
        (["no-such-package>=2"], "fake-package needs no-such-package, which is not installed"),
    ],
)
def test_a_package_works_only_beside_the_packages_that_it_needs(distribution, requirements, cause):
    distribution(*requirements)
    found_cause = extras.unmet_requirement("fake-package")
    assert found_cause.startswith(cause)
    assert bool(found_cause) == bool(cause)


def test_a_package_that_is_not_installed_does_not_work():
    assert extras.unmet_requirement("no-such-package") == "no-such-package is not installed"


def test_a_package_works_only_in_the_range_of_versions(distribution):
    distribution()
    assert extras.unmet_requirement("fake-package>=1") == ""
    assert extras.unmet_requirement("fake-package>=2") == "fake-package >=2 is needed, but 1.0 is installed"


def test_optimum_is_the_default_where_it_works():
    assert exporters.default_exporter() == ("torch" if OPTIMUM_IS_UNAVAILABLE else "optimum")


def test_a_missing_exporter_gives_an_error_before_anything_is_built(say, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "EXPORTERS", {"optimum": ("no-such-package",), "torch": ()})
    options = ("--model", tiny_checkpoint, "--exported", tmp_path / "exported", "--exporter", "optimum")
    code, _, err = say("export", *options)
    assert code == 2
    assert "--exporter optimum is unavailable: no-such-package is not installed." in err
    assert "Use --exporter torch" in err
    assert not (tmp_path / "exported").exists()
    assert exporters.default_exporter() == "torch"


def test_the_remaining_exporter_builds_its_variant_although_the_other_one_is_missing(tiny, monkeypatch):
    monkeypatch.setattr(exporters, "EXPORTERS", {"optimum": ("no-such-package",), "torch": ()})
    steps = {f"onnx-std+{exporter}": Export(exporter=exporter) for exporter in ("torch", "optimum")}
    message = "--exporter optimum is unavailable: no-such-package is not installed"
    with pytest.raises(SettingsError, match=message) as error:
        ensure(tiny, list(steps), steps, lambda event: None)
    assert "Use --exporter torch" in error.value.hint
    assert tiny.load("onnx-std+torch").manifest.step == Export(exporter="torch")
    assert not tiny.path("onnx-std+optimum").exists()


@pytest.fixture
def other(tiny):
    """Builds onnx-std with the exporter torch, and returns its workspace."""
    ensure(tiny, ["onnx-std"], {"onnx-std": Export(exporter="torch")}, lambda event: None)
    return tiny


def test_an_artifact_keeps_its_exporter_until_another_one_is_requested(other, monkeypatch):
    assert other.load("onnx-std").manifest.step == Export(exporter="torch")
    monkeypatch.setattr("toolchain.build.pipeline.default_exporter", lambda: "optimum")
    for steps in ({}, {"onnx-std": Export()}, {"onnx-std": Export(exporter="torch")}):
        assert [item.reason for item in plan(other, ["onnx-std"], steps)] == ["", ""]
    step = Export(exporter="optimum")
    assert plan(other, ["onnx-std"], {"onnx-std": step})[-1].reason == "other settings: exporter torch → optimum"


def test_a_rebuild_uses_the_recorded_exporter_only_where_it_works(other, monkeypatch):
    def step_of_rebuild():
        (item,) = [item for item in plan(other, ["onnx-std"], {"onnx-std": Export(17)}) if item.variant.parent]
        assert item.reason
        return item.step

    assert step_of_rebuild() == Export(17, "torch")
    monkeypatch.setattr(exporters, "EXPORTERS", {"optimum": (), "torch": ("no-such-package",)})
    monkeypatch.setattr("toolchain.build.pipeline.default_exporter", lambda: "optimum")
    assert step_of_rebuild() == Export(17, "optimum")


def test_manifests_of_earlier_releases_name_no_exporter():
    assert decode_step("export", {"opset": 18}) == Export(18, "optimum")
    assert settings_of(Export(18, "optimum")) == {"opset": 18}
    assert decode_step("export", settings_of(Export(18, "torch"))) == Export(18, "torch")


@pytest.mark.parametrize("exporter", ["torch", pytest.param("dynamo", marks=needs_dynamo)])
def test_an_error_names_the_model_that_an_exporter_cannot_export(exporter, tiny_checkpoint, tmp_path, monkeypatch):
    model = load_model(tiny_checkpoint)
    monkeypatch.setattr(model.classifier, "forward", lambda hidden: torch.fft.fft(hidden).angle().item())
    with pytest.raises(CheckpointError) as caught:
        exporters.to_onnx(model, tmp_path / "model.onnx", 18, NAMES, exporter)
    name = {"torch": "PyTorch", "dynamo": "PyTorch's dynamo exporter"}[exporter]
    start = f"{name} cannot export DistilBertForSequenceClassification to ONNX: "
    assert re.fullmatch(re.escape(start) + r".*\S", caught.value.cause)
    assert "step 1/3" not in caught.value.cause
    assert caught.value.hint
    assert not (tmp_path / "model.onnx").exists()


def test_an_error_names_an_opset_that_dynamo_cannot_write(say, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "EXPORTERS", {"dynamo": ()})
    options = ("--model", tiny_checkpoint, "--exported", tmp_path / "exported", "--exporter", "dynamo", "--opset", 17)
    code, _, err = say("export", *options)
    assert code == 2
    assert "--exporter dynamo cannot write opset 17." in err
    assert "Use --exporter torch, or --opset 18 or higher." in err
    assert not (tmp_path / "exported").exists()


def test_dynamo_needs_a_tested_release_of_pytorch(monkeypatch):
    monkeypatch.setattr(extras.importlib.metadata, "version", lambda name: "2.7.1")
    with pytest.raises(SettingsError, match=r"dynamo is unavailable: torch >=2.13 is needed, but 2.7.1 is installed"):
        exporters.require_exporter("dynamo", 18)


@pytest.fixture
def dynamo_file(tiny_checkpoint, tmp_path):
    """Returns a function that exports the tiny checkpoint with dynamo, and returns the path of the graph."""

    def export(name, opset=18):
        (tmp_path / name).mkdir()
        exporters.to_onnx(load_model(tiny_checkpoint), tmp_path / name / "model.onnx", opset, NAMES, "dynamo")
        return tmp_path / name / "model.onnx"

    return export


@needs_dynamo
def test_dynamo_writes_equal_bytes_and_no_paths_of_this_machine(dynamo_file):
    path = dynamo_file("first")
    assert path.read_bytes() == dynamo_file("second").read_bytes()
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.opset_import] == [18]
    assert proto.ir_version == 8
    nodes, values = proto.graph.node, [*proto.graph.input, *proto.graph.output, *proto.graph.initializer]
    assert not any(element.doc_string or element.metadata_props for element in (proto, proto.graph, *nodes, *values))
    assert {value.name for value in proto.graph.value_info} <= {weight.name for weight in proto.graph.initializer}
    shapes = {spec.name: spec.shape for spec in passes.specs(passes.read(path).graph.inputs)}
    assert shapes == dict.fromkeys(NAMES, ("batch_size", "sequence_length"))
    assert [spec.shape for spec in passes.specs(passes.read(path).graph.outputs)] == [("batch_size", 2)]


@needs_dynamo
def test_dynamo_names_nodes_as_tracing_does(dynamo_file, built_tiny):
    def layers(path):
        return {
            node.name for node in passes.read(path).graph if node.op_type in ("MatMul", "Gemm", "LayerNormalization")
        }

    names = layers(dynamo_file("named"))
    assert "/distilbert/transformer/layer.0/attention/q_lin/MatMul" in names
    assert names == layers(built_tiny.path("onnx-std") / "model.onnx")


@needs_dynamo
def test_dynamo_keeps_the_masks_of_transformers_after_the_export(dynamo_file):
    from transformers import masking_utils

    previous = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    dynamo_file("masks")
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"] is previous


@needs_dynamo
@pytest.mark.parametrize("opset", [19, 20])
def test_dynamo_writes_every_opset_of_the_command(dynamo_file, opset, built_tiny):
    import onnxruntime as ort

    batch = {
        "input_ids": np.array([[101, 2023, 102], [101, 102, 0]]),
        "attention_mask": np.array([[1, 1, 1], [1, 1, 0]]),
    }
    paths = (dynamo_file(f"opset{opset}", opset), built_tiny.path("onnx-std") / "model.onnx")
    logits = [ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, batch)[0] for path in paths]
    assert passes.read(paths[0]).opset_imports[""] == opset
    assert np.abs(logits[0] - logits[1]).max() < 1e-5
