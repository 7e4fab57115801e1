"""Batches of sentences as tensors, sorted by length to reduce padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import MULTI, REGRESSION, SINGLE, Answer

if TYPE_CHECKING:
    import torch


# Correct answers of all rows, in the form that a loss needs; the property `inputs.Data.targets` returns this type.
Targets = Sequence[int] | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Batch:
    """One batch of rows as tensors.

    Attributes:
        inputs: The model's inputs by name, each int64 of shape [batch, sequence].
        labels: Correct answers. If each row has one label, they are int64 of shape [batch]. For a multi-label model,
            they are float32 of shape [batch, labels]. For regression, they are float32 of shape [batch].
        rows: Indices of the batch's rows in the data.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    rows: list[int]

    @property
    def task(self) -> str:
        """Returns the task of the model that has these labels."""
        if self.labels.dim() == 2:
            return MULTI
        return REGRESSION if self.labels.is_floating_point() else SINGLE

    @property
    def answers(self) -> list[Answer]:
        """Returns the correct answer of each row, as in `toolchain.data.labels`."""
        values = self.labels.tolist()
        if self.task == MULTI:
            return [sum(1 << i for i, is_set in enumerate(row) if is_set) for row in values]
        return list(values)


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


def task_loss(logits: torch.Tensor, part: Batch, reduction: str = "mean") -> torch.Tensor:
    """Returns the loss of a batch's logits on its labels.

    The loss is the cross-entropy. For a multi-label model, the loss is the binary cross-entropy, summed over the labels
    of each row. For regression, the loss is the squared error.

    Args:
        logits: The model's logits, of shape [batch, labels].
        part: The batch; its labels may lie on another device than `logits`.
        reduction: How to combine the losses of the rows: ``mean`` or ``sum``.
    """
    from torch.nn import functional

    labels = part.labels.to(logits.device)
    if part.task == SINGLE:
        return functional.cross_entropy(logits, labels, reduction=reduction)
    if part.task == REGRESSION:
        return functional.mse_loss(logits[:, 0], labels, reduction=reduction)
    row_losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    return row_losses.sum() if reduction == "sum" else row_losses.mean()
