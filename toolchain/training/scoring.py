"""Predictions of a PyTorch model for batches of rows, on the model's device and in its precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from toolchain.data import labels
from toolchain.data.labels import REGRESSION, Answer
from toolchain.results.scores import Accuracy, RegressionScore, score_answers
from toolchain.training.batches import Batch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH = 64  # number of rows in a batch for scoring


def score(model: PreTrainedModel, rows: list[Batch]) -> float:
    """Returns the accuracy of the model on the rows, or R² for regression."""
    predictions = [answer for _, answer in answers(model, rows)]
    return score_answers(predictions, [answer for part in rows for answer in part.answers], rows[0].task).value


def score_name(rows: list[Batch]) -> str:
    """Returns the name of the score that `score` returns."""
    return (RegressionScore if rows[0].task == REGRESSION else Accuracy).name


def answers(model: PreTrainedModel, rows: list[Batch]) -> Iterator[tuple[int, Answer]]:
    """Yields every row's index and predicted answer, as in `toolchain.data.labels.answers`."""
    for part, logits in _logits(model, rows):
        yield from zip(part.rows, labels.answers(logits.float().numpy(), part.task), strict=True)


def _logits(model: PreTrainedModel, rows: list[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
    import torch

    device = next(model.parameters()).device
    for part in rows:
        with torch.inference_mode():
            yield part, model(**{name: t.to(device) for name, t in part.inputs.items()}).logits.cpu()
