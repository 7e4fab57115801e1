"""Labels by name and by index, one or several per text, and macro-averaged figures."""

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


def test_a_data_sets_own_order_of_labels_is_not_taken_for_the_models():
    classes = ("entailment", "neutral", "contradiction")
    assert NLI.indices(column("0", "1", "2", classes=classes)) == (1, 2, 0)
    assert LabelSet(("LABEL_0", "LABEL_1", "LABEL_2")).indices(column("2", "0", classes=classes)) == (2, 0)


def test_a_data_set_with_other_labels_is_refused_with_both():
    with pytest.raises(DataError, match="has the labels yes, no; the model has contradiction, entailment, neutral"):
        NLI.indices(column("0", "1", classes=("yes", "no")))
    with pytest.raises(DataError, match="has the labels yes, no"):  # as many as the model's, which have names
        LabelSet(("a", "b")).indices(column("0", "1", classes=("yes", "no")))


def test_sets_of_labels_are_bits():
    tags = LabelSet(("toxic", "insult", "threat"), multi_label=True)
    assert tags.indices(column("toxic|threat", "", " insult ", "threat | threat")) == (0b101, 0, 0b010, 0b100)
    assert tags.indices(column(("0", "2"), (), ("1",))) == (0b101, 0, 0b010)
    assert tags.targets((0b101, 0)) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert [tags.format_answer(answer) for answer in (0b101, 0)] == ["toxic|threat", ""]
    with pytest.raises(DataError, match="row 2: the label 'rude' is not one of the model's"):
        tags.indices(column("toxic", "toxic|rude"))
    with pytest.raises(DataError, match="row 1: its label is a list, but the model answers with one label"):
        NLI.indices(column(("neutral", "entailment")))


@pytest.mark.parametrize(
    ("values", "names", "multi", "found"),
    [
        (("b", "a", "b"), (), False, LabelSet(("a", "b"))),
        (("0", "2", "1"), (), False, LabelSet(("LABEL_0", "LABEL_1", "LABEL_2"))),
        (("1", "2"), (), False, LabelSet(("1", "2"))),
        (("b", "a"), ("b", "a", "c"), False, LabelSet(("b", "a", "c"))),
        (("x|y", "x"), (), True, LabelSet(("x", "y"), multi_label=True)),
        ((("x", "y"), ()), (), False, LabelSet(("x", "y"), multi_label=True)),
    ],
)
def test_a_new_head_has_the_datas_labels(values, names, multi, found):
    assert label_set(column(*values), names, multi) == found


def test_a_new_head_has_the_classes_a_data_set_states_even_those_no_row_has():
    assert label_set(column("0", "2", classes=("a", "b", "c")), (), False).names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("a", "a"), r"only one label \('a'\)"),
        (tuple(str(i) for i in range(1, 102)), "101 different labels.*--label-column"),
    ],
)
def test_labels_that_are_none(values, says):
    with pytest.raises(DataError, match=says):
        label_set(column(*values), (), False)


logits = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=6)


@given(logits, st.booleans())
def test_shares_and_their_logarithms_belong_together(rows, multi):
    array = np.array(rows, np.float32)
    shares, logs = labels.label_probabilities(array, multi), labels.outcome_log_probabilities(array, multi)
    assert np.allclose(np.exp(logs[:, :3]), shares, atol=1e-9)
    if multi:
        assert np.allclose(np.exp(logs[:, :3]) + np.exp(logs[:, 3:]), 1)
    else:
        assert np.allclose(shares.sum(axis=1), 1)
    for answer, row in zip(labels.answers(array, multi), array, strict=True):
        if multi:
            assert [bool(answer >> at & 1) for at in range(3)] == [value > 0 for value in row]
        else:
            assert row[answer] == row.max()


@given(st.lists(st.integers(-30, 30).filter(bool), min_size=3, max_size=3, unique=True), st.booleans())
def test_the_margin_is_the_least_change_of_a_logit_that_changes_the_answer(row, multi):
    def answers_after(change):
        moved = [np.array([row]) + step * np.eye(3)[[label]] for label in range(3) for step in (-change, change)]
        return {labels.answers(each, multi)[0] for each in moved}

    (margin,) = labels.margins(np.array([row]), multi)
    assert answers_after(margin - 0.1) == set(labels.answers(np.array([row]), multi))
    assert len(answers_after(margin + 0.1)) > 1


sets = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=30)


@given(sets)
def test_figures_of_sets_are_those_of_their_labels_one_by_one(pairs):
    mine, its = zip(*pairs, strict=True)
    counts = statistics.count_by_label(mine, its, True)
    singles = []
    for at in range(3):
        yes, wanted = [a >> at & 1 for a in mine], [a >> at & 1 for a in its]
        if any(yes) or any(wanted):
            singles.append(statistics.count_by_label(yes, wanted, False)[-1])
    assert [(c["correct"], c["labelled"], c["predicted"]) for c in counts] == [
        (c["correct"], c["labelled"], c["predicted"]) for c in singles
    ]


def test_balanced_accuracy_gives_every_label_the_same_weight():
    counts = statistics.count_by_label([0, 0, 0, 0], [0, 0, 0, 1], False)
    assert statistics.balanced_accuracy(counts, False) == pytest.approx(0.5)
    # Label 0: recall 1/2 of 2, absence right in 1 of 2. Label 1: recall 1, absence 3/3.
    counts = statistics.count_by_label([0b01, 0b01, 0b00, 0b10], [0b01, 0b00, 0b01, 0b10], True)
    assert statistics.balanced_accuracy(counts, True) == pytest.approx((1 / 2 + 1 / 2 + 1 + 1) / 4)
    assert statistics.balanced_accuracy([], True) is statistics.macro_f1([]) is None


def test_calibration_of_sets_is_over_every_yes_and_no():
    assert statistics.calibration_error([[0.9, 0.2]], [0b01], True) == pytest.approx((0.1 + 0.2) / 2)
    assert statistics.calibration_error([[0.9, 0.9]], [0b01], True) == pytest.approx((1.8 - 1) / 2)
