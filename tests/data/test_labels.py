"""Tests of labels by name and by index, of one or several labels per text, and of quality figures per label."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.data import labels
from toolchain.data.labels import MULTI, REGRESSION, SINGLE, Column, LabelSet, label_set
from toolchain.errors import DataError
from toolchain.results import statistics

NLI = LabelSet(("contradiction", "entailment", "neutral"))


def column(*values, classes=()):
    return Column(values, "data", tuple(classes))


def test_label_indices_of_a_data_set_are_mapped_by_name():
    classes = ("entailment", "neutral", "contradiction")
    assert NLI.answers(column("0", "1", "2", classes=classes)) == (1, 2, 0)
    assert LabelSet(("LABEL_0", "LABEL_1", "LABEL_2")).answers(column("2", "0", classes=classes)) == (2, 0)


def test_a_data_set_with_other_labels_gives_an_error_with_both_label_sets():
    with pytest.raises(DataError, match="has the labels yes, no; the model has contradiction, entailment, neutral"):
        NLI.answers(column("0", "1", classes=("yes", "no")))
    # the data set has as many labels as the model, but with other names
    with pytest.raises(DataError, match="has the labels yes, no"):
        LabelSet(("a", "b")).answers(column("0", "1", classes=("yes", "no")))


def test_a_set_of_labels_is_stored_as_bits():
    tags = LabelSet(("toxic", "insult", "threat"), task=MULTI)
    assert tags.answers(column("toxic|threat", "", " insult ", "threat | threat")) == (0b101, 0, 0b010, 0b100)
    assert tags.answers(column(("0", "2"), (), ("1",))) == (0b101, 0, 0b010)
    assert tags.targets((0b101, 0), ()) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert [tags.format_answer(answer) for answer in (0b101, 0)] == ["toxic|threat", ""]
    with pytest.raises(DataError, match="row 2: the label 'rude' is not one of the model's"):
        tags.answers(column("toxic", "toxic|rude"))
    with pytest.raises(DataError, match="row 1: the label is a list, but the model answers with one label"):
        NLI.answers(column(("neutral", "entailment")))


@pytest.mark.parametrize(
    ("values", "names", "task", "expected"),
    [
        (("b", "a", "b"), (), SINGLE, LabelSet(("a", "b"))),
        (("0", "2", "1"), (), SINGLE, LabelSet(("LABEL_0", "LABEL_1", "LABEL_2"))),
        (("1", "2"), (), SINGLE, LabelSet(("1", "2"))),
        (("b", "a"), ("b", "a", "c"), SINGLE, LabelSet(("b", "a", "c"))),
        (("x|y", "x"), (), MULTI, LabelSet(("x", "y"), task=MULTI)),
        ((("x", "y"), ()), (), SINGLE, LabelSet(("x", "y"), task=MULTI)),
        (("1.5", "-2"), (), REGRESSION, LabelSet(("score",), REGRESSION)),
        (("1", "0"), ("stars",), REGRESSION, LabelSet(("stars",), REGRESSION)),
    ],
)
def test_a_new_head_gets_the_labels_of_the_data(values, names, task, expected):
    assert label_set(column(*values), names, task) == expected


def test_a_new_head_gets_all_classes_of_the_data_set():
    assert label_set(column("0", "2", classes=("a", "b", "c")), (), SINGLE).names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a", "a"), r"only one label \('a'\)"),
        (tuple(str(i) for i in range(1, 102)), "101 different labels.*--label-column"),
    ],
)
def test_too_few_or_too_many_labels_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        label_set(column(*values), (), SINGLE)


@pytest.mark.parametrize(
    ("facts", "task"),
    [({}, SINGLE), ({"multi_label": True}, MULTI), ({"task": REGRESSION}, REGRESSION)],
)
def test_the_facts_of_old_manifests_state_the_task(facts, task):
    assert labels.task_of_facts(facts) == task


def test_a_regression_reads_numbers_and_refuses_other_labels():
    scores = LabelSet(("score",), REGRESSION)
    assert scores.answers(column("1", "-2.5", "3e-2")) == (1.0, -2.5, 0.03)
    assert scores.targets((1, -2.5), ()) == [1.0, -2.5]
    assert scores.format_answer(2.34567) == "2.346"
    for value in ("good", "nan", "inf", "", ("1", "2")):
        with pytest.raises(DataError, match=r"row 2: the label .* is not a number, but the model answers with a score"):
            scores.answers(column("1", value))


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (("1", "2"), ("a", "b"), "one score, not 2 labels"),
        (("1.5", "1.5"), (), "All scores of .* are 1.5"),
        (("good", "bad"), (), "row 1: the label 'good' is not a number"),
    ],
)
def test_a_new_regression_head_needs_different_scores(values, names, message):
    with pytest.raises(DataError, match=message):
        label_set(column(*values), names, REGRESSION)


logits = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=6)


TASKS = st.sampled_from([SINGLE, MULTI])


@given(logits, TASKS)
def test_log_shares_are_the_logarithms_of_shares(rows, task):
    array = np.array(rows, np.float32)
    multi = task == MULTI
    probabilities, log_shares = labels.label_probabilities(array, task), labels._outcome_log_probabilities(array, task)
    assert np.allclose(np.exp(log_shares[:, :3]), probabilities, atol=1e-9)
    if multi:
        assert np.allclose(np.exp(log_shares[:, :3]) + np.exp(log_shares[:, 3:]), 1)
    else:
        assert np.allclose(probabilities.sum(axis=1), 1)
    for answer, row in zip(labels.answers(array, task), array, strict=True):
        if multi:
            assert [bool(answer >> index & 1) for index in range(3)] == [value > 0 for value in row]
        else:
            assert row[answer] == row.max()


@given(st.lists(st.integers(-30, 30).filter(bool), min_size=3, max_size=3, unique=True), TASKS)
def test_the_margin_is_the_smallest_change_of_one_logit_that_changes_the_answer(row, task):
    def answers_after(change):
        changed_rows = [np.array([row]) + step * np.eye(3)[[label]] for label in range(3) for step in (-change, change)]
        return {labels.answers(logits_row, task)[0] for logits_row in changed_rows}

    (margin,) = labels.margins(np.array([row]), task)
    assert answers_after(margin - 0.1) == set(labels.answers(np.array([row]), task))
    assert len(answers_after(margin + 0.1)) > 1


@given(logits, logits, st.sampled_from(labels.TASKS))
def test_the_divergence_is_zero_only_without_a_difference(rows, other_rows, task):
    count = min(len(rows), len(other_rows))
    array, other = (np.array(each[:count], np.float32) for each in (rows, other_rows))
    if task == REGRESSION:
        array, other = array[:, :1], other[:, :1]
        assert labels.divergence(array, other, task) == pytest.approx(np.square(array - other).mean() / 2, rel=1e-5)
    assert labels.divergence(array, array, task) == 0
    assert labels.divergence(array, other, task) >= 0


sets = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=30)


@given(sets)
def test_counts_of_label_sets_equal_the_counts_of_each_label(pairs):
    predictions, references = zip(*pairs, strict=True)
    counts = statistics.count_by_label(predictions, references, True)
    single_counts = []
    for index in range(3):
        predicted, expected = [a >> index & 1 for a in predictions], [a >> index & 1 for a in references]
        if any(predicted) or any(expected):
            single_counts.append(statistics.count_by_label(predicted, expected, False)[-1])
    assert [(c["correct"], c["labelled"], c["predicted"]) for c in counts] == [
        (c["correct"], c["labelled"], c["predicted"]) for c in single_counts
    ]


def test_balanced_accuracy_gives_every_label_the_same_weight():
    counts = statistics.count_by_label([0, 0, 0, 0], [0, 0, 0, 1], False)
    assert statistics.balanced_accuracy(counts, False) == pytest.approx(0.5)
    # Label 0: recall 1/2, specificity 1/2. Label 1: recall 1, specificity 1.
    counts = statistics.count_by_label([0b01, 0b01, 0b00, 0b10], [0b01, 0b00, 0b01, 0b10], True)
    assert statistics.balanced_accuracy(counts, True) == pytest.approx((1 / 2 + 1 / 2 + 1 + 1) / 4)
    assert statistics.balanced_accuracy([], True) is statistics.macro_f1([]) is None


def test_calibration_error_of_label_sets_covers_each_label():
    assert statistics.calibration_error([[0.9, 0.2]], [0b01], True) == pytest.approx((0.1 + 0.2) / 2)
    assert statistics.calibration_error([[0.9, 0.9]], [0b01], True) == pytest.approx((1.8 - 1) / 2)
