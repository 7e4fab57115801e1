"""Predictions of a PyTorch model for batches of rows, on the model's device and in its precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from toolchain.data import labels
from toolchain.training.batches import Batch, count_correct

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH = 64  # number of rows in a batch for scoring


def accuracy(model: PreTrainedModel, rows: list[Batch]) -> float:
    """Returns the share of rows with a correct prediction."""
    correct = sum(count_correct(logits, part.labels) for part, logits in _logits(model, rows))
    return correct / sum(len(part.labels) for part in rows)


def answers(model: PreTrainedModel, rows: list[Batch], multi: bool) -> Iterator[tuple[int, int]]:
    """Yields every row's index and predicted answer, which is encoded as in `toolchain.data.labels.answers`."""
    for part, logits in _logits(model, rows):
        yield from zip(part.rows, labels.answers(logits.float().numpy(), multi), strict=True)


def _logits(model: PreTrainedModel, rows: list[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
    import torch

    device = next(model.parameters()).device
    for part in rows:
        with torch.inference_mode():
            yield part, model(**{name: t.to(device) for name, t in part.inputs.items()}).logits.cpu()
