"""What a classifier answers with: one label of several, or a set of them; and how a data set's column says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.errors import DataError

if TYPE_CHECKING:
    import numpy as np

SINGLE, MULTI = "single_label_classification", "multi_label_classification"  # as `problem_type` in a model's config
SEPARATOR = "|"  # between the labels of a text, in a column of plain text
MOST = 100  # more different labels than these are no classes but some other column

# What a column says of a row, as text: one label, or those of a set. An answer is a label's index, or for a set the
# whole number whose bits are set at the indices of its labels.
Value = str | tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A column of labels: a value a row, where it is from, and the `classes` it indexes where the data set names
    them."""

    values: Sequence[Value]
    where: str
    classes: tuple[str, ...] = ()

    def wrong(self, number: int, what: str, mend: str) -> DataError:
        """The error that a row, counted from 1, is."""
        return DataError(f"{self.where}, row {number}: {what}.", mend)


@dataclass(frozen=True)
class LabelSet:
    """The names of a model's labels by index, and whether it answers with any number of them (`multi`) or with one."""

    names: tuple[str, ...]
    multi: bool = False

    @property
    def generic(self) -> bool:
        """Whether the names say nothing: those a model has that was never given any."""
        return all(name == f"LABEL_{index}" for index, name in enumerate(self.names))

    def named(self, answer: int) -> str:
        """An answer in words."""
        if not self.multi:
            return self.names[answer]
        return SEPARATOR.join(name for index, name in enumerate(self.names) if answer >> index & 1)

    def indices(self, column: Column) -> tuple[int, ...]:
        """The answers that the column states: all of it names, or all of it indices, decided once.

        Names fit in any case where that is not ambiguous. Raises `DataError` for a label that the model does not have,
        and where names and indices could both be meant.
        """
        sets: list[Sequence[str]] = [
            _members(value, number, column, self.multi) for number, value in enumerate(column.values, start=1)
        ]
        found = [value for members in sets for value in members]
        if column.classes:
            sets, known = self._by_class(sets, column)
        else:
            known = self._known(found, column.where)
        answers = []
        for number, members in enumerate(sets, start=1):
            for value in members:
                if value not in known:
                    raise self._unknown(value, number, column)
            indices = [known[value] for value in members]
            answers.append(sum(1 << index for index in set(indices)) if self.multi else indices[0])
        return tuple(answers)

    def targets(self, answers: Sequence[int]) -> list[int] | list[list[float]]:
        """The answers as a loss takes them: indices, or for sets a row of zeros and ones."""
        if not self.multi:
            return list(answers)
        return [[float(answer >> index & 1) for index in range(len(self.names))] for answer in answers]

    def _known(self, found: Sequence[str], where: str) -> Mapping[str, int]:
        """What the values are read by: the names where all are names, else what more of them are."""
        names = self._by_name(found)
        by_index = {str(index): index for index in range(len(self.names))}
        if not all(value in names for value in found):
            return max(by_index, names, key=lambda known: sum(value in known for value in found))
        if found and all(value in by_index and by_index[value] != names[value] for value in found):
            raise DataError(
                f"{where}: the labels {', '.join(sorted(set(found)))} are names of the model's labels and indices as "
                "well.",
                "Rename them in the model's config.json (id2label) and in the file.",
            )
        return names

    def _by_class(self, sets: Sequence[Sequence[str]], column: Column) -> tuple[list[Sequence[str]], Mapping[str, int]]:
        """The sets by the data set's own names for its indices, and what these are to the model: the labels of the
        same names, in whatever order; the same indices where the model's have no names. Never a guess."""
        classes = column.classes
        if self.generic and len(classes) == len(self.names):
            return list(sets), {str(index): index for index in range(len(classes))}
        known = self._by_name(classes)
        lacking = [name for name in classes if name not in known]
        if lacking:
            raise DataError(
                f"{column.where} has the labels {', '.join(classes)}; the model has {', '.join(self.names)}.",
                "Use data with the model's labels, or rename those in its config.json (id2label).",
            )
        by_index = {str(index): name for index, name in enumerate(classes)}
        return [[by_index.get(value, value) for value in members] for members in sets], known

    def _by_name(self, found: Sequence[str]) -> dict[str, int]:
        """Label name → index, as written; in any case where that is not ambiguous."""
        exact = {label: index for index, label in enumerate(self.names)}
        folded = {label.casefold(): index for label, index in exact.items()}
        if len(folded) < len(self.names):
            return exact
        return {**{value: folded[value.casefold()] for value in found if value.casefold() in folded}, **exact}

    def _unknown(self, value: str, number: int, column: Column) -> DataError:
        if value == "-1":
            what = "the label is -1, as in GLUE's test sets, whose labels are not public"
            return column.wrong(number, what, "Use a set with labels, such as the validation set.")
        known = ", ".join(f"{index} {name}" for index, name in enumerate(self.names))
        what = f"the label {value!r} is not one of the model's ({known})"
        return column.wrong(number, what, "Correct the label column: all names, or all indices.")


SST2_LABELS = LabelSet(("NEGATIVE", "POSITIVE"))


def label_set(column: Column, names: Sequence[str], multi: bool) -> LabelSet:
    """The labels that a new model for this column has: `names` where any are given; else the data set's own; else those
    that occur, in alphabetical order, and for whole numbers from 0 on LABEL_0, LABEL_1, ….

    Raises `DataError` for fewer than two labels or more than `MOST`.
    """
    multi = multi or any(isinstance(value, tuple) for value in column.values)
    members = [_members(value, number, column, multi) for number, value in enumerate(column.values, start=1)]
    found = {value for row in members for value in row}
    if not names:
        numbers = {str(index) for index in range(len(found))}
        names = column.classes or (
            [f"LABEL_{index}" for index in range(len(found))] if found == numbers else sorted(found)
        )
    if len(found) < 2 or len(names) < 2:
        only = ", ".join(map(repr, sorted(found))) or "none"
        raise DataError(
            f"{column.where} has one label only ({only}): there is nothing to tell apart.", "Add rows of another label."
        )
    if len(names) > MOST:
        raise DataError(
            f"{column.where} has {len(names)} different labels; classifiers of up to {MOST} are made here.",
            "Is it the column of labels? Name that with --label-column.",
        )
    return LabelSet(tuple(names), multi)


def _members(value: Value, number: int, column: Column, multi: bool) -> tuple[str, ...]:
    """The labels of a row."""
    if isinstance(value, tuple):
        if not multi:
            raise column.wrong(
                number, "several labels in a list, and the model answers with one", "Use data with one label a text."
            )
        return value
    if not multi:
        return (value.strip(),)
    return tuple(part for part in (part.strip() for part in value.split(SEPARATOR)) if part)


def answers(logits: np.ndarray, multi: bool) -> list[int]:
    """What logits [batch, labels] say: the index of the largest; of a set, the labels more likely than not, as bits."""
    if not multi:
        return [int(index) for index in logits.argmax(axis=1)]
    return [sum(1 << index for index, yes in enumerate(row) if yes) for row in (logits > 0).tolist()]


def margins(logits: np.ndarray, multi: bool) -> np.ndarray:
    """How much logits [batch, labels] must move to change the answer, [batch]: the largest logit less the second
    largest; of a set, the smallest distance of a logit from 0."""
    import numpy as np

    if multi:
        return np.asarray(np.abs(logits).min(axis=1))
    ordered = np.sort(logits, axis=1)
    return np.asarray(ordered[:, -1] - ordered[:, -2])


def shares(logits: np.ndarray, multi: bool) -> np.ndarray:
    """Probability of every label, float64 [batch, labels]: they add up to 1, or each stands for itself in a set."""
    import numpy as np

    exact = logits.astype(np.float64)
    if multi:
        return np.asarray(1 / (1 + np.exp(-exact)))
    raised = np.exp(exact - exact.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def log_shares(logits: np.ndarray, multi: bool) -> np.ndarray:
    """Logarithms of the probabilities of all outcomes: of the labels; of a set, of each label's yes and then no."""
    import numpy as np

    exact = logits.astype(np.float64)
    if multi:
        return np.concatenate([-np.logaddexp(0, -exact), -np.logaddexp(0, exact)], axis=1)
    exact -= exact.max(axis=1, keepdims=True)
    return np.asarray(exact - np.log(np.exp(exact).sum(axis=1, keepdims=True)))
