"""Sessions: the same logits from both runtimes, and no run on another provider than asked."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from toolchain import inputs
from toolchain.backends import Place, open_session
from toolchain.errors import GraphError, ProviderError

NAMES = ("input_ids", "attention_mask")
BATCH = inputs.pad([[101, 2023, 102], [101, 102]], NAMES, 0)


@pytest.mark.parametrize(("variant", "runtime"), [("torch-fp32", "torch"), ("onnx-std", "onnx"), ("onnx-int8", "onnx")])
def test_a_session_gives_float32_logits_on_the_host(built_tiny, variant, runtime):
    session = open_session(built_tiny.path(variant), runtime, Place("cpu", 1))
    logits = session.run(BATCH)
    assert (logits.shape, logits.dtype) == ((2, 2), np.float32)
    assert session.facts()["threads"] == 1
    assert session.facts()["provider"].lower().startswith("cpu")
    session.close()


def test_both_runtimes_agree(built_tiny):
    one, other = (
        open_session(built_tiny.path(v), v.partition("-")[0], Place("cpu", 1)).run(BATCH)
        for v in ("torch-fp32", "onnx-fp32")
    )
    assert np.abs(one - other).max() < 1e-4


def test_cuda_without_a_device_is_refused_in_words(built_tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"PyTorch .* is "):
        open_session(built_tiny.path("torch-fp32"), "torch", Place("cuda", 1))
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cuda", 1))


def test_a_fallback_that_only_a_log_line_tells_of_is_an_error(built_tiny, monkeypatch):
    """onnxruntime-gpu without a device lists CUDA as available, and gives a session that runs on the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    real = ort.InferenceSession

    def lying(path, options, providers):
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", lying)
    with pytest.raises(ProviderError, match="asked for CUDAExecutionProvider and fell back to CPUExecutionProvider"):
        open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cuda", 1))


def test_a_graph_that_fails_on_a_batch_says_on_which(built_tiny):
    session = open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cpu", 1))
    with pytest.raises(GraphError, match="fails on a batch of 1 × 600 tokens"):
        session.run(inputs.pad([[5] * 600], NAMES, 0))  # more positions than the model has


@pytest.mark.parametrize("content", [b"", b"no graph"])
def test_a_file_that_is_no_model_is_an_error_in_words(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(GraphError, match="no model ONNX Runtime can load"):
        open_session(tmp_path, "onnx", Place("cpu", 1))


def test_a_missing_file_is_an_error_in_words(tmp_path):
    with pytest.raises(GraphError, match="no model ONNX Runtime can load"):
        open_session(tmp_path, "onnx", Place("cpu", 1))
