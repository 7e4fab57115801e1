"""Tests of quantised PyTorch variants: they are stored without pickle and give the same logits in every process."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from safetensors.torch import load_file, save_file

from toolchain.artifacts.steps import Quantize
from toolchain.artifacts.variants import derive_variant
from toolchain.backends import Place, bnb, open_session, pytorch, reduced
from toolchain.build.pipeline import ensure
from toolchain.build.steps import validate
from toolchain.build.workspace import Workspace
from toolchain.cli import main
from toolchain.data.inputs import TrainingSource
from toolchain.errors import ArtifactError, CheckpointError, ProviderError, UnknownVariantError
from toolchain.models.checkpoints import weights_of

BATCH = {"input_ids": np.arange(1, 51).reshape(2, 25), "attention_mask": np.ones((2, 25), np.int64)}
TORCH, BNB = ("torch-int8", "torch-bf16", "torch-fp16"), ("bnb-int8", "bnb-nf4", "bnb-fp4")
QUANTISED = (*TORCH, *BNB, "torch-pruned50-int8")


@pytest.fixture(scope="module")
def small_workspace(tmp_path_factory):
    """Builds every quantised PyTorch variant of a small model of width 64, the size of a block in bitsandbytes."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", width=64)
    file = tmp_path_factory.mktemp("train") / "train.csv"
    file.write_text("sentence,label\n" + "".join(f"a film of {i} words,{i % 2}\n" for i in range(60)))
    source = TrainingSource(str(file))
    workspace = Workspace.open(str(checkpoint), tmp_path_factory.mktemp("exported"), None, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "MAX_FLIPS", 1.0)  # a random model's logits are nearly equal, so many labels may flip
        ensure(workspace, QUANTISED, {}, lambda line: None)
    return workspace


def logits_of(workspace, name):
    runtime = name.partition("-")[0]
    session = open_session(workspace.path(name), runtime, Place("cpu", 1))
    logits = session.run(BATCH)
    session.close()
    return logits


@pytest.fixture(scope="module")
def logits_of_new_process(small_workspace):
    """Returns the logits of each variant, as bytes in hexadecimal, from a process that only loads the artifacts."""
    code = (
        "import sys, json, numpy as np; from pathlib import Path; from toolchain.backends import Place, open_session; "
        "batch = {k: np.array(v) for k, v in json.loads(sys.argv[1]).items()}; "
        "run = lambda p: open_session(p, p.name.partition('-')[0], Place('cpu', 1)).run(batch); "
        "print(json.dumps({p.name: run(p).tobytes().hex() for p in map(Path, sys.argv[2:])}))"
    )
    batch = json.dumps({key: value.tolist() for key, value in BATCH.items()})
    command = [sys.executable, "-c", code, batch, *(str(small_workspace.path(name)) for name in QUANTISED)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTISED)
def test_a_new_process_gives_the_same_logits_to_the_bit(small_workspace, logits_of_new_process, name):
    assert logits_of_new_process[name] == logits_of(small_workspace, name).tobytes().hex()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("torch-int8", 1.0), ("torch-bf16", 0.2), ("torch-fp16", 0.02)])
def test_reduced_precision_gives_logits_near_those_of_fp32(small_workspace, name, limit):
    delta = np.abs(logits_of(small_workspace, name) - logits_of(small_workspace, "torch-fp32")).max()
    assert 0 < delta < limit


@pytest.mark.slow
def test_int8_stores_integers_and_no_pickle(small_workspace):
    tensors = load_file(weights_of(small_workspace.path("torch-int8")))
    precision = reduced.Precision.read(small_workspace.path("torch-int8"))
    assert "distilbert.transformer.layer.0.ffn.lin1" in precision.layers
    for layer in precision.layers:
        assert tensors[f"{layer}.weight"].dtype == torch.int8
        assert len(tensors[f"{layer}.scales"]) == len(tensors[f"{layer}.weight"])
    names = {path.suffix for path in small_workspace.path("torch-int8").iterdir()}
    assert names <= {".json", ".txt", ".safetensors"}
    dense = small_workspace.load("torch-fp32").manifest.facts["bytes_by_part"]["encoder"]
    assert small_workspace.load("torch-int8").manifest.facts["bytes_by_part"]["encoder"] < 0.5 * dense


@pytest.mark.slow
def test_a_session_states_its_precision_and_engine(small_workspace):
    session = open_session(small_workspace.path("torch-int8"), "torch", Place("cpu", 1))
    assert session.facts()["precision"] == "int8"
    assert session.facts()["engine"] in torch.backends.quantized.supported_engines
    session = open_session(small_workspace.path("bnb-nf4"), "bnb", Place("cpu", 1))
    assert session.facts()["note"] == "the size of the weights, not speed"


def build_int8(workspace):
    ensure(workspace, ["torch-int8"], {}, lambda line: None)


def load_int8(workspace):
    open_session(workspace.path("torch-int8"), "torch", Place("cpu", 1))


@pytest.mark.parametrize(
    ("module", "use"), [("torch.ao.quantization", build_int8), ("torch.ao.nn.quantized.dynamic", load_int8)]
)
def test_a_pytorch_without_dynamic_int8_gives_an_error_with_an_alternative(tiny, monkeypatch, module, use):
    if use is load_int8:
        build_int8(tiny)
    # `module` is the name of a PyTorch module. From here on, Python fails to import this PyTorch module.
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ProviderError, match="cannot run torch-int8") as error:
        use(tiny)
    assert "torch-compile-bf16" in error.value.hint


@pytest.mark.slow
def test_int8_gives_the_logits_of_pytorch_quantize_dynamic(small_workspace):
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    model = pytorch.load_model(small_workspace.path("torch-fp32"))
    quantized_model = quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8)
    batch = {name: torch.from_numpy(array) for name, array in BATCH.items()}
    with torch.inference_mode():
        assert torch.equal(quantized_model(**batch).logits, torch.from_numpy(logits_of(small_workspace, "torch-int8")))


@pytest.mark.slow
def test_bitsandbytes_keeps_the_head_in_float32(small_workspace):
    for name in BNB:
        tensors = load_file(small_workspace.path(name) / "model.safetensors")
        assert tensors["classifier.weight"].dtype == torch.float32
        assert tensors["distilbert.transformer.layer.0.ffn.lin1.weight"].dtype in (torch.int8, torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"scheme": "int4", "layers": []}', '{"scheme": "int8", "layers": [7]}',
     '{"scheme": "int8", "layers": ["nowhere"]}', '{"scheme": "int8", "layers": ["classifier"]}'],
)  # fmt: skip
def test_a_precision_file_that_does_not_fit_the_model_is_refused(small_workspace, tmp_path, content):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((small_workspace.path("torch-fp32") / name).read_bytes())
    (tmp_path / "precision.json").write_text(content)
    with pytest.raises(CheckpointError):
        pytorch.load_model(tmp_path)


@pytest.mark.slow
def test_weights_of_another_shape_are_refused(small_workspace, tmp_path):
    for file in small_workspace.path("torch-int8").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(weights_of(tmp_path))
    tensors["classifier.weight"] = tensors["classifier.weight"][:1].contiguous()
    save_file(tensors, weights_of(tmp_path))
    with pytest.raises(CheckpointError, match="do not match"):
        pytorch.load_model(tmp_path)


@pytest.mark.parametrize(
    ("parent", "backend", "scheme"),
    [
        ("torch-int8", "torch", "bf16"),
        ("torch-bf16", "torch", "int8"),
        ("onnx-int8", "ort", "dynamic"),
        ("bnb-nf4", "bnb", "int8"),
        ("onnx-fp32", "torch", "int8"),
        ("torch-fp32", "ort", "dynamic"),
        ("torch-pruned50", "bnb", "nf4"),
    ],
)
def test_a_parent_that_cannot_be_quantised_gives_an_error_that_names_valid_parents(parent, backend, scheme):
    with pytest.raises(UnknownVariantError, match="It takes"):
        derive_variant(parent, Quantize(backend, scheme))


def test_a_scheme_of_another_backend_is_a_usage_error(tiny, capsys):
    arguments = ["quantize", "--backend", "bnb", "--scheme", "bf16", "--exported", str(tiny.exported)]
    assert main(arguments) == 2
    assert "int8, nf4, fp4" in capsys.readouterr().err


@pytest.mark.slow
def test_without_bitsandbytes_a_session_raises_a_provider_error(small_workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ProviderError, match="bitsandbytes cannot be imported"):
        open_session(small_workspace.path("bnb-nf4"), "bnb", Place("cpu", 1))


@pytest.mark.slow
def test_an_error_names_a_gpu_that_is_too_old_for_int8(small_workspace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GTX 1050 Ti")
    with pytest.raises(ProviderError, match=r"GTX 1050 Ti.*7\.5"):
        bnb.BnbSession(small_workspace.path("bnb-int8"), Place("cuda", 1))
    assert bnb.compute_dtype(torch.device("cuda")) == torch.float16


@pytest.mark.slow
def test_a_gpu_without_bitsandbytes_kernels_raises_a_provider_error(small_workspace, monkeypatch):
    from bitsandbytes import cextension

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no binary"))
    with pytest.raises(ProviderError, match="bitsandbytes has no kernels for CUDA"):
        bnb.BnbSession(small_workspace.path("bnb-nf4"), Place("cuda", 1))


@pytest.mark.slow
def test_a_stored_model_with_other_logits_raises_an_artifact_error(small_workspace, tmp_path, monkeypatch):
    from toolchain.build.steps import quantize

    def save_changed_weights(tensors, folder):
        pytorch.save_weights({**tensors, "classifier.bias": tensors["classifier.bias"] + 1}, folder)

    monkeypatch.setattr(quantize, "save_weights", save_changed_weights)
    workspace = Workspace(tmp_path, small_workspace.model, small_workspace.source, small_workspace.train)
    with pytest.raises(ArtifactError, match="stored model gives other logits"):
        ensure(workspace, ["torch-bf16"], {}, lambda line: None)
    assert not workspace.path("torch-bf16").exists()


def test_layer_sizes_that_are_no_multiples_of_the_block_size_are_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "narrow", width=32)
    with pytest.raises(ProviderError, match=r"blocks of 64, .* not multiples of 64: 32"):
        bnb.quantize_model(checkpoint, "nf4")
    assert bnb.quantize_model(checkpoint, "int8") is not None
