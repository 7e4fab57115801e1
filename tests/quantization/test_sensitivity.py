"""The sensitivity of layers to fewer bits, and the choice of layers kept in fp32."""

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


def still(done, total, what):
    pass


def quiet(line):
    pass


@pytest.fixture(scope="module")
def subject(built_tiny):
    return SensitivitySetup.load(built_tiny.load("onnx-fp32"), ("quantize-linear",), TrainingSource())


def test_every_layer_is_ranked_by_what_it_does_alone(subject):
    ranked = rank(subject, still)
    assert sorted(layer.name for layer in ranked) == sorted(subject.layers)
    assert "distilbert/transformer/layer.1/ffn/lin1" in subject.layers
    assert "pre_classifier" in subject.layers
    assert [layer.divergence for layer in ranked] == sorted((layer.divergence for layer in ranked), reverse=True)
    assert ranked[0].divergence > 0
    assert rank(subject, still) == ranked


@pytest.mark.slow
def test_a_layer_with_outliers_is_found(built_tiny, tmp_path):
    """One weight of 3,000 times the others takes the whole range of its column."""
    shutil.copytree(built_tiny.path("onnx-fp32"), tmp_path / "outliers")
    model = onnx.load(tmp_path / "outliers" / "model.onnx")
    node = next(node for node in model.graph.node if node.name.endswith("layer.0/ffn/lin2/MatMul"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    array = numpy_helper.to_array(weight).copy()
    array[0] = 3000 * np.abs(array).max() * np.sign(array[0])
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "outliers" / "model.onnx")
    artifact = Artifact(tmp_path / "outliers", built_tiny.load("onnx-fp32").manifest)
    ranked = rank(SensitivitySetup.load(artifact, ("quantize-linear",), TrainingSource()), still)
    assert ranked[0].name == "distilbert/transformer/layer.0/ffn/lin2"


@pytest.mark.slow
def test_the_most_sensitive_stay_fp32(tiny, subject):
    asked = {"onnx-int8+careful": Quantize(keep_fp32=2)}
    manifest = ensure(tiny, asked, asked, quiet)["onnx-int8+careful"].manifest
    assert manifest.facts["rewrites"]["quantize-linear"] == 8
    assert manifest.facts["kept_fp32"] == [layer.name for layer in rank(subject, still)[:2]]
    assert len(manifest.facts["sensitivity"]) == 10
    assert manifest.step.train == tiny.train.digest  # other training data would choose other layers
    said = []
    ensure(tiny, ["onnx-int8+careful"], asked, lambda event: said.append(str(event)))
    assert "onnx-int8+careful: fresh, skipped" in said
    left = passes.read(tiny.path("onnx-int8+careful") / "model.onnx")
    assert len([n for n in left.graph if n.op_type in ("MatMul", "Attention")]) == 2


@pytest.mark.slow
def test_no_layer_left_is_told(built_tiny):
    with pytest.raises(GraphError, match="no linear layer left"):
        rank(SensitivitySetup.load(built_tiny.load("onnx-int8"), ("quantize-linear",), TrainingSource()), still)


@given(st.integers(1, 30), st.data())
def test_the_fewest_that_keep_the_accuracy_are_found(count, data):
    """Where keeping more never costs accuracy: the answer of trying every number."""
    drops = sorted((data.draw(st.floats(0, 5)) for _ in range(count)), reverse=True)
    allowed = data.draw(st.floats(0, 5))

    class Fake:
        def __init__(self):
            self.kept = None

        def session(self, keep):
            self.kept = len(keep)
            import contextlib

            return contextlib.nullcontext()

    fake = Fake()
    context = pytest.MonkeyPatch.context()
    with context as patch:
        patch.setattr(sensitivity, "rank", lambda *_: [Layer(str(i), 1.0, 0) for i in range(count)])
        patch.setattr(
            sensitivity, "_accuracy", lambda subject, _: 1 - (drops[subject.kept] if subject.kept < count else 0) / 100
        )
        kept, tried = fewest_fp32_layers(fake, allowed, still)
    want = next((n for n in range(count) if 100 * (1 - (1 - drops[n] / 100)) <= allowed), count)
    assert kept == want
    assert len(tried) <= count.bit_length() + 1
