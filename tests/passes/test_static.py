"""Tests of static int8: ranges from training sentences, exact smoothing, and logits independent of the batch."""

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
from toolchain.backends.ort import OrtSession, session_options
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


def logits_of(model, batch):
    return session(model).run(None, batch)[0]


def graph(workspace, variant):
    return passes.read(workspace.path(variant) / "model.onnx")


@pytest.fixture(scope="module")
def calibrated_contexts(built_tiny):
    """Maps each parent of a static variant to a `passes.Context` with the calibrated activations of this parent."""
    return {
        parent: dataclasses.replace(ATTENTION, activations=calibrate(built_tiny.load(parent), TrainingSource()))
        for parent in ("onnx-fp32", "onnx-std")
    }


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("parent", ["onnx-fp32", "onnx-std"])
def test_smoothing_keeps_the_logits(built_tiny, parent, left):
    """Divides each input of a linear layer by factors from 1/30 to 30.

    Smoothing does not change a residual connection that reads the same value as a linear layer.
    """
    model, batch = graph(built_tiny, parent), pad(ROWS, NAMES, 0, left)
    expected = logits_of(model, batch)
    rng = np.random.default_rng(0)
    activations = {
        name: Activation(1.0, 0, (30 ** rng.uniform(-1, 1, len(weight))).astype(np.float32))
        for name, weight in weights_of(model).items()
    }
    model, counts = passes.rewrite(model, ["smooth"], dataclasses.replace(ATTENTION, activations=activations))
    values = len(activations)  # query, key and value share an input, except the last layer's query in onnx-fp32
    assert values == {"onnx-fp32": 10, "onnx-std": 9}[parent]
    assert counts == {"smooth": values}
    assert len([name for name in weights_of(model) if name.endswith(SMOOTHED)]) == values
    assert np.abs(logits_of(model, batch) - expected).max() < 1e-4


def test_a_layer_kept_in_fp32_is_not_smoothed(built_tiny):
    model = graph(built_tiny, "onnx-fp32")
    factors = {name: Activation(1.0, 0, np.full(len(w), 2, np.float32)) for name, w in weights_of(model).items()}
    context = dataclasses.replace(ATTENTION, activations=factors, keep=frozenset({"pre_classifier"}))
    assert passes.rewrite(model, ["smooth"], context)[1] == {"smooth": 9}


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
def test_a_static_graph_has_one_qattention_and_ten_quantised_inputs(built_tiny, calibrated_contexts, left):
    batch = pad(ROWS, NAMES, 0, left)
    model = graph(built_tiny, "onnx-fp32")
    expected = logits_of(model, batch)
    model, counts = passes.rewrite(model, ["smooth", "quantize-linear-static"], calibrated_contexts["onnx-fp32"])
    assert counts["quantize-linear-static"] == 10
    facts = passes.facts(model)
    counts_by_operator = facts["operators"]
    # The first layer has four quantised matrix products: the packed projections of the attention, `out`, `up` and
    # `down`. The last layer has five quantised matrix products, namely `query`, `key` with `value`, `out`, `up` and
    # `down`. The tenth quantised matrix product of the model is `pre_classifier`.
    assert (
        counts_by_operator["QuantizeLinear"],
        counts_by_operator["MatMulIntegerToFloat"],
        counts_by_operator["QAttention"],
    ) == (10, 9, 1)
    assert not {"Attention", "MatMul"} & set(counts_by_operator)
    assert 0.5 <= facts["int8_headroom"] < 1
    assert np.abs(logits_of(model, batch) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
def test_onnx_runtime_fuses_the_qdq_nodes_into_int8_products(built_tiny, calibrated_contexts, left, tmp_path):
    batch = pad(ROWS, NAMES, 0, left)
    model = graph(built_tiny, "onnx-std")
    expected = logits_of(model, batch)
    model, counts = passes.rewrite(model, ["smooth", "quantize-linear-std-static"], calibrated_contexts["onnx-std"])
    assert counts["quantize-linear-std-static"] == 13
    facts = passes.facts(model)
    assert {node.domain for node in model.graph} == {""}
    assert (facts["operators"]["QuantizeLinear"], facts["operators"]["DequantizeLinear"]) == (9, 26)
    assert 0.5 <= facts["int8_headroom"] < 1
    assert np.abs(logits_of(model, batch) - expected).max() < 0.1 * np.abs(expected).max()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    loaded_operators = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]
    assert loaded_operators.count("MatMulIntegerToFloat") == 13
    assert "DequantizeLinear" not in loaded_operators


@pytest.mark.slow
def test_static_logits_do_not_depend_on_the_rest_of_the_batch(built_tiny, calibrated_contexts):
    """A dynamic scale is computed over the whole batch, so a row's logits depend on the other rows of the batch."""
    row, short_row, rare_row = [101, 2023, 2003, 102], [101, 102], [101, 30000, 29999, 102]
    static_model, _ = passes.rewrite(
        graph(built_tiny, "onnx-fp32"), ["smooth", "quantize-linear-static"], calibrated_contexts["onnx-fp32"]
    )
    differences = {}
    for name, model in (("static", static_model), ("dynamic", graph(built_tiny, "onnx-int8"))):
        model_session = session(model)
        # In a batch with `rare_row * 20`, which has 80 tokens, `row` is padded to 80 tokens.
        other_rows = ([short_row], [rare_row] * 3, [rare_row * 20])
        logits = [model_session.run(None, pad([row, *rows], NAMES, 0))[0][0] for rows in other_rows]
        differences[name] = np.ptp(logits, axis=0).max()
    assert differences["static"] < 1e-5 < differences["dynamic"]


def test_a_layer_without_calibration_raises_a_graph_error(built_tiny):
    with pytest.raises(GraphError, match="has no calibrated scale"):
        passes.rewrite(graph(built_tiny, "onnx-fp32"), ["quantize-linear-static"], ATTENTION)


arrays = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-100, 100, width=32))


@given(arrays)
def test_fake_quantisation_is_within_a_step_and_exact_at_zero(values):
    activation = Activation.from_range(float(values.min()), float(values.max()))
    assert 0 <= activation.zero_point <= 255
    assert (activation.fake_quantize(np.zeros(3, np.float32)) == 0).all()
    assert (np.abs(activation.fake_quantize(values) - values) <= activation.scale * 1.01).all()


def statistics_of(tokens):
    return ValueStatistics(tokens.min(axis=0), tokens.max(axis=0), tokens)


def test_only_a_channel_far_larger_than_the_others_is_smoothed():
    rng = np.random.default_rng(0)
    tokens, weight = rng.normal(size=(200, 32)).astype(np.float32), rng.normal(size=(32, 16)).astype(np.float32)
    even_statistics = statistics_of(tokens)
    assert choose_activation(even_statistics, weight).smooth is None
    outlier_tokens = tokens.copy()
    outlier_tokens[:, 3] *= 200
    weight[3] /= 200
    smoothed = choose_activation(statistics_of(outlier_tokens), weight)
    unsmoothed = Activation.from_range(float(outlier_tokens.min()), float(outlier_tokens.max()))
    assert smoothed.smooth.argmax() == 3
    noise_before, noise_after = (
        calibration._noise(activation, outlier_tokens, weight) for activation in (unsmoothed, smoothed)
    )
    assert noise_after < NOISE < noise_before


@given(arrays, st.sampled_from(calibration.STRENGTHS))
def test_smoothing_factors_are_positive_and_1_for_a_zero_channel(values, strength):
    largest = np.abs(values)
    factors = smoothing_factors(largest, np.ones_like(largest), strength)
    assert factors.dtype == np.float32
    assert (factors > 0).all()
    assert np.isfinite(factors).all()
    assert (factors[largest == 0] == 1).all()


@pytest.mark.slow
def test_calibration_uses_single_sentences_and_no_held_out_rows(built_tiny, monkeypatch):
    batches = []

    def record(session, batch):
        batches.append(batch["input_ids"])
        return outputs(session, batch)

    outputs = OrtSession.outputs
    monkeypatch.setattr(OrtSession, "outputs", record)
    artifact = built_tiny.load("onnx-fp32")
    first_result = calibrate(artifact, TrainingSource())
    assert len(batches) == SENTENCES
    assert {ids.shape[0] for ids in batches} == {1}
    data = inputs.load_embedded("train")
    encoder = encoding.Encoder.open(artifact.path, NAMES, artifact.manifest.max_length)
    held_out_rows = {tuple(row) for row in encoder.encode([data.texts[row] for row in inputs.hold_out(data)[1]])}
    assert not held_out_rows & {tuple(ids[0]) for ids in batches}
    second_result = calibrate(artifact, TrainingSource())
    assert {name: (activation.scale, activation.zero_point) for name, activation in first_result.items()} == {
        name: (activation.scale, activation.zero_point) for name, activation in second_result.items()
    }


@pytest.mark.slow
def test_static_variants_record_their_training_data(tiny):
    steps = {"onnx-int8-static+careful": Quantize(scheme="static", keep_fp32=2)}
    artifacts = ensure(tiny, ["onnx-int8-static", "onnx-std-int8-static", *steps], steps, quiet)
    manifest, standard_manifest, kept_manifest = (
        artifacts[name].manifest for name in ("onnx-int8-static", "onnx-std-int8-static", "onnx-int8-static+careful")
    )
    assert manifest.step == Quantize(scheme="static", train=tiny.train.digest)
    assert manifest.facts["rewrites"]["quantize-linear-static"] == 10
    assert standard_manifest.facts["rewrites"]["quantize-linear-std-static"] == 13
    assert kept_manifest.facts["rewrites"]["quantize-linear-static"] == 8
    assert len(kept_manifest.facts["kept_fp32"]) == 2
    events = []
    ensure(tiny, ["onnx-int8-static"], {}, lambda event: events.append(str(event)))
    assert "onnx-int8-static: fresh, skipped" in events


@pytest.mark.slow
def test_without_smoothing_scales_come_from_the_original_values(tiny, monkeypatch):
    # Calibration tries to smooth the input of a layer only if the quantisation error of the layer is at least NOISE.
    # With NOISE = 0, calibration tries to smooth the input of every layer.
    monkeypatch.setattr(calibration, "NOISE", 0.0)
    steps = {"onnx-int8-static+rough": Quantize(scheme="static", passes=("quantize-linear",))}
    artifacts = ensure(tiny, ["onnx-int8-static", *steps], steps, quiet)
    assert artifacts["onnx-int8-static"].manifest.facts["rewrites"]["smooth"] > 0
    assert "smooth" not in artifacts["onnx-int8-static+rough"].manifest.facts["rewrites"]
    monkeypatch.setattr(calibration, "NOISE", np.inf)
    activations = calibrate(tiny.load("onnx-fp32"), tiny.train)
    initializers = graph(tiny, "onnx-int8-static+rough").graph.initializers
    scales = {name: float(initializers[f"{name}/scale"].const_value.numpy()) for name in activations}
    assert scales == {name: pytest.approx(activation.scale) for name, activation in activations.items()}
