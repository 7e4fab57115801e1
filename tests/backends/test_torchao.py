"""Tests of models that torchao quantised: no pickle, equal logits in every process, and errors without torchao."""

import json
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from safetensors.torch import load_file, save_file

from toolchain.artifacts.steps import Quantize
from toolchain.artifacts.variants import derive_variant
from toolchain.backends import BACKENDS, Place, open_session, pytorch, reduced
from toolchain.build.pipeline import ensure
from toolchain.build.steps import validate
from toolchain.build.workspace import Workspace
from toolchain.data.inputs import TrainingSource
from toolchain.errors import CheckpointError, ProviderError
from toolchain.models.checkpoints import weights_of
from toolchain.system import hardware

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

PLACE = Place("cpu", 1)
VARIANTS = ("torchao-int8", "torchao-pruned50-int8")
needs_exact_int8 = pytest.mark.skipif(
    not hardware.exact_int8(), reason="torchao's int8 sums may overflow on this processor"
)
LAYER = "distilbert.transformer.layer.0.ffn.lin1"


def batch(rows, tokens):
    ids = np.arange(1, rows * tokens + 1).reshape(rows, tokens)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def eager_logits(folder):
    """Returns the logits of the stored model without PyTorch's compiler."""
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(array) for name, array in batch(2, 25).items()}
        return pytorch.load_model(folder)(**inputs).logits.numpy()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Builds the variants of torchao of a small model, and of the same model after pruning.

    Validation uses the uncompiled models, because compiling takes minutes. The test of `bench` compiles a model.
    """
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", width=64)
    file = tmp_path_factory.mktemp("train") / "train.csv"
    file.write_text("sentence,label\n" + "".join(f"a film of {i} words,{i % 2}\n" for i in range(60)))
    opened = Workspace.open(str(checkpoint), tmp_path_factory.mktemp("exported"), None, TrainingSource(str(file)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "MAX_FLIPS", 1.0)  # a random model's logits are nearly equal, so many labels may flip
        patch.setitem(BACKENDS, "torchao", BACKENDS["torch"])
        ensure(opened, VARIANTS, {}, lambda line: None)
    return opened


@pytest.fixture
def folder(workspace, tmp_path):
    """A copy of the artifact `torchao-int8`, which a test may change."""
    for file in workspace.path("torchao-int8").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.slow
def test_every_linear_layer_is_a_tensor_of_torchao_and_nothing_else_is(workspace):
    model = pytorch.load_model(workspace.path("torchao-int8"))
    linear_weights = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    quantized_weights = {id(weight) for weight in model.parameters() if isinstance(weight, quantization.Int8Tensor)}
    assert len(linear_weights) == 14  # six in each of two layers, and two in the classification head
    assert quantized_weights == linear_weights


@pytest.mark.slow
def test_the_logits_are_those_of_torchao_on_the_parent(workspace):
    model = pytorch.load_model(workspace.path("torch-fp32"))
    original_logits = eager_logits(workspace.path("torch-fp32"))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(array) for name, array in batch(2, 25).items()}
        logits = model(**inputs).logits.numpy()
    assert (eager_logits(workspace.path("torchao-int8")) == logits).all()
    assert 0 < np.abs(logits - original_logits).max() < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_new_process_gives_the_same_logits_to_the_bit(workspace, name):
    code = (
        "import sys, json, torch; from pathlib import Path; from toolchain.backends import pytorch\n"
        "inputs = {k: torch.tensor(v) for k, v in json.loads(sys.argv[1]).items()}\n"
        "with torch.inference_mode(): logits = pytorch.load_model(Path(sys.argv[2]))(**inputs).logits\n"
        "print(logits.numpy().tobytes().hex())"
    )
    inputs = json.dumps({key: value.tolist() for key, value in batch(2, 25).items()})
    command = [sys.executable, "-c", code, inputs, str(workspace.path(name))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == eager_logits(workspace.path(name)).tobytes().hex()


@pytest.mark.slow
@needs_exact_int8
def test_a_compiled_session_gives_logits_near_those_of_the_stored_model_for_every_shape(workspace):
    """Compiled code computes scales in another order, so some activations round to the next integer."""
    folder = workspace.path("torchao-int8")
    eager = open_session(folder, "torch", PLACE)
    compiled = open_session(folder, "torchao", PLACE)
    for rows, tokens in ((1, 25), (2, 25), (3, 7)):
        difference = compiled.run(batch(rows, tokens)) - eager.run(batch(rows, tokens))
        assert np.abs(difference).max() < 0.5
    assert compiled.facts() == {**eager.facts(), "compiled": "dynamic shapes, frozen weights"}
    assert compiled.facts()["precision"] == "int8"
    compiled.close()


@pytest.mark.slow
def test_the_artifact_stores_integers_and_scales_and_no_pickle(workspace):
    folder = workspace.path("torchao-int8")
    tensors, precision = load_file(weights_of(folder)), reduced.Precision.read(folder)
    assert "classifier" in precision.layers
    for layer in precision.layers:
        assert f"{layer}.weight" not in tensors
        assert tensors[f"{layer}.weight.qdata"].dtype == torch.int8
        assert tensors[f"{layer}.weight.scale"].numel() == len(tensors[f"{layer}.weight.qdata"])
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".txt", ".safetensors"}
    facts, parent_facts = (workspace.load(name).manifest.facts for name in ("torchao-int8", "torch-fp32"))
    assert facts["bytes_by_part"]["encoder"] < 0.3 * parent_facts["bytes_by_part"]["encoder"]
    assert facts["parameters"] == parent_facts["parameters"]


def changed_tensors(tensors):
    """Returns weights files that this release of torchao cannot have written for the model, by name."""
    scale = f"{LAYER}.weight.scale"
    return {
        "missing": {name: tensor for name, tensor in tensors.items() if name != scale},
        "other shape": {**tensors, scale: tensors[scale][:1].contiguous()},
        "other type": {**tensors, scale: tensors[scale].double()},
        "extra": {**tensors, f"{LAYER}.weight.offset": tensors[scale].clone()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("change", ["missing", "other shape", "other type", "extra"])
def test_weights_that_do_not_match_are_refused(folder, change):
    save_file(changed_tensors(load_file(weights_of(folder)))[change], weights_of(folder))
    with pytest.raises(CheckpointError, match="stored weights") as error:
        pytorch.load_model(folder)
    assert error.value.hint == "Quantise the model again."


@pytest.mark.slow
def test_a_list_of_layers_that_the_model_does_not_have_is_refused(folder):
    (folder / "precision.json").write_text('{"scheme": "torchao-int8", "layers": ["distilbert.embeddings"]}')
    with pytest.raises(CheckpointError, match="no such linear layer"):
        pytorch.load_model(folder)


def build(workspace):
    ensure(workspace, ["torchao-int8"], {}, lambda line: None)


def test_without_torchao_a_build_gives_an_error_that_names_the_package(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ProviderError, match="torchao cannot be imported") as error:
        build(tiny)
    assert "'torchao>=" in error.value.hint


@pytest.mark.slow
def test_without_torchao_a_stored_model_gives_an_error_that_names_the_package(workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ProviderError, match="torchao cannot be imported") as error:
        open_session(workspace.path("torchao-int8"), "torchao", PLACE)
    assert "'torchao>=" in error.value.hint


def config_without_options():
    """Stands for the configuration of a later release that takes other options."""


@pytest.mark.parametrize("change", ["config missing", "function missing", "other options"])
def test_a_torchao_without_the_names_gives_an_error_with_an_alternative(tiny, monkeypatch, change):
    if change == "other options":
        monkeypatch.setattr(quantization, "Int8DynamicActivationInt8WeightConfig", config_without_options)
    elif change == "config missing":
        monkeypatch.delattr(quantization, "Int8DynamicActivationInt8WeightConfig")
    else:
        monkeypatch.delattr("torchao.quantize_")
    with pytest.raises(ProviderError, match=f"torchao {metadata.version('torchao')} cannot run") as error:
        build(tiny)
    assert "torch-int8 or onnx-int8" in error.value.hint


def test_a_processor_without_exact_sums_gives_an_error_with_an_alternative(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "exact_int8", lambda: False)
    with pytest.raises(ProviderError, match="has no VNNI") as error:
        open_session(tmp_path, "torchao", PLACE)
    assert "onnx-int8" in error.value.hint


def test_a_parent_that_torchao_can_quantise_gives_its_name_and_label():
    step = Quantize("torchao", "int8")
    assert derive_variant("torch-fp32", step).name == "torchao-int8"
    assert derive_variant("torch-pruned50-r1", step, "small").name == "torchao-pruned50-r1-int8+small"
