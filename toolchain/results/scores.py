"""Scores of a model's answers on labelled data: accuracy, the errors of a regression, or the F1 of entities.

Every score has a `value` of at most 1, and a higher `value` is better. So comparison, limits and searches use the value
of any score in the same way. A result file names a score by its `key`, and tables show its `name`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from toolchain.data.entities import find_entities
from toolchain.data.labels import REGRESSION, TOKENS, Answer, LabelSet, number

DIGITS = 6  # a result file stores the figures of a score with this number of decimals


@dataclass(frozen=True)
class Accuracy:
    """The number of correct predictions on the data set, at one batch size.

    Attributes:
        correct: Number of correct predictions.
        count: Number of predictions.
        batch_size: Number of sentences in a batch.
    """

    correct: int
    count: int
    batch_size: int

    key: ClassVar[str] = "accuracy"
    name: ClassVar[str] = "accuracy"

    @property
    def value(self) -> float:
        """Share of correct predictions, 0 to 1."""
        return self.correct / self.count

    def to_json(self) -> dict[str, Any]:
        """Returns the score as a result file stores it."""
        return {"value": round(self.value, DIGITS), **vars(self)}


@dataclass(frozen=True)
class RegressionScore:
    """The errors of predicted scores on the data set, at one batch size.

    Attributes:
        r2: Coefficient of determination, at most 1: 1 minus the mean squared error divided by the variance of the
            labels. A model that always predicts the mean of the labels has the value 0.
        mean_absolute_error: Mean of the absolute errors.
        root_mean_squared_error: Square root of the mean squared error.
        count: Number of predictions.
        batch_size: Number of sentences in a batch.
    """

    r2: float
    mean_absolute_error: float
    root_mean_squared_error: float
    count: int
    batch_size: int

    key: ClassVar[str] = "regression"
    name: ClassVar[str] = "R²"

    @property
    def value(self) -> float:
        """The coefficient of determination."""
        return self.r2

    def to_json(self) -> dict[str, Any]:
        """Returns the score as a result file stores it."""
        return dict(vars(self))


@dataclass(frozen=True)
class EntityScore:
    """The number of entities that a model finds on the data set, at one batch size.

    An entity counts as found only if its kind, its first word and its last word are right, as in the evaluation of
    CoNLL-2003. See Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task".

    Attributes:
        found: Number of entities that are both in the data and in the predictions.
        predicted: Number of entities in the predictions.
        labelled: Number of entities in the data.
        count: Number of sentences.
        batch_size: Number of sentences in a batch.
    """

    found: int
    predicted: int
    labelled: int
    count: int
    batch_size: int

    key: ClassVar[str] = "entities"
    name: ClassVar[str] = "entity F1"

    @property
    def value(self) -> float:
        """F1 of the entities, 0 to 1; 1 if neither data nor predictions have an entity."""
        total = self.predicted + self.labelled
        return 2 * self.found / total if total else 1.0

    @property
    def precision(self) -> float:
        """Share of the predicted entities that are in the data; 1 without a predicted entity."""
        return self.found / self.predicted if self.predicted else 1.0

    @property
    def recall(self) -> float:
        """Share of the data's entities that are predicted; 1 without an entity in the data."""
        return self.found / self.labelled if self.labelled else 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns the score as a result file stores it."""
        return {"value": round(self.value, DIGITS), **vars(self)}


Score = Accuracy | RegressionScore | EntityScore
SCORES: tuple[type[Score], ...] = (Accuracy, RegressionScore, EntityScore)


def score_type(label_set: LabelSet) -> type[Score]:
    """Returns the type of the score of a model with these labels."""
    types: dict[str, type[Score]] = {REGRESSION: RegressionScore, TOKENS: EntityScore}
    return types.get(label_set.task, Accuracy)


def score_answers(
    answers: Sequence[Answer], labels: Sequence[Answer], label_set: LabelSet, batch_size: int = 1
) -> Score:
    """Returns the score of a model's answers.

    Args:
        answers: The model's answer to each row, as in `toolchain.data.labels`; at least one row.
        labels: The correct answer to each row.
        label_set: Labels and task of the model.
        batch_size: Number of sentences in a batch.
    """
    kind = score_type(label_set)
    if kind is RegressionScore:
        return _score_regression([number(a) for a in answers], [number(a) for a in labels], batch_size)
    if kind is EntityScore:
        found, predicted, labelled = map(sum, zip(*count_entities(answers, labels, label_set), strict=True))
        return EntityScore(found, predicted, labelled, len(labels), batch_size)
    correct = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    return Accuracy(correct, len(labels), batch_size)


def count_entities(
    answers: Sequence[Answer], labels: Sequence[Answer], label_set: LabelSet
) -> list[tuple[int, int, int]]:
    """Returns the number of found, predicted and labelled entities of each sentence; see `EntityScore`."""
    counts = []
    for answer, label in zip(answers, labels, strict=True):
        predicted, labelled = (set(find_entities(_names(each, label_set))) for each in (answer, label))
        counts.append((len(predicted & labelled), len(predicted), len(labelled)))
    return counts


def _names(answer: Answer, label_set: LabelSet) -> list[str]:
    assert isinstance(answer, tuple)
    return [label_set.names[index] for index in answer]


def _score_regression(scores: Sequence[float], labels: Sequence[float], batch_size: int) -> RegressionScore:
    errors = [score - label for score, label in zip(scores, labels, strict=True)]
    count = len(labels)
    squared = math.fsum(error * error for error in errors) / count
    mean = math.fsum(labels) / count
    variance = math.fsum((label - mean) ** 2 for label in labels) / count
    # If all labels are equal, there is no variance to explain: only a perfect model is better than the mean.
    r2 = 1 - squared / variance if variance else float(not squared)
    r2, absolute, root = (
        round(figure, DIGITS) for figure in (r2, math.fsum(map(abs, errors)) / count, math.sqrt(squared))
    )
    return RegressionScore(r2, absolute, root, count, batch_size)
