"""What a PyTorch model answers to rows in batches, on its device and in its own precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from toolchain.data import labels
from toolchain.training.batches import Batch, right

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH = 64  # rows at once where nothing is learnt


def accuracy(model: PreTrainedModel, rows: list[Batch]) -> float:
    """Share of right answers."""
    found = sum(right(logits, part.labels) for part, logits in _logits(model, rows))
    return found / sum(len(part.labels) for part in rows)


def answers(model: PreTrainedModel, rows: list[Batch], multi: bool) -> Iterator[tuple[int, int]]:
    """The answer to every row, as `toolchain.data.labels` has them: (row, answer)."""
    for part, logits in _logits(model, rows):
        yield from zip(part.rows, labels.answers(logits.float().numpy(), multi), strict=True)


def _logits(model: PreTrainedModel, rows: list[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
    import torch

    device = next(model.parameters()).device
    for part in rows:
        with torch.inference_mode():
            yield part, model(**{name: t.to(device) for name, t in part.inputs.items()}).logits.cpu()
