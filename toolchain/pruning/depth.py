"""Chooses the encoder layers to remove, by the loss of the model without these layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolchain.errors import PruningError
from toolchain.models.architectures import keep_units, layers_of
from toolchain.training.batches import Batch, task_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SENTENCES = 512


def dispensable_layers(model: PreTrainedModel, layers: int, batches: Sequence[Batch]) -> list[int]:
    """Returns the indices of the layers to remove so that `layers` layers remain, in ascending order.

    The function repeatedly removes the layer whose absence raises the loss on `batches` least. The function does not
    refit the remaining weights. The first layer always stays. The importances of single layers do not add up: a model
    can lose any one of its last layers, but not all of them.

    Args:
        model: The unpruned model.
        layers: Number of layers to keep.
        batches: Training sentences; the function uses whole batches until it has `SENTENCES` sentences.

    Raises:
        PruningError: `layers` is below 1 or above the model's number of layers.
    """
    count = len(layers_of(model))
    if not 1 <= layers <= count:
        raise PruningError(f"{layers} layers cannot be kept: the model has {count}.", f"Keep 1 to {count} layers.")
    removed: list[int] = []
    while count - len(removed) > layers:
        candidates = (index for index in range(1, count) if index not in removed)
        removed.append(min(candidates, key=lambda index: _loss_without(model, [*removed, index], batches)))
    return sorted(removed)


def _loss_without(model: PreTrainedModel, removed: Sequence[int], batches: Sequence[Batch]) -> float:
    import torch

    shallow_model = copy.deepcopy(model)
    for index in removed:
        keep_units(shallow_model, index, (), ())
    total_loss, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            if count >= SENTENCES:
                break
            total_loss += float(task_loss(shallow_model(**batch.inputs).logits, batch, "sum"))
            count += len(batch.labels)
    return total_loss / count
