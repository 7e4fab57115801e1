"""Sentences as tensors, sorted by length into batches that waste little on padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.data.inputs import Encoder, pad

if TYPE_CHECKING:
    import torch


Targets = Sequence[int] | Sequence[Sequence[float]]  # as `inputs.Data.targets` gives them


@dataclass(frozen=True)
class Batch:
    """`inputs`: int64 [batch, sequence] by name; `labels`: int64 [batch], or of sets of labels float32 [batch, labels];
    `rows`: which rows of the data these are."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    rows: list[int]


def batches(ids: Sequence[Sequence[int]], labels: Targets, encoder: Encoder, size: int) -> list[Batch]:
    """All rows in batches of `size`, shortest first."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    return [batch(order[i : i + size], ids, labels, encoder) for i in range(0, len(order), size)]


def batch(
    rows: Sequence[int], ids: Sequence[Sequence[int]], labels: Targets, encoder: Encoder, multiple: int = 1
) -> Batch:
    """These rows as one batch, as wide as its longest row or the next `multiple`, within what the model takes."""
    import torch

    chosen = [ids[row] for row in rows]
    width = min(-(-max(map(len, chosen)) // multiple) * multiple, encoder.max_length)
    arrays = pad(chosen, encoder.names, encoder.pad_id, width=width)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(inputs, torch.tensor([labels[row] for row in rows]), list(rows))


def task_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of `logits` [batch, labels] with a batch's labels; of sets, summed over the labels of each."""
    from torch.nn import functional

    if labels.dim() == 1:
        return functional.cross_entropy(logits, labels, reduction=reduction)
    each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    return each.sum() if reduction == "sum" else each.mean()


def right(logits: torch.Tensor, labels: torch.Tensor) -> int:
    """How many rows are answered as a batch's labels say; a set counts where all of it is right."""
    if labels.dim() == 1:
        return int((logits.argmax(1) == labels).sum())
    return int(((logits > 0) == labels.bool()).all(1).sum())
