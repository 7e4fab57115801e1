"""Tests of the sensitivity of layers to quantisation, and of the choice of layers that stay in fp32."""

import shutil

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from toolchain import passes
from toolchain.artifacts.steps import Quantize
from toolchain.artifacts.store import Artifact
from toolchain.build.pipeline import ensure
from toolchain.data.inputs import TrainingSource
from toolchain.errors import GraphError
from toolchain.quantization import sensitivity
from toolchain.quantization.sensitivity import Layer, SensitivitySetup, fewest_fp32_layers, rank


def no_progress(done, total, label):
    pass


def quiet(line):
    pass


@pytest.fixture(scope="module")
def setup(built_tiny):
    return SensitivitySetup.load(built_tiny.load("onnx-fp32"), ("quantize-linear",), TrainingSource())


def test_rank_sorts_all_layers_by_divergence(setup):
    ranking = rank(setup, no_progress)
    assert sorted(layer.name for layer in ranking) == sorted(setup.layers)
    assert "distilbert/transformer/layer.1/ffn/lin1" in setup.layers
    assert "pre_classifier" in setup.layers
    assert [layer.divergence for layer in ranking] == sorted((layer.divergence for layer in ranking), reverse=True)
    assert ranking[0].divergence > 0
    assert rank(setup, no_progress) == ranking


@pytest.mark.slow
def test_a_layer_with_outliers_ranks_first(built_tiny, tmp_path):
    """One row of the weight matrix is 3,000 times as large as the other rows, so int8 rounds the other rows to zero."""
    shutil.copytree(built_tiny.path("onnx-fp32"), tmp_path / "outliers")
    model = onnx.load(tmp_path / "outliers" / "model.onnx")
    node = next(node for node in model.graph.node if node.name.endswith("layer.0/ffn/lin2/MatMul"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    array = numpy_helper.to_array(weight).copy()
    array[0] = 3000 * np.abs(array).max() * np.sign(array[0])
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "outliers" / "model.onnx")
    artifact = Artifact(tmp_path / "outliers", built_tiny.load("onnx-fp32").manifest)
    ranking = rank(SensitivitySetup.load(artifact, ("quantize-linear",), TrainingSource()), no_progress)
    assert ranking[0].name == "distilbert/transformer/layer.0/ffn/lin2"


@pytest.mark.slow
def test_the_most_sensitive_layers_stay_fp32(tiny, setup):
    steps = {"onnx-int8+careful": Quantize(keep_fp32=2)}
    manifest = ensure(tiny, steps, steps, quiet)["onnx-int8+careful"].manifest
    assert manifest.facts["rewrites"]["quantize-linear"] == 8
    assert manifest.facts["kept_fp32"] == [layer.name for layer in rank(setup, no_progress)[:2]]
    assert len(manifest.facts["sensitivity"]) == 10
    assert manifest.step.train == tiny.train.digest  # The sensitivity ranking depends on the training data.
    events = []
    ensure(tiny, ["onnx-int8+careful"], steps, lambda event: events.append(str(event)))
    assert "onnx-int8+careful: fresh, skipped" in events
    model = passes.read(tiny.path("onnx-int8+careful") / "model.onnx")
    assert len([n for n in model.graph if n.op_type in ("MatMul", "Attention")]) == 2


@pytest.mark.slow
def test_a_graph_without_linear_layers_raises_a_graph_error(built_tiny):
    with pytest.raises(GraphError, match="no linear layer left"):
        rank(SensitivitySetup.load(built_tiny.load("onnx-int8"), ("quantize-linear",), TrainingSource()), no_progress)


@given(st.integers(1, 30), st.data())
def test_fewest_fp32_layers_finds_the_smallest_number_within_the_drop(count, data):
    """Compares `fewest_fp32_layers` with a trial of every number of fp32 layers.

    In this test, more fp32 layers never lower the accuracy, so bisection and the full trial must agree.
    """
    drops = sorted((data.draw(st.floats(0, 5)) for _ in range(count)), reverse=True)
    max_drop = data.draw(st.floats(0, 5))

    class Fake:
        def __init__(self):
            self.kept = None

        def session(self, keep):
            self.kept = len(keep)
            import contextlib

            return contextlib.nullcontext()

    fake_setup = Fake()
    context = pytest.MonkeyPatch.context()
    with context as patch:
        patch.setattr(sensitivity, "rank", lambda *_: [Layer(str(i), 1.0, 0) for i in range(count)])
        patch.setattr(
            sensitivity, "_score", lambda setup, _: 1 - (drops[setup.kept] if setup.kept < count else 0) / 100
        )
        count_kept, trials = fewest_fp32_layers(fake_setup, max_drop, no_progress)
    expected = next((n for n in range(count) if 100 * (1 - (1 - drops[n] / 100)) <= max_drop), count)
    assert count_kept == expected
    assert len(trials) <= count.bit_length() + 1
