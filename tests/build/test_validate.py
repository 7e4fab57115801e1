"""Validation finds planted errors anywhere on the grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from toolchain.backends import Place, open_session
from toolchain.build.steps.validate import LENGTHS, allowed_flips, grid, sentence, validate
from toolchain.data.encoding import Encoder, pad
from toolchain.data.inputs import embedded

SENTENCES = embedded().texts[:50]


@pytest.fixture(scope="module")
def encoder(built_tiny):
    return Encoder.open(built_tiny.path("onnx-fp32"), ("input_ids", "attention_mask"), 512)


@pytest.fixture(scope="module")
def truth(built_tiny):
    return open_session(built_tiny.path("torch-fp32"), "torch", Place("cpu", 2))


class Wrong:
    """A session that changes the logits of another."""

    def __init__(self, session, change):
        self.run = lambda batch: change(session.run(batch), batch)


def test_the_grid_is_what_it_says(encoder):
    batches = dict(grid(encoder, SENTENCES))
    sizes = {len(batch["input_ids"]) for batch in batches.values()}
    assert sizes == {1, 2, 7}
    for length in LENGTHS:
        assert batches[f"1 × {length} tokens"]["input_ids"].shape == (1, length)
    assert batches["empty string"]["input_ids"].shape == (1, 2)
    assert batches["over-long text"]["input_ids"].shape == (1, 512)
    left, right = batches["7 mixed lengths, left padding"], batches["7 mixed lengths, right padding"]
    assert left["attention_mask"][:, -1].all()
    assert right["attention_mask"][:, 0].all()
    assert not left["attention_mask"].all()
    again = dict(grid(encoder, SENTENCES))
    assert all((again[name]["input_ids"] == batch["input_ids"]).all() for name, batch in batches.items())


def test_a_faithful_session_passes(encoder, truth, built_tiny):
    report = validate(
        open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cpu", 2)), truth, encoder, SENTENCES, "exact"
    )
    assert report["passed"]
    assert 0 < report["largest_delta"] < 1e-4
    assert report["flips"] == 0
    assert "≤ 0.0001 allowed" in sentence(report)


@pytest.mark.parametrize(
    ("change", "worst"),
    [
        (lambda out, batch: out + 2e-4, ""),
        (lambda out, batch: out + (1e-3 if not batch["attention_mask"][0, 0] else 0), "left padding"),
        (lambda out, batch: out + (1e-3 if batch["input_ids"].shape[1] == 1 else 0), "1 × 1 tokens"),
        (lambda out, batch: out + (1e-3 if batch["input_ids"].shape[1] == 512 else 0), ""),
        (lambda out, batch: out + (1e-3 if len(batch["input_ids"]) == 7 else 0), "7"),
        (lambda out, batch: np.full_like(out, np.nan), ""),
        (lambda out, batch: out[:, :1], ""),
    ],
)
def test_a_wrong_answer_anywhere_on_the_grid_fails(encoder, truth, change, worst):
    report = validate(Wrong(truth, change), truth, encoder, SENTENCES, "exact")
    assert not report["passed"]
    assert worst in report["worst_case"]


def test_fewer_bits_may_move_logits_but_not_answers(encoder, truth):
    moved = validate(Wrong(truth, lambda out, batch: out * 1.05), truth, encoder, SENTENCES, "close")
    assert moved["passed"]
    assert moved["largest_delta"] > 1e-4
    turned = validate(Wrong(truth, lambda out, batch: out[:, ::-1]), truth, encoder, SENTENCES, "close")
    assert not turned["passed"]
    assert turned["flips"] == 50
    logits = [truth.run(pad([row], encoder.names, encoder.pad_id))[0] for row in encoder.encode(SENTENCES)]
    assert turned["flip_margins"] == pytest.approx([abs(one - other) for one, other in logits], rel=1e-2)
    assert moved["flip_margins"] == []


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2000))
def test_only_what_is_hardly_chance_is_refused(sentences):
    most = allowed_flips(sentences)
    chance = [stats.binomtest(flips, sentences, 0.02, alternative="greater").pvalue for flips in (most, most + 1)]
    assert chance[1] <= 0.05 + 1e-9 < chance[0] + 2e-9
    assert most >= int(0.02 * sentences)


@pytest.mark.slow
@pytest.mark.parametrize("flips", [3, 4])
def test_the_limit_is_what_shows_more_than_two_per_cent(encoder, truth, flips):
    seen = []

    def flip_some(out, batch):
        seen.append(1)
        # The last `flips` of the sentences, which come after the grid one by one.
        sentences_seen = len(seen) - len(dict(grid(encoder, SENTENCES)))
        return out[:, ::-1] if sentences_seen > 50 - flips else out

    report = validate(Wrong(truth, flip_some), truth, encoder, SENTENCES, "close")
    assert report["flips"] == flips
    assert report["passed"] == (flips == 3)


def test_logits_that_are_not_finite_fail_in_fewer_bits_too(encoder, truth):
    def infinite(out, batch):
        return out + (np.inf if batch["input_ids"].shape[1] == 512 else 0)

    report = validate(Wrong(truth, infinite), truth, encoder, SENTENCES, "close")
    assert not report["passed"]
    assert not report["finite"]
    assert "not finite" in sentence(report)
