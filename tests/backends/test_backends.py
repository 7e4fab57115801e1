"""Tests of sessions: both runtimes give the same logits, and no session runs on another provider than requested."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from toolchain.backends import Place, open_session
from toolchain.backends import ort as ort_backend
from toolchain.backends.ort import EXACT_PRODUCTS, session_options
from toolchain.data import encoding
from toolchain.errors import GraphError, ProviderError

NAMES = ("input_ids", "attention_mask")
BATCH = encoding.pad([[101, 2023, 102], [101, 102]], NAMES, 0)


@pytest.mark.parametrize(("variant", "runtime"), [("torch-fp32", "torch"), ("onnx-std", "onnx"), ("onnx-int8", "onnx")])
def test_a_session_gives_float32_logits_on_the_host(built_tiny, variant, runtime):
    session = open_session(built_tiny.path(variant), runtime, Place("cpu", 1))
    logits = session.run(BATCH)
    assert (logits.shape, logits.dtype) == ((2, 2), np.float32)
    assert session.facts()["threads"] == 1
    assert session.facts()["provider"].lower().startswith("cpu")
    session.close()


def test_both_runtimes_agree(built_tiny):
    torch_logits, onnx_logits = (
        open_session(built_tiny.path(v), v.partition("-")[0], Place("cpu", 1)).run(BATCH)
        for v in ("torch-fp32", "onnx-fp32")
    )
    assert np.abs(torch_logits - onnx_logits).max() < 1e-4


def test_cuda_without_a_device_raises_a_provider_error(built_tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"PyTorch .* is "):
        open_session(built_tiny.path("torch-fp32"), "torch", Place("cuda", 1))
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cuda", 1))


def test_a_session_that_silently_falls_back_to_the_cpu_raises_a_provider_error(built_tiny, monkeypatch):
    """Without a GPU, onnxruntime-gpu lists CUDA as available, but its session runs on the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    real = ort.InferenceSession

    def cpu_session(path, options, providers):
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", cpu_session)
    with pytest.raises(
        ProviderError, match="could not start CUDAExecutionProvider and uses CPUExecutionProvider instead"
    ):
        open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cuda", 1))


def test_a_failed_run_gives_an_error_with_the_size_of_the_batch(built_tiny):
    session = open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cpu", 1))
    with pytest.raises(GraphError, match="fails on a batch of 1 × 600 tokens"):
        session.run(encoding.pad([[5] * 600], NAMES, 0))  # the model has only 512 positions


@pytest.mark.parametrize("content", [b"", b"no graph"])
def test_a_file_without_a_model_raises_a_graph_error(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(GraphError, match="ONNX Runtime cannot load"):
        open_session(tmp_path, "onnx", Place("cpu", 1))


def test_a_missing_file_raises_a_graph_error(tmp_path):
    with pytest.raises(GraphError, match="ONNX Runtime cannot load"):
        open_session(tmp_path, "onnx", Place("cpu", 1))


# --- 8-bit products


@pytest.fixture
def saturating(monkeypatch):
    """Makes the toolchain treat this processor as one without VNNI, so that sessions need `session.x64quantprecision`.

    The fixture does not change ONNX Runtime, which uses the kernels of the real processor.
    """
    monkeypatch.setattr(ort_backend, "saturates", lambda exact=False: not exact)


def integer_products(options):
    """Returns ONNX Runtime's U8 × S8 product and the exact product; weights and activations are extreme values."""
    rng = np.random.default_rng(5)
    weights = rng.choice([-127, 127], (64, 48)).astype(np.int8)
    activations = rng.choice([0, 255], (7, 64)).astype(np.uint8)
    initializers = {"w": weights, "z": np.array(0, np.uint8), "wz": np.array(0, np.int8)}
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "w", "z", "wz"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [7, 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [7, 48])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"a": activations})[0], activations.astype(np.int32) @ weights.astype(np.int32)


def test_products_are_exact_with_the_option_and_saturate_without_it_where_the_probe_says_so():
    products, exact_products = integer_products(session_options(1))
    assert np.array_equal(products, exact_products)
    products, exact_products = integer_products(session_options(1, exact=False))
    assert np.array_equal(products, exact_products) != ort_backend.saturates()


def test_the_option_is_set_only_where_products_saturate(monkeypatch):
    """If products are exact without `session.x64quantprecision`, this option would only make int8 slower."""
    key, value = EXACT_PRODUCTS
    for saturates in (False, True):
        monkeypatch.setattr(ort_backend, "saturates", lambda exact=False, answer=saturates: answer)
        options = session_options(1)
        setting = options.get_session_config_entry(key) if saturates else None
        assert setting == (value if saturates else None)
        if not saturates:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry(key)
        with pytest.raises(RuntimeError):
            session_options(1, exact=False).get_session_config_entry(key)


def test_a_session_with_the_option_gives_the_same_logits_and_states_the_option(built_tiny, monkeypatch):
    plain_session = open_session(built_tiny.path("onnx-int8"), "onnx", Place("cpu", 1))
    plain_logits = plain_session.run(BATCH)
    assert "option" not in plain_session.facts() or ort_backend.saturates()
    monkeypatch.setattr(ort_backend, "saturates", lambda exact=False: not exact)
    session = open_session(built_tiny.path("onnx-int8"), "onnx", Place("cpu", 1))
    assert np.abs(session.run(BATCH) - plain_logits).max() < 1e-5
    assert session.facts()["option"] == EXACT_PRODUCTS


@pytest.mark.usefixtures("saturating")
def test_a_graph_whose_layers_share_weights_loads_with_the_option(tmp_path):
    """ONNX Runtime 1.32 cannot convert weights to unsigned if two products read the same weights."""
    rng = np.random.default_rng(3)
    initializers = {
        "w": rng.integers(-127, 128, (8, 8)).astype(np.int8),
        "s": np.full(8, 0.01, np.float32),
        "z": np.zeros(8, np.int8),
    }
    batch = {"input_ids": np.arange(16).reshape(2, 8)}
    logits = []
    for suffix in ("", "_of_its_own"):
        nodes = [
            helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["h"], domain="com.microsoft"),
            helper.make_node(
                "DynamicQuantizeMatMul", ["h", f"w{suffix}", "s", f"z{suffix}"], ["logits"], domain="com.microsoft"
            ),
        ]
        weights = {**initializers, f"w{suffix}": initializers["w"], f"z{suffix}": initializers["z"]}
        graph = helper.make_graph(
            nodes,
            "layers",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8])],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
        logits.append(open_session(tmp_path, "onnx", Place("cpu", 1)).run(batch))
    shared_logits, separate_logits = logits
    assert np.abs(shared_logits - separate_logits).max() < 1e-5
