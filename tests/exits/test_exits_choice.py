"""Tests of the choice of exits, and of their heads."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from toolchain.data.labels import MULTI, SINGLE
from toolchain.errors import VerdictError
from toolchain.exits import heads
from toolchain.exits.choice import CONFIDENCES, EXIT_WEIGHTS, MOST_EXITS, HeldOut, choose, confidences

LAYERS = 3
WEIGHTS = (2_000_000, 1_000_000, 1_000_000)


def held_outs(rows=12):
    surenesses = hnp.arrays(float, (LAYERS, rows), elements=st.floats(0.5, 1.0))
    rights = hnp.arrays(bool, (LAYERS + 1, rows))
    return st.builds(HeldOut, surenesses, rights, st.just(WEIGHTS))


def simulate(held_out, layers, confidence):
    """Returns the number of right answers and the work of all rows, row by row."""
    right, work = 0, 0
    for row in range(held_out.right.shape[1]):
        passed = [layer for layer in layers if held_out.confidences[layer, row] < confidence]
        leaving = [layer for layer in layers if layer not in passed]
        layer = leaving[0] if leaving else LAYERS
        right += held_out.right[layer, row]
        work += sum(WEIGHTS[:layer]) + EXIT_WEIGHTS * sum(other <= layer for other in layers)
    return int(right), work


@given(held_out=held_outs(), max_drop=st.floats(0, 40))
def test_the_choice_is_the_one_with_the_least_work_within_the_drop(held_out, max_drop):
    rows, total = held_out.right.shape[1], sum(WEIGHTS)
    full = int(held_out.right[-1].sum())
    allowed = []
    for size in range(1, min(MOST_EXITS, LAYERS) + 1):
        for layers in combinations(range(LAYERS), size):
            for confidence in CONFIDENCES:
                right, work = simulate(held_out, layers, confidence)
                if round(100 * (full - right) / rows, 3) <= max_drop and round(work / rows / total, 4) < 1:
                    allowed.append(work / rows / total)
    if not allowed:
        with pytest.raises(VerdictError, match="No exits save work"):
            choose(held_out, max_drop, None)
        return
    choice = choose(held_out, max_drop, None)
    assert choice.point.work == pytest.approx(min(allowed), abs=2e-4)
    right, work = simulate(held_out, choice.layers, choice.point.confidence)
    assert choice.point.drop == pytest.approx(100 * (full - right) / rows, abs=1e-3)
    assert choice.point.drop <= max_drop
    assert [point.confidence for point in choice.curve] == list(CONFIDENCES)
    assert sum(choice.point.shares) <= 1 + 1e-3


def test_given_layers_are_kept():
    sure = HeldOut(np.ones((LAYERS, 4)), np.ones((LAYERS + 1, 4), bool), WEIGHTS)
    assert choose(sure, 0, None).layers == (0,)
    assert choose(sure, 0, (1, 2)).layers == (1, 2)
    assert choose(sure, 0, (1, 2)).point.shares == (1.0, 0.0)


def test_the_confidence_of_several_labels_is_that_of_the_least_certain_one():
    logits = np.array([[5.0, -5.0], [5.0, 0.1], [0.0, 9.0]])
    assert confidences(logits, MULTI) == pytest.approx([1 / (1 + np.exp(-5)), 1 / (1 + np.exp(-0.1)), 0.5])
    assert confidences(logits, SINGLE) == pytest.approx([1 / (1 + np.exp(-x)) for x in (10, 4.9, 9)])


@pytest.fixture(scope="module")
def lesson():
    """Hidden states whose logits follow from pairs of neighbours, with one channel that never changes.

    A text is positive if a token with a large first channel stands directly before a token with a large third channel.
    No mean over the tokens tells this order.
    """
    source = np.random.default_rng(1)
    lengths = source.integers(4, 9, size=3000)
    texts = []
    for index, length in enumerate(lengths):
        text = source.normal(size=(length, 6)) / 4
        place = source.integers(0, length - 1)
        first, second = (place, place + 1) if index % 2 else (place + 1, place)
        text[first, 0] += 4
        text[second, 2] += 4
        texts.append(text * [1, 10, 0.1, 1, 1, 0] + [0, 5, 0, 0, 0, 3])
    states = heads.States(np.concatenate(texts).astype(np.float32), np.concatenate([[0], np.cumsum(lengths)]))
    margin = np.where(np.arange(len(lengths)) % 2, 3.0, -3.0)
    return states, np.stack([-margin, margin], axis=1).astype(np.float32)


def take(states, count):
    return heads.States(states.tokens[: states.starts[count]], states.starts[: count + 1])


@pytest.mark.parametrize("task", [SINGLE, MULTI])
def test_a_head_learns_the_answers_of_the_graph_from_neighbouring_tokens(lesson, task):
    states, logits = lesson
    few = take(states, 2000)
    network = heads.train(few, logits[:2000], task, seed=20)
    assert (network.run(states)[2000:].argmax(axis=1) == logits[2000:].argmax(axis=1)).mean() > 0.9
    again = heads.train(few, logits[:2000], task, seed=20)
    other = heads.train(few, logits[:2000], task, seed=21)
    assert np.array_equal(network.weights[0], again.weights[0])
    assert not np.array_equal(network.weights[0], other.weights[0])


@pytest.mark.parametrize("task", [SINGLE, MULTI])
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_calibration_finds_the_temperature(task, factor):
    """Labels drawn from the probabilities of a head need no other temperature than its own."""
    source = np.random.default_rng(2)
    margin = 2 * source.normal(size=2000)
    logits = np.stack([-margin, margin], axis=1).astype(np.float32)
    probabilities = heads.label_probabilities(logits, task)
    drawn = source.random(probabilities.shape if task == MULTI else (len(logits), 1))
    if task == MULTI:
        targets = (drawn < probabilities).astype(np.float32)
    else:
        first = (drawn < probabilities[:, :1]).astype(np.float32)
        targets = np.concatenate([first, 1 - first], axis=1)
    network = heads.Network((np.ones((3, 2)), np.ones((4, 2))), (np.ones(2), np.ones(2)))
    calibrated, divided = heads.calibrate(network, logits * factor, targets, task)
    assert divided == pytest.approx(logits, rel=0.2, abs=0.05)
    assert network.weights[1] / calibrated.weights[1] == pytest.approx(factor, rel=0.2)


def test_few_texts_are_kept_and_too_many_are_thinned_out(monkeypatch):
    rows = [[0] * length for length in range(1, 101)]
    assert heads.select_texts(rows, 8) == rows
    monkeypatch.setattr(heads, "MOST_BYTES", 2 * 8 * 2000)
    chosen = heads.select_texts(rows, 8)
    assert chosen == rows[::3]
    assert 2 * 8 * sum(map(len, chosen)) <= heads.MOST_BYTES
