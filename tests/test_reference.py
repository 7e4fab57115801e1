"""Tests of the reference model on the whole validation set."""

import numpy as np
import pytest

from toolchain.backends import Place, open_session
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def logits_and_labels(reference):
    """Returns each variant's logits for all validation sentences, computed one sentence at a time, and the labels."""
    data = inputs.load_embedded()
    manifest = reference.load("torch-fp32").manifest
    names = [spec.name for spec in manifest.inputs]
    encoder = Encoder.open(reference.path("torch-fp32"), names, manifest.max_length)
    ids = encoder.encode(data.texts)
    logits = {}
    for variant in ("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"):
        session = open_session(reference.path(variant), variant.partition("-")[0], Place("cpu", 2))
        logits[variant] = np.concatenate([session.run(pad([row], names, encoder.pad_id)) for row in ids])
    return logits, np.array(data.labels)


def test_both_runtimes_give_the_accuracy_of_the_checkpoint(logits_and_labels):
    logits, labels = logits_and_labels
    for variant in ("torch-fp32", "onnx-std", "onnx-fp32"):
        assert int((logits[variant].argmax(1) == labels).sum()) == 789, variant  # accuracy 0.9048 on 872 sentences
    for variant in ("onnx-std", "onnx-fp32"):
        assert np.abs(logits[variant] - logits["torch-fp32"]).max() <= 1e-4


def test_int8_loses_at_most_a_point_and_flips_few_labels(logits_and_labels):
    logits, labels = logits_and_labels
    accuracy = (logits["onnx-int8"].argmax(1) == labels).mean()
    assert accuracy >= 789 / 872 - 0.01
    assert (logits["onnx-int8"].argmax(1) != logits["torch-fp32"].argmax(1)).mean() <= 0.02


def test_the_validation_grid_passed_with_left_padding(reference):
    for variant in ("onnx-std", "onnx-fp32"):
        grid = reference.load(variant).manifest.validation["grid_largest_delta"]
        assert max(grid.values()) <= 1e-4
        assert {name for name in grid if "left padding" in name}
    assert reference.load("onnx-int8").manifest.validation["flips"] <= 4


def test_the_variants_have_the_expected_sizes(reference):
    assert reference.load("onnx-int8").manifest.size_bytes < 25e6
    assert reference.load("torch-fp32").manifest.facts["parameters"] == 22_713_218
    parts = reference.load("onnx-int8").manifest.facts["bytes_by_part"]
    assert parts["encoder"] < 11e6
    assert sum(f.bytes for f in reference.load("onnx-fp32").manifest.files if f.path.endswith(".onnx")) > 90e6


def test_every_pass_rewrote_the_expected_number_of_nodes(reference):
    assert reference.load("onnx-fp32").manifest.facts["rewrites"] == {
        "fuse": 12,
        "residual-sum": 13,
        "first-token": 11,
        "first-query": 1,
    }
    assert reference.load("onnx-int8").manifest.facts["rewrites"] == {
        "padding": 1,
        "quantize-linear": 26,
        "quantize-embedding": 2,
    }
