"""Which layers of an encoder can go whole, found by leaving them out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolchain.errors import PruningError
from toolchain.models.architectures import keep, layers_of
from toolchain.training.batches import Batch, task_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SENTENCES = 512


def dispensable(model: PreTrainedModel, layers: int, batches: Sequence[Batch]) -> list[int]:
    """The layers that go so that so many `layers` stay, ascending: one after the other the one without which the loss
    on the first `SENTENCES` sentences of `batches` is least, nothing fitted. The first layer stays.

    What gradients say of each layer apart does not add up: any one of the last may go, but hardly all. Raises
    `PruningError` where the model has fewer layers.
    """
    count = len(layers_of(model))
    if not 1 <= layers <= count:
        raise PruningError(f"{layers} layers cannot stay: the model has {count}.", f"Keep 1 to {count}.")
    gone: list[int] = []
    while count - len(gone) > layers:
        rest = (index for index in range(1, count) if index not in gone)
        gone.append(min(rest, key=lambda index: _loss(model, [*gone, index], batches)))
    return sorted(gone)


def _loss(model: PreTrainedModel, gone: Sequence[int], batches: Sequence[Batch]) -> float:
    import torch

    shallow = copy.deepcopy(model)
    for index in gone:
        keep(shallow, index, (), ())
    total, seen = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            if seen >= SENTENCES:
                break
            total += float(task_loss(shallow(**batch.inputs).logits, batch.labels, "sum"))
            seen += len(batch.labels)
    return total / seen
