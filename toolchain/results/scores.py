"""Scores of a model's answers on labelled data: accuracy, or the errors of a regression.

Every score has a `value` of at most 1, and a higher `value` is better. So comparison, limits and searches use the value
of any score in the same way. A result file names a score by its `key`, and tables show its `name`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from toolchain.data.labels import REGRESSION, Answer

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


Score = Accuracy | RegressionScore
SCORES: tuple[type[Score], ...] = (Accuracy, RegressionScore)


def score_answers(answers: Sequence[Answer], labels: Sequence[Answer], task: str, batch_size: int = 1) -> Score:
    """Returns the score of a model's answers.

    Args:
        answers: The model's answer to each row, as in `toolchain.data.labels`; at least one row.
        labels: The correct answer to each row.
        task: Task of the model, one of `toolchain.data.labels.TASKS`.
        batch_size: Number of sentences in a batch.
    """
    if task == REGRESSION:
        return _score_regression(answers, labels, batch_size)
    correct = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    return Accuracy(correct, len(labels), batch_size)


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
