"""Accuracy of the reference on the whole validation set."""

import numpy as np
import pytest

from toolchain.backends import Place, open_session
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers(reference):
    """Variant → logits of every validation sentence, one by one."""
    data = inputs.load_embedded()
    manifest = reference.load("torch-fp32").manifest
    names = [spec.name for spec in manifest.inputs]
    encoder = Encoder.open(reference.path("torch-fp32"), names, manifest.max_length)
    ids = encoder.encode(data.texts)
    found = {}
    for variant in ("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"):
        session = open_session(reference.path(variant), variant.partition("-")[0], Place("cpu", 2))
        found[variant] = np.concatenate([session.run(pad([row], names, encoder.pad_id)) for row in ids])
    return found, np.array(data.labels)


def test_fp32_has_the_checkpoints_accuracy_in_both_runtimes(answers):
    logits, labels = answers
    for variant in ("torch-fp32", "onnx-std", "onnx-fp32"):
        assert int((logits[variant].argmax(1) == labels).sum()) == 789, variant  # 0.9048 of 872
    for variant in ("onnx-std", "onnx-fp32"):
        assert np.abs(logits[variant] - logits["torch-fp32"]).max() <= 1e-4


def test_int8_is_within_a_point_and_flips_few(answers):
    logits, labels = answers
    right = (logits["onnx-int8"].argmax(1) == labels).mean()
    assert right >= 789 / 872 - 0.01
    assert (logits["onnx-int8"].argmax(1) != logits["torch-fp32"].argmax(1)).mean() <= 0.02


def test_the_grid_passed_left_padding_included(reference):
    for variant in ("onnx-std", "onnx-fp32"):
        grid = reference.load(variant).manifest.validation["grid_largest_delta"]
        assert max(grid.values()) <= 1e-4
        assert {name for name in grid if "left padding" in name}
    assert reference.load("onnx-int8").manifest.validation["flips"] <= 4


def test_sizes(reference):
    assert reference.load("onnx-int8").manifest.size_bytes < 25e6
    assert reference.load("torch-fp32").manifest.facts["parameters"] == 22_713_218
    parts = reference.load("onnx-int8").manifest.facts["bytes_by_part"]
    assert parts["encoder"] < 11e6
    assert sum(f.bytes for f in reference.load("onnx-fp32").manifest.files if f.path.endswith(".onnx")) > 90e6


def test_every_pass_did_what_it_is_for(reference):
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
