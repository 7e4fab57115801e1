"""Labels: a model's answers (one label, a set of labels, a score, or a label for each word), and label columns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.data.entities import check_names
from toolchain.errors import DataError

if TYPE_CHECKING:
    import numpy as np

# Tasks of a model. The first three are values of `problem_type` in a model's config.
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
TOKENS = "token_classification"
TASKS = (SINGLE, MULTI, REGRESSION, TOKENS)
# Endings of the class names in a model's config; they state the kind of the model's head.
SEQUENCE_HEAD, TOKEN_HEAD = "ForSequenceClassification", "ForTokenClassification"
SEPARATOR = "|"  # `SEPARATOR` separates several labels of one text in a label column of strings.
IGNORED = -100  # PyTorch's losses ignore a target with this value
_FRACTION = re.compile(r"[+-]?\d*\.\d*[1-9]\d*")
MAX_LABELS = 100  # A column with more than `MAX_LABELS` different labels is probably not the label column.

# A `Value` is the content of one row in a label column: one label, a set of labels, or a number written as text.
# An *answer* is a number. If each text has exactly one label, the answer for a text is the index of the text's label.
# If each text has a set of labels, bit i of the answer says whether the set contains the label with index i: 1 if it
# does, 0 if not. In regression, the answer is the text's score. In token classification, the answer is not a number but
# a tuple: the index of the label of each word, where spaces separate the words of a text.
Value = str | tuple[str, ...]
Answer = int | float | tuple[int, ...]
# Correct answers of all rows, in the form that a loss needs; see `LabelSet.targets`.
Targets = Sequence[int] | Sequence[float] | Sequence[Sequence[int]] | Sequence[Sequence[float]]


class Tokens(list[int]):
    """The token ids of a text or pair.

    Attributes:
        types: For each token, the index of its text in the pair, 0 or 1; empty if the tokenizer gives only zeros.
        words: For each word of the text, the position of its first token; None if truncation removed the word. Spaces
            separate words. Empty unless the task is token classification.
        outside: Index of the label for a word that truncation removed.
        spans: For each word of the tokenizer, which may be a part of a word between spaces: the position of its first
            token, and the start and end of the word in the text, in characters. Empty unless the task is token
            classification.
    """

    types: Sequence[int] = ()
    words: Sequence[int | None] = ()
    outside: int = 0
    spans: Sequence[tuple[int, int, int]] = ()


@dataclass(frozen=True)
class Column:
    """A column of labels.

    Attributes:
        values: The label, or the set of labels, of each row.
        source: Source of the column, for error messages.
        classes: Class names that the indices in `values` stand for; empty if the data set has no class names.
    """

    values: Sequence[Value]
    source: str
    classes: tuple[str, ...] = ()

    def row_error(self, number: int, fault: str, hint: str) -> DataError:
        """Returns an error about one row of the label column.

        Args:
            number: Number of the row, from 1.
            fault: The fault.
            hint: Advice to the user.
        """
        return DataError(f"{self.source}, row {number}: {fault}.", hint)


@dataclass(frozen=True)
class LabelSet:
    """The labels and the task of a model.

    Attributes:
        names: Names of the labels, by index; for regression, the name of the score.
        task: The task, one of `TASKS`.
    """

    names: tuple[str, ...]
    task: str = SINGLE

    @property
    def multi_label(self) -> bool:
        """Returns whether an answer is a set of any number of labels instead of one label."""
        return self.task == MULTI

    @property
    def labels_texts(self) -> bool:
        """Returns whether the model gives each text one label or a set of labels, with a probability for each label."""
        return self.task in (SINGLE, MULTI)

    @property
    def has_default_names(self) -> bool:
        """Returns whether all labels have default names, such as LABEL_0 for index 0."""
        return all(name == f"LABEL_{index}" for index, name in enumerate(self.names))

    def format_answer(self, answer: Answer) -> str:
        """Returns the label names of an answer, or its score.

        `SEPARATOR` separates the names of a set, and a space separates the label names of words.
        """
        if isinstance(answer, tuple):
            return " ".join(self.names[index] for index in answer)
        if self.task == REGRESSION:
            return f"{answer:.4g}"
        if not self.multi_label:
            return self.names[int(answer)]
        return SEPARATOR.join(name for index, name in enumerate(self.names) if int(answer) >> index & 1)

    def answers(self, column: Column) -> tuple[Answer, ...]:
        """Converts each row of a label column to an answer: the number that stands for its label, labels or score.

        Either all rows of the column hold label names, or all rows hold label indices. The method ignores the case of
        label names, unless two labels of the model differ only in case. For regression, all rows hold numbers.

        Raises:
            DataError: The column has a label that the model lacks, or all values of the column are ambiguous. A
                value is ambiguous if the value is both the name of one label and the index of another label. For
                regression: a value is not a finite number.
        """
        if self.task == REGRESSION:
            return tuple(_read_score(value, number, column) for number, value in enumerate(column.values, start=1))
        sets: list[Sequence[str]] = [
            _members(value, number, column, self.task) for number, value in enumerate(column.values, start=1)
        ]
        values = [value for members in sets for value in members]
        if column.classes:
            sets, index_by_value = self._translate_classes(sets, column)
        else:
            index_by_value = self._index_values(values, column.source)
        rows: list[Answer] = []
        for number, members in enumerate(sets, start=1):
            for value in members:
                if value not in index_by_value:
                    raise self._unknown_label_error(value, number, column)
            indices = [index_by_value[value] for value in members]
            if self.task == TOKENS:
                rows.append(tuple(indices))
            else:
                rows.append(sum(1 << index for index in set(indices)) if self.multi_label else indices[0])
        return tuple(rows)

    def targets(self, answers: Sequence[Answer], ids: Sequence[Tokens]) -> Targets:
        """Converts answers to targets of a loss.

        Args:
            answers: Answer of each row.
            ids: Token ids of each row.

        Returns:
            For each row: the index of its label, its score for regression, or for label sets, one 0 or 1 per label. For
            token classification: a label index for each token. Only the first token of a word has a label; other tokens
            have the value `IGNORED`.
        """
        if self.task == REGRESSION:
            return [number(answer) for answer in answers]
        if self.task == TOKENS:
            return [_token_targets(answer, row) for answer, row in zip(answers, ids, strict=True)]
        if not self.multi_label:
            return [int(number(answer)) for answer in answers]
        sets = [int(number(answer)) for answer in answers]
        return [[float(members >> index & 1) for index in range(len(self.names))] for members in sets]

    def _index_values(self, values: Sequence[str], source: str) -> Mapping[str, int]:
        """Maps the values of a label column to label indices.

        The method reads the values as names if all values are label names. If some values are no label names, the
        method reads all values as indices or as names, whichever fits more values.
        """
        index_by_name = self._index_names(values)
        by_index = {str(index): index for index in range(len(self.names))}
        if not all(value in index_by_name for value in values):
            return max(by_index, index_by_name, key=lambda reading: sum(value in reading for value in values))
        if values and all(value in by_index and by_index[value] != index_by_name[value] for value in values):
            raise DataError(
                f"{source}: the labels {', '.join(sorted(set(values)))} are both names and indices of the "
                "model's labels.",
                "Rename the labels in the model's config.json (id2label) and in the file.",
            )
        return index_by_name

    def _translate_classes(
        self, sets: Sequence[Sequence[str]], column: Column
    ) -> tuple[list[Sequence[str]], Mapping[str, int]]:
        """Replaces class indices by class names; returns each row's labels and the model's index of each class name.

        Every class name of the data set must be a label of the model, in any order. If the model has default names and
        as many labels as the data set has classes, the method keeps the data set's indices.
        """
        classes = column.classes
        if self.has_default_names and len(classes) == len(self.names):
            return list(sets), {str(index): index for index in range(len(classes))}
        index_by_name = self._index_names(classes)
        missing_names = [name for name in classes if name not in index_by_name]
        if missing_names:
            raise DataError(
                f"{column.source} has the labels {', '.join(classes)}; the model has {', '.join(self.names)}.",
                "Use data with the model's labels, or rename the labels in the model's config.json (id2label).",
            )
        name_by_index = {str(index): name for index, name in enumerate(classes)}
        return [[name_by_index.get(value, value) for value in members] for members in sets], index_by_name

    def _index_names(self, values: Sequence[str]) -> dict[str, int]:
        """Maps label names to indices; ignores case, unless two of the model's names differ only in case."""
        index_by_name = {label: index for index, label in enumerate(self.names)}
        index_by_folded_name = {label.casefold(): index for label, index in index_by_name.items()}
        if len(index_by_folded_name) < len(self.names):
            return index_by_name
        return {
            **{
                value: index_by_folded_name[value.casefold()]
                for value in values
                if value.casefold() in index_by_folded_name
            },
            **index_by_name,
        }

    def _unknown_label_error(self, value: str, number: int, column: Column) -> DataError:
        if value == "-1":
            fault = "the label is -1, as in GLUE's test sets, whose labels are not public"
            return column.row_error(number, fault, "Use a split with labels, such as the validation set.")
        choices = ", ".join(f"{index} {name}" for index, name in enumerate(self.names))
        fault = f"the label {value!r} is not one of the model's labels ({choices})"
        return column.row_error(number, fault, "Use only names, or only indices, in the label column.")


SST2_LABELS = LabelSet(("NEGATIVE", "POSITIVE"))


def task_of(config: Mapping[str, Any]) -> str:
    """Returns the task of the model with this config.json; any value of its `problem_type` is possible.

    A sequence classifier with one label and without a problem_type is a regression model, as in the library
    transformers.
    """
    architectures = config.get("architectures")
    if isinstance(architectures, list) and any(str(name).endswith(TOKEN_HEAD) for name in architectures):
        return TOKENS
    labels = config.get("id2label")
    is_single = isinstance(labels, dict) and len(labels) == 1
    return str(config.get("problem_type") or (REGRESSION if is_single else SINGLE))


def task_of_facts(facts: Mapping[str, Any]) -> str:
    """Returns the task in the facts of a manifest.

    A manifest of an older toolchain has only the fact ``multi_label``.
    """
    return str(facts.get("task", MULTI if facts.get("multi_label") else SINGLE))


def number(answer: Answer) -> float:
    """Returns an answer that is not the answer of token classification."""
    assert not isinstance(answer, tuple)
    return answer


def _token_targets(answer: Answer, row: Tokens) -> list[int]:
    """Returns the target of each token of a row; see `LabelSet.targets`."""
    assert isinstance(answer, tuple)
    targets = [IGNORED] * len(row)
    for label, position in zip(answer, row.words, strict=True):
        if position is not None:
            targets[position] = label
    return targets


def label_set(column: Column, names: Sequence[str], task: str) -> LabelSet:
    """Derives the labels of a new model from a label column.

    A model for regression has one output, whose name is ``score``, or the only name in `names`.

    The argument `names` sets the label names. If `names` is empty, the label names are the class names of the data set.
    If `names` is empty and the data set has no class names, the label names are the values of the column in
    alphabetical order. Column values 0, 1 and so on become the label names LABEL_0, LABEL_1 and so on.

    Args:
        column: The label column.
        names: Names of the labels; empty to take the names from `column`.
        task: The task, one of `TASKS`. A column with lists makes a multi-label model instead of a single-label model.

    Raises:
        DataError: There are fewer than two labels, or more than `MAX_LABELS`. For regression: the column has only one
            value, or `names` has several names.
    """
    if task == REGRESSION:
        return _score_label(column, names)
    if task == SINGLE:
        _check_for_other_task(column)
        if any(isinstance(value, tuple) for value in column.values):
            task = MULTI
    members = [_members(value, number, column, task) for number, value in enumerate(column.values, start=1)]
    values = {value for row in members for value in row}
    if not names:
        numbers = {str(index) for index in range(len(values))}
        names = column.classes or (
            [f"LABEL_{index}" for index in range(len(values))] if values == numbers else sorted(values)
        )
    if len(values) < 2 or len(names) < 2:
        value_list = ", ".join(map(repr, sorted(values))) or "none"
        raise DataError(
            f"{column.source} has only one label ({value_list}); a classifier needs at least two.",
            "Add rows with another label.",
        )
    if task == TOKENS and (fault := check_names(names)):
        raise DataError(
            f"{column.source} has the labels {', '.join(names)}, but {fault}.",
            "Write the label of each word in the BIO scheme: B-KIND, I-KIND or O.",
        )
    if len(names) > MAX_LABELS:
        raise DataError(
            f"{column.source} has {len(names)} different labels; the limit is {MAX_LABELS}.",
            "If another column holds the labels, name that column with --label-column. If the labels are scores, add "
            "--regression.",
        )
    return LabelSet(tuple(names), task)


def _check_for_other_task(column: Column) -> None:
    """Raises `DataError` if the labels of a new classifier of texts look like labels of words, or like scores."""
    lists = [value for value in column.values if isinstance(value, tuple)]
    if lists and not check_names([label for value in lists for label in value]):
        raise DataError(f"The labels of {column.source} mark entities in words.", "Add --entities to find entities.")
    if any(isinstance(value, str) and _FRACTION.fullmatch(value.strip()) for value in column.values):
        raise DataError(
            f"{column.source} has labels with a fraction, such as scores.", "Add --regression to predict a score."
        )


def _score_label(column: Column, names: Sequence[str]) -> LabelSet:
    """Returns the label of a new regression model; raises `DataError` for several names or equal scores."""
    if len(names) > 1:
        raise DataError(f"A regression model has one score, not {len(names)} labels.", "Leave out --labels.")
    labels = LabelSet(tuple(names) or ("score",), REGRESSION)
    scores = set(labels.answers(column))
    if len(scores) < 2:
        raise DataError(
            f"All scores of {column.source} are {scores.pop() if scores else 'missing'}.", "Add rows with other scores."
        )
    return labels


def _read_score(value: Value, number: int, column: Column) -> float:
    """Returns the score of a row; raises `DataError` if the value is not a finite number."""
    try:
        score = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        fault = f"the label {value!r} is not a number, but the model answers with a score"
        raise column.row_error(number, fault, "Name the column of scores with --label-column.")
    return score


def _members(value: Value, number: int, column: Column, task: str) -> tuple[str, ...]:
    """Returns the labels of a row; raises `DataError` if the row holds a list but the model answers with one label."""
    if isinstance(value, tuple):
        if task == SINGLE:
            raise column.row_error(
                number, "the label is a list, but the model answers with one label", "Use data with one label per text."
            )
        return value
    if task == SINGLE:
        return (value.strip(),)
    if task == TOKENS:
        return tuple(value.split())
    return tuple(part for part in (part.strip() for part in value.split(SEPARATOR)) if part)


def answers(logits: np.ndarray, task: str, rows: Sequence[Tokens] = ()) -> list[Answer]:
    """Returns the model's answer for each row of `logits`.

    An answer is the index of the largest logit. For a multi-label model, an answer is a set of labels as bits: bit i is
    1 if logit i is above 0. For regression, an answer is the logit. For token classification, an answer is the label of
    each word, which is the label of the word's first token. If truncation removed a word, its label is
    `Tokens.outside`.

    Args:
        logits: Array of shape [batch, labels], or [batch, tokens, labels] for token classification.
        task: Task of the model, one of `TASKS`.
        rows: Token ids of each row, padded on the right in `logits`; needed for token classification only.
    """
    if task == TOKENS:
        return [
            tuple(row.outside if position is None else int(labels[position]) for position in row.words)
            for labels, row in zip(logits.argmax(axis=-1), rows, strict=True)
        ]
    if task == REGRESSION:
        return [float(score) for score in logits[:, 0]]
    if task == SINGLE:
        return [int(index) for index in logits.argmax(axis=1)]
    return [sum(1 << index for index, is_present in enumerate(row) if is_present) for row in (logits > 0).tolist()]


def margins(logits: np.ndarray, task: str) -> np.ndarray:
    """Returns an array with the margin of each row of `logits`, whose shape is [batch, labels].

    The margin is the largest logit minus the second largest. For a multi-label model, the margin is the smallest
    distance of a logit from 0. The scores of a regression have no margin. In token classification, each word is a row.
    """
    import numpy as np

    if task == MULTI:
        return np.asarray(np.abs(logits).min(axis=1))
    sorted_logits = np.sort(logits, axis=1)
    return np.asarray(sorted_logits[:, -1] - sorted_logits[:, -2])


def label_probabilities(logits: np.ndarray, task: str) -> np.ndarray:
    """Returns the label probabilities in float64, of shape [batch, labels].

    The probabilities are the softmax of the logits, or the sigmoid for a multi-label model. A regression has no
    probabilities, so its array has the shape [batch, 0]. In token classification, the array has the shape of `logits`.
    """
    import numpy as np

    logits64 = logits.astype(np.float64)
    if task == REGRESSION:
        return logits64[:, :0]
    if task == MULTI:
        return np.asarray(1 / (1 + np.exp(-logits64)))
    exponentials = np.exp(logits64 - logits64.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def divergence(reference_logits: np.ndarray, logits: np.ndarray, task: str) -> float:
    """Returns the mean Kullback-Leibler divergence of two models' output distributions, in nats.

    For regression, each score is the mean of a normal distribution whose variance is 1. The divergence of two such
    distributions is half the squared difference of their means.

    Args:
        reference_logits: Logits of the reference model, of shape [batch, labels]. In token classification, each token
            is a row.
        logits: Logits of the other model, of the same shape.
        task: Task of both models, one of `TASKS`.
    """
    import numpy as np

    if task == REGRESSION:
        return float(np.square(reference_logits.astype(np.float64) - logits).mean() / 2)
    reference, other = (_outcome_log_probabilities(x, task) for x in (reference_logits, logits))
    return max(0.0, float((np.exp(reference) * (reference - other)).sum(axis=1).mean()))


def _outcome_log_probabilities(logits: np.ndarray, task: str) -> np.ndarray:
    """Returns the log-probabilities of the labels as a float64 array.

    For a single-label model, the array has the shape [batch, labels]. For a multi-label model, the array has the shape
    [batch, 2 × labels]. In the first half of a multi-label row, value i is the log-probability that the text has label
    i. In the second half, value i is the log-probability that the text does not have label i.
    """
    import numpy as np

    logits64 = logits.astype(np.float64)
    if task == MULTI:
        return np.concatenate([-np.logaddexp(0, -logits64), -np.logaddexp(0, logits64)], axis=1)
    logits64 -= logits64.max(axis=1, keepdims=True)
    return np.asarray(logits64 - np.log(np.exp(logits64).sum(axis=1, keepdims=True)))
