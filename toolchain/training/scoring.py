"""Predictions of a PyTorch model for batches of rows, on the model's device and in its precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.data import labels
from toolchain.data.labels import IGNORED, TOKENS, Answer, LabelSet
from toolchain.results.scores import score_answers, score_type
from toolchain.training.batches import Batch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH = 64  # number of rows in a batch for scoring


def score(model: PreTrainedModel, rows: list[Batch]) -> float:
    """Returns the score of the model on the rows: accuracy, R² for regression, or F1 of entities."""
    predictions = [answer for _, answer in answers(model, rows)]
    return score_answers(
        predictions, [answer for part in rows for answer in part.answers], _label_set(model, rows)
    ).value


def score_name(model: PreTrainedModel, rows: list[Batch]) -> str:
    """Returns the name of the score that `score` returns."""
    return score_type(_label_set(model, rows)).name


def _label_set(model: PreTrainedModel, rows: list[Batch]) -> LabelSet:
    names: Mapping[Any, str] = model.config.id2label or {}
    return LabelSet(tuple(names[index] for index in range(len(names))), rows[0].task)


def answers(model: PreTrainedModel, rows: list[Batch]) -> Iterator[tuple[int, Answer]]:
    """Yields every row's index and predicted answer, as in `toolchain.data.labels.answers`.

    In token classification, the answer holds only the words that have a label in the batch.
    """
    for part, logits in _logits(model, rows):
        if part.task == TOKENS:
            for row, labels_of_row, predicted in zip(part.rows, part.labels, logits.argmax(-1), strict=True):
                yield row, tuple(predicted[labels_of_row != IGNORED].tolist())
        else:
            yield from zip(part.rows, labels.answers(logits.float().numpy(), part.task), strict=True)


def _logits(model: PreTrainedModel, rows: list[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
    import torch

    device = next(model.parameters()).device
    for part in rows:
        with torch.inference_mode():
            yield part, model(**{name: t.to(device) for name, t in part.inputs.items()}).logits.cpu()
