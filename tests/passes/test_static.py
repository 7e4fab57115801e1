"""Static int8: ranges from training sentences, exact smoothing, answers that do not depend on the rest of the batch."""

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from toolchain import passes
from toolchain.artifacts.steps import Quantize
from toolchain.backends.ort import session_options
from toolchain.build.pipeline import ensure
from toolchain.data import encoding, inputs
from toolchain.data.encoding import pad
from toolchain.data.inputs import TrainingSource
from toolchain.errors import GraphError
from toolchain.passes.quantize_linear import weights_of
from toolchain.passes.quantize_static import SMOOTHED, Activation
from toolchain.quantization import calibration
from toolchain.quantization.calibration import (
    NOISE,
    SENTENCES,
    ValueStatistics,
    calibrate,
    choose_activation,
    smoothing_factors,
)

ATTENTION = passes.Context(heads=4, width=32)
NAMES = ("input_ids", "attention_mask")
ROWS = [[101, 2023, 102], [101] + [2000 + i for i in range(23)] + [102], [101]]


def quiet(line):
    pass


def session(model):
    content = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, session_options(1), providers=["CPUExecutionProvider"])


def answer(model, batch):
    return session(model).run(None, batch)[0]


def graph(workspace, variant):
    return passes.read(workspace.path(variant) / "model.onnx")


@pytest.fixture(scope="module")
def calibrated(built_tiny):
    """Parent → the context its static graph is made in."""
    return {
        parent: dataclasses.replace(ATTENTION, activations=calibrate(built_tiny.load(parent), TrainingSource()))
        for parent in ("onnx-fp32", "onnx-std")
    }


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("parent", ["onnx-fp32", "onnx-std"])
def test_smoothing_changes_no_answer(built_tiny, parent, left):
    """Factors from 1/30 to 30 divide every input of a linear layer; a residual of the same value stays unscaled."""
    model, batch = graph(built_tiny, parent), pad(ROWS, NAMES, 0, left)
    want = answer(model, batch)
    rng = np.random.default_rng(0)
    given_factors = {
        name: Activation(1.0, 0, (30 ** rng.uniform(-1, 1, len(weight))).astype(np.float32))
        for name, weight in weights_of(model).items()
    }
    model, counts = passes.rewrite(model, ["smooth"], dataclasses.replace(ATTENTION, activations=given_factors))
    values = len(given_factors)  # query, key and value read one, but for the last query
    assert values == {"onnx-fp32": 10, "onnx-std": 9}[parent]
    assert counts == {"smooth": values}
    assert len([name for name in weights_of(model) if name.endswith(SMOOTHED)]) == values
    assert np.abs(answer(model, batch) - want).max() < 1e-4


def test_layers_kept_in_fp32_are_not_smoothed(built_tiny):
    model = graph(built_tiny, "onnx-fp32")
    factors = {name: Activation(1.0, 0, np.full(len(w), 2, np.float32)) for name, w in weights_of(model).items()}
    kept = dataclasses.replace(ATTENTION, activations=factors, keep=frozenset({"pre_classifier"}))
    assert passes.rewrite(model, ["smooth"], kept)[1] == {"smooth": 9}


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
def test_attention_is_one_operator_and_the_last_query_has_an_input_of_its_own(built_tiny, calibrated, left):
    batch = pad(ROWS, NAMES, 0, left)
    model = graph(built_tiny, "onnx-fp32")
    want = answer(model, batch)
    model, counts = passes.rewrite(model, ["smooth", "quantize-linear-static"], calibrated["onnx-fp32"])
    assert counts["quantize-linear-static"] == 10
    facts = passes.facts(model)
    found = facts["operators"]
    # Attention, out, up, down; query, key and value, out, up, down; pre_classifier.
    assert (found["QuantizeLinear"], found["MatMulIntegerToFloat"], found["QAttention"]) == (10, 9, 1)
    assert not {"Attention", "MatMul"} & set(found)
    assert 0.5 <= facts["int8_headroom"] < 1
    assert np.abs(answer(model, batch) - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
def test_standard_operators_are_qdq_that_onnx_runtime_makes_int8_products_of(built_tiny, calibrated, left, tmp_path):
    batch = pad(ROWS, NAMES, 0, left)
    model = graph(built_tiny, "onnx-std")
    want = answer(model, batch)
    model, counts = passes.rewrite(model, ["smooth", "quantize-linear-std-static"], calibrated["onnx-std"])
    assert counts["quantize-linear-std-static"] == 13
    facts = passes.facts(model)
    assert {node.domain for node in model.graph} == {""}
    assert (facts["operators"]["QuantizeLinear"], facts["operators"]["DequantizeLinear"]) == (9, 26)
    assert 0.5 <= facts["int8_headroom"] < 1
    assert np.abs(answer(model, batch) - want).max() < 0.1 * np.abs(want).max()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    loaded = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]
    assert loaded.count("MatMulIntegerToFloat") == 13
    assert "DequantizeLinear" not in loaded


@pytest.mark.slow
def test_answers_do_not_depend_on_batch_mates(built_tiny, calibrated):
    """Dynamic int8 takes one scale for the whole batch, so its answers do depend."""
    row, quiet_mate, loud_mate = [101, 2023, 2003, 102], [101, 102], [101, 30000, 29999, 102]
    static, _ = passes.rewrite(
        graph(built_tiny, "onnx-fp32"), ["smooth", "quantize-linear-static"], calibrated["onnx-fp32"]
    )
    moved = {}
    for name, model in (("static", static), ("dynamic", graph(built_tiny, "onnx-int8"))):
        opened = session(model)
        mates = ([quiet_mate], [loud_mate] * 3, [loud_mate * 20])  # the last pads the row to 80 tokens
        answers = [opened.run(None, pad([row, *others], NAMES, 0))[0][0] for others in mates]
        moved[name] = np.ptp(answers, axis=0).max()
    assert moved["static"] < 1e-5 < moved["dynamic"]


def test_a_layer_that_was_not_calibrated_is_told(built_tiny):
    with pytest.raises(GraphError, match="has no calibrated scale"):
        passes.rewrite(graph(built_tiny, "onnx-fp32"), ["quantize-linear-static"], ATTENTION)


arrays = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-100, 100, width=32))


@given(arrays)
def test_values_in_range_round_within_one_step_and_zero_is_exact(values):
    how = Activation.from_range(float(values.min()), float(values.max()))
    assert 0 <= how.zero_point <= 255
    assert (how.fake_quantize(np.zeros(3, np.float32)) == 0).all()
    assert (np.abs(how.fake_quantize(values) - values) <= how.scale * 1.01).all()


def seen_of(tokens):
    return ValueStatistics(tokens.min(axis=0), tokens.max(axis=0), tokens)


def test_a_channel_far_larger_than_the_rest_is_smoothed_and_others_are_not():
    rng = np.random.default_rng(0)
    tokens, weight = rng.normal(size=(200, 32)).astype(np.float32), rng.normal(size=(32, 16)).astype(np.float32)
    even = seen_of(tokens)
    assert choose_activation(even, weight).smooth is None
    outlier = tokens.copy()
    outlier[:, 3] *= 200
    weight[3] /= 200
    how = choose_activation(seen_of(outlier), weight)
    plain = Activation.from_range(float(outlier.min()), float(outlier.max()))
    assert how.smooth.argmax() == 3
    before, after = (calibration._noise(one, outlier, weight) for one in (plain, how))
    assert after < NOISE < before


@given(arrays, st.sampled_from(calibration.STRENGTHS))
def test_factors_are_positive_and_1_where_there_is_nothing_to_smooth(values, strength):
    largest = np.abs(values)
    factors = smoothing_factors(largest, np.ones_like(largest), strength)
    assert factors.dtype == np.float32
    assert (factors > 0).all()
    assert np.isfinite(factors).all()
    assert (factors[largest == 0] == 1).all()


@pytest.mark.slow
def test_calibration_sees_each_sentence_alone_and_none_that_is_held_out(built_tiny, monkeypatch):
    asked = []

    class Recording(calibration.OrtSession):
        def outputs(self, batch):
            asked.append(batch["input_ids"])
            return super().outputs(batch)

    monkeypatch.setattr(calibration, "OrtSession", Recording)
    artifact = built_tiny.load("onnx-fp32")
    first = calibrate(artifact, TrainingSource())
    assert len(asked) == SENTENCES
    assert {ids.shape[0] for ids in asked} == {1}
    data = inputs.load_embedded("train")
    encoder = encoding.Encoder.open(artifact.path, NAMES, artifact.manifest.max_length)
    held = {tuple(row) for row in encoder.encode([data.texts[row] for row in inputs.hold_out(data)[1]])}
    assert not held & {tuple(ids[0]) for ids in asked}
    again = calibrate(artifact, TrainingSource())
    assert {name: (how.scale, how.zero_point) for name, how in first.items()} == {
        name: (how.scale, how.zero_point) for name, how in again.items()
    }


@pytest.mark.slow
def test_static_variants_are_built_by_name_and_know_their_training_data(tiny):
    asked = {"onnx-int8-static+careful": Quantize(scheme="static", keep_fp32=2)}
    built = ensure(tiny, ["onnx-int8-static", "onnx-std-int8-static", *asked], asked, quiet)
    plain, standard, careful = (
        built[name].manifest for name in ("onnx-int8-static", "onnx-std-int8-static", "onnx-int8-static+careful")
    )
    assert plain.step == Quantize(scheme="static", train=tiny.train.digest)
    assert plain.facts["rewrites"]["quantize-linear-static"] == 10
    assert standard.facts["rewrites"]["quantize-linear-std-static"] == 13
    assert careful.facts["rewrites"]["quantize-linear-static"] == 8
    assert len(careful.facts["kept_fp32"]) == 2
    said = []
    ensure(tiny, ["onnx-int8-static"], {}, lambda event: said.append(str(event)))
    assert "onnx-int8-static: fresh, skipped" in said


@pytest.mark.slow
def test_without_smoothing_scales_are_of_the_values_as_they_are(tiny, monkeypatch):
    monkeypatch.setattr(calibration, "NOISE", 0.0)  # smooth everything
    asked = {"onnx-int8-static+rough": Quantize(scheme="static", passes=("quantize-linear",))}
    built = ensure(tiny, ["onnx-int8-static", *asked], asked, quiet)
    assert built["onnx-int8-static"].manifest.facts["rewrites"]["smooth"] > 0
    assert "smooth" not in built["onnx-int8-static+rough"].manifest.facts["rewrites"]
    monkeypatch.setattr(calibration, "NOISE", np.inf)
    plain = calibrate(tiny.load("onnx-fp32"), tiny.train)
    stored = graph(tiny, "onnx-int8-static+rough").graph.initializers
    scales = {name: float(stored[f"{name}/scale"].const_value.numpy()) for name in plain}
    assert scales == {name: pytest.approx(how.scale) for name, how in plain.items()}
