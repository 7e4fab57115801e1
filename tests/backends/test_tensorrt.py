"""Tests of ONNX Runtime on TensorRT: the options of the engine, and the refusals. Only the last test needs a GPU."""

import sys
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state
from session_on_host import pretend_cuda

from toolchain.backends import Place, open_session
from toolchain.errors import ArtifactError, ProviderError

TENSORRT = "TensorrtExecutionProvider"
PLACE = Place("tensorrt", 1, device_id=1, batch_size=16)


def batch(rows, tokens):
    ids = np.random.default_rng(tokens).integers(1000, 20000, (rows, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture
def host(monkeypatch):
    """Makes ONNX Runtime report a GPU with TensorRT, although every session runs on the CPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    return pretend_cuda(monkeypatch)


def test_the_engine_covers_all_batches_of_the_run_and_is_tuned_for_one_text(built_tiny, host):
    session = open_session(built_tiny.path("onnx-std"), "onnx", PLACE)
    options = {
        "device_id": "1",
        "trt_fp16_enable": "1",
        "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "trt_profile_opt_shapes": "input_ids:1x32,attention_mask:1x32",
        "trt_profile_max_shapes": "input_ids:16x512,attention_mask:16x512",
    }
    assert host.options[-1] == [(TENSORRT, options)]
    facts = session.facts()
    assert (facts["provider"], facts["precision"]) == (TENSORRT, "fp16")
    assert "fallback" not in facts
    session.close()


def test_texts_and_logits_are_bound_to_the_gpu(built_tiny, host, monkeypatch):
    session = open_session(built_tiny.path("onnx-std"), "onnx", PLACE)
    logits = session.run(batch(3, 9))
    session.resident(batch(3, 9))()
    assert set(host.devices) == {("cuda", 1)}
    monkeypatch.undo()
    on_cpu = open_session(built_tiny.path("onnx-std"), "onnx", Place("cpu", 1))
    assert np.abs(logits - on_cpu.run(batch(3, 9))).max() < 1e-5


def test_an_engine_that_tensorrt_cannot_build_is_refused_with_the_cause(built_tiny, host, monkeypatch):
    def refuse(*_, **__):
        raise state.EPFail("TensorRT EP failed to create engine from network.")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(ProviderError, match=r"cannot build an engine of .*: TensorRT EP failed") as error:
        open_session(built_tiny.path("onnx-std"), "onnx", PLACE)
    assert "onnx-fp16" in error.value.hint


def test_without_the_libraries_of_tensorrt_the_session_is_refused(built_tiny, host, monkeypatch):
    # ONNX Runtime then runs the session on CUDA.
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(host, "get_providers", lambda self: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=f"could not start {TENSORRT} and uses CUDAExecutionProvider") as error:
        open_session(built_tiny.path("onnx-std"), "onnx", PLACE)
    assert "--provider tensorrt" in error.value.hint


def test_operators_outside_the_engine_are_refused_even_if_a_fallback_is_allowed(built_tiny, host):
    host.cpu_operators = ("LayerNormalization",)
    with pytest.raises(ProviderError, match=f"{TENSORRT} has no kernel for 1 LayerNormalization"):
        open_session(built_tiny.path("onnx-std"), "onnx", Place("tensorrt", 1, allow_fallback=True))


def test_a_folder_without_a_manifest_is_refused(built_tiny, host, tmp_path):
    (tmp_path / "model.onnx").write_bytes((built_tiny.path("onnx-std") / "model.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"has no manifest.json"):
        open_session(tmp_path, "onnx", PLACE)


@pytest.mark.skipif(TENSORRT in ort.get_available_providers(), reason="this ONNX Runtime supports TensorRT")
def test_onnx_runtime_without_tensorrt_is_refused(built_tiny):
    with pytest.raises(ProviderError, match=f"installed without {TENSORRT}"):
        open_session(built_tiny.path("onnx-std"), "onnx", PLACE)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-gpu")
def test_an_engine_on_a_gpu_gives_the_logits_of_the_cpu(built_tiny):
    pytest.importorskip("tensorrt")
    path = built_tiny.path("onnx-std")
    engine = open_session(path, "onnx", Place("tensorrt", 1, batch_size=4))
    on_cpu = open_session(path, "onnx", Place("cpu", 1))
    for rows, tokens in ((1, 3), (1, 65), (4, 9)):
        assert np.abs(engine.run(batch(rows, tokens)) - on_cpu.run(batch(rows, tokens))).max() < 5e-2
