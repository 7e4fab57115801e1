"""Quantised PyTorch variants: stored without pickle, equal to the bit once loaded, in this process and the next."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from safetensors.torch import load_file, save_file

from toolchain.artifacts.variants import Quantize, child
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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every quantised PyTorch variant of a small model, dense and pruned: bitsandbytes has blocks of 64 weights."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", width=64)
    file = tmp_path_factory.mktemp("train") / "train.csv"
    file.write_text("sentence,label\n" + "".join(f"a film of {i} words,{i % 2}\n" for i in range(60)))
    source = TrainingSource(str(file))
    workspace = Workspace.open(str(checkpoint), tmp_path_factory.mktemp("exported"), None, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "MAX_FLIPS", 1.0)  # a random model's answers are near calls
        ensure(workspace, [*TORCH, *BNB, "torch-pruned50-int8"], {}, lambda line: None)
    return workspace


def answer(workspace, name):
    runtime = name.partition("-")[0]
    session = open_session(workspace.path(name), runtime, Place("cpu", 1))
    found = session.run(BATCH)
    session.close()
    return found


@pytest.mark.parametrize("name", [*TORCH, *BNB, "torch-pruned50-int8"])
def test_a_new_process_gives_the_same_logits_to_the_bit(built, name):
    code = (
        "import sys, json, numpy as np; from pathlib import Path; from toolchain.backends import Place, open_session; "
        "batch = {k: np.array(v) for k, v in json.loads(sys.argv[3]).items()}; "
        "print(open_session(Path(sys.argv[1]), sys.argv[2], Place('cpu', 1)).run(batch).tobytes().hex())"
    )
    given = json.dumps({key: value.tolist() for key, value in BATCH.items()})
    command = [sys.executable, "-c", code, str(built.path(name)), name.partition("-")[0], given]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip().splitlines()[-1] == answer(built, name).tobytes().hex()


@pytest.mark.parametrize(("name", "largest"), [("torch-int8", 1.0), ("torch-bf16", 0.2), ("torch-fp16", 0.02)])
def test_its_answers_are_near_those_of_fp32(built, name, largest):
    delta = np.abs(answer(built, name) - answer(built, "torch-fp32")).max()
    assert 0 < delta < largest


def test_int8_holds_integers_and_no_pickle(built):
    tensors = load_file(weights_of(built.path("torch-int8")))
    precision = reduced.Precision.read(built.path("torch-int8"))
    assert "distilbert.transformer.layer.0.ffn.lin1" in precision.layers
    for layer in precision.layers:
        assert tensors[f"{layer}.weight"].dtype == torch.int8
        assert len(tensors[f"{layer}.scales"]) == len(tensors[f"{layer}.weight"])
    names = {path.suffix for path in built.path("torch-int8").iterdir()}
    assert names <= {".json", ".txt", ".safetensors"}
    dense = built.load("torch-fp32").manifest.facts["bytes_by_part"]["encoder"]
    assert built.load("torch-int8").manifest.facts["bytes_by_part"]["encoder"] < 0.5 * dense


def test_a_session_says_in_what_it_computes(built):
    session = open_session(built.path("torch-int8"), "torch", Place("cpu", 1))
    assert session.facts()["precision"] == "int8"
    assert session.facts()["engine"] in torch.backends.quantized.supported_engines
    session = open_session(built.path("bnb-nf4"), "bnb", Place("cpu", 1))
    assert session.facts()["note"] == "memory, not speed"


def test_int8_is_what_pytorch_makes_of_it(built):
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    model = pytorch.load_model(built.path("torch-fp32"))
    made = quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8)
    batch = {name: torch.from_numpy(array) for name, array in BATCH.items()}
    with torch.inference_mode():
        assert torch.equal(made(**batch).logits, torch.from_numpy(answer(built, "torch-int8")))


def test_bitsandbytes_leaves_the_head_alone(built):
    for name in BNB:
        tensors = load_file(built.path(name) / "model.safetensors")
        assert tensors["classifier.weight"].dtype == torch.float32
        assert tensors["distilbert.transformer.layer.0.ffn.lin1.weight"].dtype in (torch.int8, torch.uint8)


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"scheme": "int4", "layers": []}', '{"scheme": "int8", "layers": [7]}',
     '{"scheme": "int8", "layers": ["nowhere"]}', '{"scheme": "int8", "layers": ["classifier"]}'],
)  # fmt: skip
def test_a_precision_that_does_not_fit_is_refused(built, tmp_path, content):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((built.path("torch-fp32") / name).read_bytes())
    (tmp_path / "precision.json").write_text(content)
    with pytest.raises(CheckpointError):
        pytorch.load_model(tmp_path)


def test_weights_of_another_shape_are_refused(built, tmp_path):
    for file in built.path("torch-int8").iterdir():
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
def test_what_cannot_be_quantised_is_told_what_can(parent, backend, scheme):
    with pytest.raises(UnknownVariantError, match="It takes"):
        child(parent, Quantize(backend, scheme))


def test_a_scheme_of_another_backend_is_a_usage_error(tiny, capsys):
    arguments = ["quantize", "--backend", "bnb", "--scheme", "bf16", "--exported", str(tiny.exported)]
    assert main(arguments) == 2
    assert "int8, nf4, fp4" in capsys.readouterr().err


def test_without_bitsandbytes_the_mend_is_named(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ProviderError, match="bitsandbytes cannot be imported"):
        open_session(built.path("bnb-nf4"), "bnb", Place("cpu", 1))


def test_a_gpu_too_old_for_int8_is_named(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GTX 1050 Ti")
    with pytest.raises(ProviderError, match=r"GTX 1050 Ti.*7\.5"):
        bnb.BnbSession(built.path("bnb-int8"), Place("cuda", 1))
    assert bnb.compute_dtype(torch.device("cuda")) == torch.float16


def test_a_gpu_that_bitsandbytes_was_not_built_for_is_named(built, monkeypatch):
    from bitsandbytes import cextension

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no binary"))
    with pytest.raises(ProviderError, match="bitsandbytes has no kernels for CUDA"):
        bnb.BnbSession(built.path("bnb-nf4"), Place("cuda", 1))


def test_a_stored_model_that_answers_otherwise_is_an_error(built, tmp_path, monkeypatch):
    from toolchain.build.steps import quantize

    def lossy(tensors, folder):
        pytorch.save_weights({**tensors, "classifier.bias": tensors["classifier.bias"] + 1}, folder)

    monkeypatch.setattr(quantize, "save_weights", lossy)
    workspace = Workspace(tmp_path, built.model, built.source, built.train)
    with pytest.raises(ArtifactError, match="gives other logits after it is stored"):
        ensure(workspace, ["torch-bf16"], {}, lambda line: None)
    assert not workspace.path("torch-bf16").exists()


def test_layers_that_are_no_whole_blocks_are_refused_before_anything_is_packed(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "narrow", width=32)
    with pytest.raises(ProviderError, match=r"blocks of 64, .* not multiples of 64: 32"):
        bnb.quantize_model(checkpoint, "nf4")
    assert bnb.quantize_model(checkpoint, "int8") is not None
