"""Batches of sentences as tensors, sorted by length to reduce padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import IGNORED, MULTI, REGRESSION, SINGLE, TOKENS, Answer, Targets

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """One batch of rows as tensors.

    Attributes:
        inputs: The model's inputs by name, each int64 of shape [batch, sequence].
        labels: Correct answers. If each row has one label, they are int64 of shape [batch]. For a multi-label model,
            they are float32 of shape [batch, labels]. For regression, they are float32 of shape [batch]. For token
            classification, they are int64 of shape [batch, sequence], with `IGNORED` for a token without a label.
        rows: Indices of the batch's rows in the data.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    rows: list[int]

    @property
    def task(self) -> str:
        """Returns the task of the model that has these labels."""
        if self.labels.dim() == 2:
            return MULTI if self.labels.is_floating_point() else TOKENS
        return REGRESSION if self.labels.is_floating_point() else SINGLE

    @property
    def answers(self) -> list[Answer]:
        """Returns the correct answer of each row, as in `toolchain.data.labels`."""
        values = self.labels.tolist()
        if self.task == TOKENS:
            return [tuple(label for label in row if label != IGNORED) for row in values]
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
    return Batch(inputs, _label_tensor([labels[row] for row in rows], width), list(rows))


def _label_tensor(labels: Sequence[Any], width: int) -> torch.Tensor:
    """Converts the targets of a batch's rows to `Batch.labels`; `width` is the width of the batch."""
    import torch

    # A multi-label model has a list of floats for each row, and a token classifier a list of integers.
    if isinstance(labels[0], Sequence) and not any(isinstance(value, float) for row in labels for value in row):
        rows = [torch.tensor(row) for row in labels]
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=IGNORED) for row in rows])
    return torch.tensor(labels)


def task_loss(logits: torch.Tensor, part: Batch, reduction: str = "mean") -> torch.Tensor:
    """Returns the loss of a batch's logits on its labels.

    The loss is the cross-entropy. For a multi-label model, the loss is the binary cross-entropy, summed over the labels
    of each row. For regression, the loss is the squared error. For token classification, each token with a label counts
    as a row.

    Args:
        logits: The model's logits, of shape [batch, labels], or [batch, sequence, labels] for token classification.
        part: The batch; its labels may lie on another device than `logits`.
        reduction: How to combine the losses of the rows: ``mean`` or ``sum``.
    """
    from torch.nn import functional

    labels = part.labels.to(logits.device)
    if part.task == SINGLE:
        return functional.cross_entropy(logits, labels, reduction=reduction)
    if part.task == TOKENS:
        if not (labels != IGNORED).any():
            return logits.sum() * 0
        return functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction
        )
    if part.task == REGRESSION:
        return functional.mse_loss(logits[:, 0], labels, reduction=reduction)
    row_losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    return row_losses.sum() if reduction == "sum" else row_losses.mean()
