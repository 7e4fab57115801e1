"""Labels: a classifier's answers (one label, or a set of labels), and the label columns of data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.errors import DataError

if TYPE_CHECKING:
    import numpy as np

SINGLE, MULTI = "single_label_classification", "multi_label_classification"  # as `problem_type` in a model's config
SEPARATOR = "|"  # separates the labels of a text in a column of plain text
MOST = 100  # a column with more different labels is probably not the label column

# The text in one row of a label column: one label, or a set of labels.
# An answer is a number: the index of the label, or, for a set, the integer with one bit set for each label's index.
Value = str | tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A column of labels.

    Attributes:
        values: The value of each row.
        where: Source of the column, for error messages.
        classes: The data set's names for the indices in `values`; empty if it gives none.
    """

    values: Sequence[Value]
    where: str
    classes: tuple[str, ...] = ()

    def wrong(self, number: int, what: str, hint: str) -> DataError:
        """Returns an error about one row.

        Args:
            number: Number of the row, from 1.
            what: The fault.
            hint: Advice to the user.
        """
        return DataError(f"{self.where}, row {number}: {what}.", hint)


@dataclass(frozen=True)
class LabelSet:
    """The labels of a model.

    Attributes:
        names: Names of the labels, by index.
        multi: Whether an answer is a set of any number of labels instead of one label.
    """

    names: tuple[str, ...]
    multi: bool = False

    @property
    def generic(self) -> bool:
        """Returns whether all names are the default names: LABEL_0, LABEL_1 and so on."""
        return all(name == f"LABEL_{index}" for index, name in enumerate(self.names))

    def named(self, answer: int) -> str:
        """Returns the label names of an answer; `SEPARATOR` separates the names of a set."""
        if not self.multi:
            return self.names[answer]
        return SEPARATOR.join(name for index, name in enumerate(self.names) if answer >> index & 1)

    def indices(self, column: Column) -> tuple[int, ...]:
        """Returns the answers in a column.

        A column holds either names or indices in all rows. Names match in upper or lower case, unless that is
        ambiguous.

        Raises:
            DataError: The model does not have a label of the column, or all values are both names and indices.
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
        """Converts answers to targets of a loss: label indices [rows], or zeros and ones [rows, labels] for sets."""
        if not self.multi:
            return list(answers)
        return [[float(answer >> index & 1) for index in range(len(self.names))] for answer in answers]

    def _known(self, found: Sequence[str], where: str) -> Mapping[str, int]:
        """Returns value → index: by names if all values are names, else by the reading that fits more values."""
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
        """Returns the sets with class names in place of indices, and the model's index of each name.

        Names of data set and model must match, in any order. If the model has default names and as many labels, the
        indices stay as they are. The method never guesses.
        """
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
        """Returns label name → index; matches upper and lower case, unless the model's names differ only in case."""
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
    """Returns the labels of a new model for a column.

    The names are `names`, else the classes of the data set, else the values of the column in alphabetical order. If
    the values are the integers from 0 on, the names are LABEL_0, LABEL_1 and so on.

    Args:
        column: The label column.
        names: Names of the labels; empty to derive them.
        multi: Whether answers are sets. A column with lists always has sets.

    Raises:
        DataError: There are fewer than two labels, or more than `MOST`.
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
    """Returns the labels of a row; raises `DataError` for a list if the model answers with one label."""
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
    """Returns the answer to each row of logits [batch, labels].

    An answer is the index of the largest logit. For `multi` it is a set, as bits: the labels with a logit above 0.
    """
    if not multi:
        return [int(index) for index in logits.argmax(axis=1)]
    return [sum(1 << index for index, yes in enumerate(row) if yes) for row in (logits > 0).tolist()]


def margins(logits: np.ndarray, multi: bool) -> np.ndarray:
    """Returns the margin of each row of logits [batch, labels], as an array [batch].

    The margin is the largest logit minus the second largest. For `multi` it is the smallest distance of a logit from 0.
    """
    import numpy as np

    if multi:
        return np.asarray(np.abs(logits).min(axis=1))
    ordered = np.sort(logits, axis=1)
    return np.asarray(ordered[:, -1] - ordered[:, -2])


def shares(logits: np.ndarray, multi: bool) -> np.ndarray:
    """Returns the probability of each label, float64 [batch, labels]: softmax, or for `multi` the sigmoid."""
    import numpy as np

    exact = logits.astype(np.float64)
    if multi:
        return np.asarray(1 / (1 + np.exp(-exact)))
    raised = np.exp(exact - exact.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def log_shares(logits: np.ndarray, multi: bool) -> np.ndarray:
    """Returns the log-probabilities of all outcomes, float64.

    These are the labels, [batch, labels]. For `multi` these are all labels present, then all labels absent,
    [batch, 2 × labels].
    """
    import numpy as np

    exact = logits.astype(np.float64)
    if multi:
        return np.concatenate([-np.logaddexp(0, -exact), -np.logaddexp(0, exact)], axis=1)
    exact -= exact.max(axis=1, keepdims=True)
    return np.asarray(exact - np.log(np.exp(exact).sum(axis=1, keepdims=True)))
