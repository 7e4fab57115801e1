"""Importance of each attention head and each FFN neuron, from gradients or from the weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.errors import DataError
from toolchain.models.architectures import head_size, layers_of, layout_of
from toolchain.training.batches import Batch, task_loss

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Importance:
    """Importance of one layer's heads or neurons.

    Attributes:
        moment: Matrix of shape [units, units]. The joint importance of a set of units is the sum of the matrix entries
            whose row and column belong to the set. The diagonal of `moment` holds the importance of each single unit.
    """

    moment: torch.Tensor

    @property
    def unit_costs(self) -> torch.Tensor:
        """Returns the importance of each single unit, a tensor of shape [units]."""
        return self.moment.diagonal()


@dataclass(frozen=True)
class LayerImportance:
    """Importance of one layer's heads and FFN neurons."""

    heads: Importance
    neurons: Importance


def fisher(model: PreTrainedModel, batches: Sequence[Batch]) -> list[LayerImportance]:
    """Returns the empirical Fisher information of a gate on the output of every head and every neuron.

    A gate is a factor with the value 1 that multiplies the output of a unit. The gates multiply the input of the last
    linear layer in a layer's attention or feed-forward part. Each layer gets one matrix of shape [heads, heads] and one
    of shape [neurons, neurons]. Each sentence has its own gates, so one backward pass gives the gradient of every
    sentence. The method is that of Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers".

    Returns:
        One `LayerImportance` for each layer, first to last.

    Raises:
        DataError: A gradient is not finite.
    """
    import torch

    layout, size, layers = layout_of(model), head_size(model), layers_of(model)
    gates: dict[tuple[int, str], torch.Tensor] = {}
    batch_rows = [0]

    def gate_hook(index: int, path: str, width: int):  # type: ignore[no-untyped-def]
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            units = inputs[0].shape[-1] // width
            gate = torch.ones(batch_rows[0], 1, units, requires_grad=True)
            gates[index, path] = gate
            return (inputs[0] * gate.repeat_interleave(width, dim=-1),)

        return hook

    handles = [
        layer.get_submodule(path).register_forward_pre_hook(gate_hook(index, path, width))
        for index, layer in enumerate(layers)
        for path, width in ((layout.output, size), (layout.down, 1))
    ]
    moments: dict[tuple[int, str], torch.Tensor] = {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = 0
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)  # only the gates need gradients
        for batch in batches:
            batch_rows[0] = len(batch.labels)
            gates.clear()
            with torch.enable_grad():
                logits = model(**batch.inputs).logits
                loss = task_loss(logits, batch, "sum")
                gradients = torch.autograd.grad(loss, list(gates.values()))
            for key, gradient in zip(gates, gradients, strict=True):
                flat = gradient.squeeze(1).double()
                moments[key] = moments.get(key, 0) + flat.T @ flat
            count += len(batch.labels)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)
    if not all(torch.isfinite(moment).all() for moment in moments.values()):
        raise DataError(
            "The gradients of the training sentences are not finite, so they cannot rank heads and neurons.",
            "Check the checkpoint for NaN or infinite weights, and check the labels of the training data.",
        )
    return [
        LayerImportance(
            Importance(moments[index, layout.output] / count), Importance(moments[index, layout.down] / count)
        )
        for index in range(len(layers))
    ]


def magnitude(model: PreTrainedModel) -> list[LayerImportance]:
    """Returns the squared L2 norm of the weights of each head and each neuron.

    The importance matrices are diagonal, since norms do not measure how two units interact.
    """
    import torch

    layout, size = layout_of(model), head_size(model)
    importances = []
    with torch.no_grad():
        for layer in layers_of(model):
            rows = {
                path: _squared_weight(layer, path).sum(1)
                for path in (layout.query, layout.key, layout.value, layout.up)
            }
            columns = {path: _squared_weight(layer, path).sum(0) for path in (layout.output, layout.down)}
            channels = rows[layout.query] + rows[layout.key] + rows[layout.value] + columns[layout.output]
            units = channels.reshape(-1, size).sum(1), rows[layout.up] + columns[layout.down]
            importances.append(LayerImportance(*(Importance(torch.diag(values.double())) for values in units)))
    return importances


def _squared_weight(layer: nn.Module, path: str) -> torch.Tensor:
    module: Any = layer.get_submodule(path)
    weight: torch.Tensor = module.weight
    return weight.square()
