"""Tests of validation: it finds wrong logits on every batch of its grid of lengths and paddings."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from toolchain.artifacts.store import Artifact
from toolchain.backends import Place, open_session
from toolchain.build import reference_logits
from toolchain.build.reference_logits import ReferenceLogits
from toolchain.build.steps.validate import LENGTHS, LONGEST, allowed_flips, grid, validate, validation_summary
from toolchain.data.encoding import Encoder, pad
from toolchain.data.inputs import load_embedded
from toolchain.data.labels import REGRESSION

SENTENCES = load_embedded().texts[:50]


@pytest.fixture(scope="module")
def encoder(built_tiny):
    return Encoder.open(built_tiny.path("onnx-fp32"), ("input_ids", "attention_mask"), 512)


@pytest.fixture(scope="module")
def truth(built_tiny):
    return open_session(built_tiny.path("torch-fp32"), "torch", Place("cpu", 2))


@pytest.mark.parametrize("max_length", [512, 8192])
def test_batches_of_several_texts_are_short_and_pairs_have_token_types(built_tiny, max_length):
    """With 8,192 tokens, as ModernBERT allows, a batch of several texts would need gigabytes of memory."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    batches = dict(grid(Encoder.open(built_tiny.path("onnx-fp32"), names, max_length), SENTENCES))
    for batch in batches.values():
        rows, tokens = batch["input_ids"].shape
        assert rows == 1 or tokens <= LONGEST
    pairs = batches["2 pairs of texts, right padding"]
    assert pairs["input_ids"].shape == (2, 512)
    assert (pairs["token_type_ids"].max(axis=1) == 1).all()


class ChangedSession:
    """A session that changes the logits of another session."""

    def __init__(self, session, change):
        self.run = lambda batch: change(session.run(batch), batch)


@pytest.mark.parametrize("share", [0.8, 1.2])
def test_validation_of_a_regression_bounds_the_largest_shift_of_a_score(encoder, truth, share):
    reference = ChangedSession(truth, lambda logits, _: logits[:, :1])
    batches = [pad([row], encoder.names, encoder.pad_id) for row in encoder.encode(SENTENCES)]
    spread = np.std([reference.run(batch) for batch in batches])
    contender = ChangedSession(reference, lambda logits, _: logits + share * spread)
    report = validate(contender, reference, dataclasses.replace(encoder, task=REGRESSION), SENTENCES, "close")
    assert report["shift"] == pytest.approx(share, rel=1e-2)
    assert report["passed"] == (share < 1)
    assert f"largest shift of a score {share} standard deviations, ≤ 1 allowed" in validation_summary(report)


def test_the_grid_has_the_shapes_that_its_names_state(encoder):
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
    second_batches = dict(grid(encoder, SENTENCES))
    assert all((second_batches[name]["input_ids"] == batch["input_ids"]).all() for name, batch in batches.items())


def test_an_accurate_session_passes(encoder, truth, built_tiny):
    report = validate(
        open_session(built_tiny.path("onnx-fp32"), "onnx", Place("cpu", 2)), truth, encoder, SENTENCES, "exact"
    )
    assert report["passed"]
    assert 0 < report["largest_delta"] < 1e-4
    assert report["flips"] == 0
    assert "≤ 0.0001 allowed" in validation_summary(report)


@pytest.mark.parametrize(
    ("change", "worst_case"),
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
def test_wrong_logits_in_any_batch_of_the_grid_fail(encoder, truth, change, worst_case):
    report = validate(ChangedSession(truth, change), truth, encoder, SENTENCES, "exact")
    assert not report["passed"]
    assert worst_case in report["worst_case"]


def test_quantised_logits_may_change_but_labels_may_not(encoder, truth):
    scaled_report = validate(ChangedSession(truth, lambda out, batch: out * 1.05), truth, encoder, SENTENCES, "close")
    assert scaled_report["passed"]
    assert scaled_report["largest_delta"] > 1e-4
    flipped_report = validate(
        ChangedSession(truth, lambda out, batch: out[:, ::-1]), truth, encoder, SENTENCES, "close"
    )
    assert not flipped_report["passed"]
    assert flipped_report["flips"] == 50
    logits = [truth.run(pad([row], encoder.names, encoder.pad_id))[0] for row in encoder.encode(SENTENCES)]
    assert flipped_report["flip_margins"] == pytest.approx([abs(first - second) for first, second in logits], rel=1e-2)
    assert scaled_report["flip_margins"] == []


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2000))
def test_the_limit_of_flips_allows_what_chance_explains(sentences):
    limit = allowed_flips(sentences)
    p_values = [stats.binomtest(flips, sentences, 0.02, alternative="greater").pvalue for flips in (limit, limit + 1)]
    assert p_values[1] <= 0.05 + 1e-9 < p_values[0] + 2e-9
    assert limit >= int(0.02 * sentences)


@pytest.mark.slow
@pytest.mark.parametrize("flips", [3, 4])
def test_validation_allows_three_flips_of_fifty_and_refuses_four(encoder, truth, flips):
    calls = []

    def flip_some(out, batch):
        calls.append(1)
        # `validate` runs the batches of its grid first, then single sentences. This test flips only the labels of the
        # last `flips` sentences.
        sentence_count = len(calls) - len(dict(grid(encoder, SENTENCES)))
        return out[:, ::-1] if sentence_count > 50 - flips else out

    report = validate(ChangedSession(truth, flip_some), truth, encoder, SENTENCES, "close")
    assert report["flips"] == flips
    assert report["passed"] == (flips == 3)


def test_quantised_logits_that_are_not_finite_fail(encoder, truth):
    def add_infinity(out, batch):
        return out + (np.inf if batch["input_ids"].shape[1] == 512 else 0)

    report = validate(ChangedSession(truth, add_infinity), truth, encoder, SENTENCES, "close")
    assert not report["passed"]
    assert not report["finite"]
    assert "not finite" in validation_summary(report)


def test_logits_of_pytorch_are_computed_once_for_a_model_and_a_batch(built_tiny, encoder, monkeypatch):
    artifact, place = built_tiny.load("torch-fp32"), Place("cpu", 1)
    batches = [pad([row], encoder.names, encoder.pad_id) for row in encoder.encode(SENTENCES[:2])]
    expected_logits = [open_session(artifact.path, "torch", place).run(batch) for batch in batches]
    opened = []
    monkeypatch.setattr(reference_logits, "_LOGITS", {})
    monkeypatch.setattr(
        reference_logits, "open_session", lambda *arguments: opened.append(arguments) or open_session(*arguments)
    )
    for _ in range(2):
        reference = ReferenceLogits(artifact, "torch", place)
        assert all((reference.run(b) == logits).all() for b, logits in zip(batches, expected_logits, strict=True))
        reference.close()
    assert len(opened) == 1
    other = Artifact(artifact.path, dataclasses.replace(artifact.manifest, variant="torch-bf16", parent_id="0" * 64))
    assert other.manifest.id != artifact.manifest.id
    ReferenceLogits(other, "torch", place).run(batches[0])
    assert len(opened) == 2
