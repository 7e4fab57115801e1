"""Tests of labels by name and by index, of one or several labels per text, and of quality figures per label."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.data import labels
from toolchain.data.labels import Column, LabelSet, label_set
from toolchain.errors import DataError
from toolchain.results import statistics

NLI = LabelSet(("contradiction", "entailment", "neutral"))


def column(*values, classes=()):
    return Column(values, "data", tuple(classes))


def test_label_indices_of_a_data_set_are_mapped_by_name():
    classes = ("entailment", "neutral", "contradiction")
    assert NLI.indices(column("0", "1", "2", classes=classes)) == (1, 2, 0)
    assert LabelSet(("LABEL_0", "LABEL_1", "LABEL_2")).indices(column("2", "0", classes=classes)) == (2, 0)


def test_a_data_set_with_other_labels_gives_an_error_with_both_label_sets():
    with pytest.raises(DataError, match="has the labels yes, no; the model has contradiction, entailment, neutral"):
        NLI.indices(column("0", "1", classes=("yes", "no")))
    # the data set has as many labels as the model, but with other names
    with pytest.raises(DataError, match="has the labels yes, no"):
        LabelSet(("a", "b")).indices(column("0", "1", classes=("yes", "no")))


def test_a_set_of_labels_is_stored_as_bits():
    tags = LabelSet(("toxic", "insult", "threat"), multi_label=True)
    assert tags.indices(column("toxic|threat", "", " insult ", "threat | threat")) == (0b101, 0, 0b010, 0b100)
    assert tags.indices(column(("0", "2"), (), ("1",))) == (0b101, 0, 0b010)
    assert tags.targets((0b101, 0)) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert [tags.format_answer(answer) for answer in (0b101, 0)] == ["toxic|threat", ""]
    with pytest.raises(DataError, match="row 2: the label 'rude' is not one of the model's"):
        tags.indices(column("toxic", "toxic|rude"))
    with pytest.raises(DataError, match="row 1: the label is a list, but the model answers with one label"):
        NLI.indices(column(("neutral", "entailment")))


@pytest.mark.parametrize(
    ("values", "names", "multi", "expected"),
    [
        (("b", "a", "b"), (), False, LabelSet(("a", "b"))),
        (("0", "2", "1"), (), False, LabelSet(("LABEL_0", "LABEL_1", "LABEL_2"))),
        (("1", "2"), (), False, LabelSet(("1", "2"))),
        (("b", "a"), ("b", "a", "c"), False, LabelSet(("b", "a", "c"))),
        (("x|y", "x"), (), True, LabelSet(("x", "y"), multi_label=True)),
        ((("x", "y"), ()), (), False, LabelSet(("x", "y"), multi_label=True)),
    ],
)
def test_a_new_head_gets_the_labels_of_the_data(values, names, multi, expected):
    assert label_set(column(*values), names, multi) == expected


def test_a_new_head_gets_all_classes_of_the_data_set():
    assert label_set(column("0", "2", classes=("a", "b", "c")), (), False).names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a", "a"), r"only one label \('a'\)"),
        (tuple(str(i) for i in range(1, 102)), "101 different labels.*--label-column"),
    ],
)
def test_too_few_or_too_many_labels_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        label_set(column(*values), (), False)


logits = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=6)


@given(logits, st.booleans())
def test_log_shares_are_the_logarithms_of_shares(rows, multi):
    array = np.array(rows, np.float32)
    probabilities, log_shares = labels.label_probabilities(array, multi), labels.outcome_log_probabilities(array, multi)
    assert np.allclose(np.exp(log_shares[:, :3]), probabilities, atol=1e-9)
    if multi:
        assert np.allclose(np.exp(log_shares[:, :3]) + np.exp(log_shares[:, 3:]), 1)
    else:
        assert np.allclose(probabilities.sum(axis=1), 1)
    for answer, row in zip(labels.answers(array, multi), array, strict=True):
        if multi:
            assert [bool(answer >> index & 1) for index in range(3)] == [value > 0 for value in row]
        else:
            assert row[answer] == row.max()


@given(st.lists(st.integers(-30, 30).filter(bool), min_size=3, max_size=3, unique=True), st.booleans())
def test_the_margin_is_the_smallest_change_of_one_logit_that_changes_the_answer(row, multi):
    def answers_after(change):
        changed_rows = [np.array([row]) + step * np.eye(3)[[label]] for label in range(3) for step in (-change, change)]
        return {labels.answers(logits_row, multi)[0] for logits_row in changed_rows}

    (margin,) = labels.margins(np.array([row]), multi)
    assert answers_after(margin - 0.1) == set(labels.answers(np.array([row]), multi))
    assert len(answers_after(margin + 0.1)) > 1


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
