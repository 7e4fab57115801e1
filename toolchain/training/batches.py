"""Batches of sentences as tensors, sorted by length to reduce padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.data.encoding import Encoder, pad

if TYPE_CHECKING:
    import torch


# Class labels of all rows, in the form that a loss needs; the property `inputs.Data.targets` returns this type.
Targets = Sequence[int] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Batch:
    """One batch of rows as tensors.

    Attributes:
        inputs: The model's inputs by name, each int64 of shape [batch, sequence].
        labels: Class labels, int64 of shape [batch], or float32 of shape [batch, labels] for a multi-label model.
        rows: Indices of the batch's rows in the data.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    rows: list[int]


def batches(ids: Sequence[Sequence[int]], labels: Targets, encoder: Encoder, size: int) -> list[Batch]:
    """Returns all rows in batches of `size`, shortest rows first."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    return [batch(order[i : i + size], ids, labels, encoder) for i in range(0, len(order), size)]


def batch(
    rows: Sequence[int], ids: Sequence[Sequence[int]], labels: Targets, encoder: Encoder, multiple: int = 1
) -> Batch:
    """Returns the given rows as one batch.

    The batch's width is the length of the longest row, rounded up to a multiple of `multiple`. The width never exceeds
    the encoder's `max_length`.
    """
    import torch

    token_ids = [ids[row] for row in rows]
    width = min(-(-max(map(len, token_ids)) // multiple) * multiple, encoder.max_length)
    arrays = pad(token_ids, encoder.names, encoder.pad_id, width=width)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(inputs, torch.tensor([labels[row] for row in rows]), list(rows))


def task_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Returns the cross-entropy between a batch's logits and its class labels.

    For a multi-label model, the function returns the binary cross-entropy, summed over the labels of each row.

    Args:
        logits: The model's logits, of shape [batch, labels].
        labels: Class labels of the batch, as in `Batch.labels`.
        reduction: How to combine the losses of the rows: ``mean`` or ``sum``.
    """
    from torch.nn import functional

    if labels.dim() == 1:
        return functional.cross_entropy(logits, labels, reduction=reduction)
    row_losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    return row_losses.sum() if reduction == "sum" else row_losses.mean()


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> int:
    """Counts the rows with a correct prediction.

    For a multi-label model, a row counts only if the predictions for all labels are correct.
    """
    if labels.dim() == 1:
        return int((logits.argmax(1) == labels).sum())
    return int(((logits > 0) == labels.bool()).all(1).sum())
