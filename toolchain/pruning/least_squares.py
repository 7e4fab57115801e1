"""Least-squares fit of the remaining weights to the hidden states of the unpruned model, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.models.architectures import embedding_rank_of, keep_units, layers_of, layout_of
from toolchain.pruning.selection import KeptUnits
from toolchain.training.batches import Batch

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# Ridge penalty, as a share of the Gram matrix's mean diagonal. The penalty keeps the weights nearly unchanged in
# directions that the inputs rarely use.
RIDGE = 1e-2


def cut_and_fit(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    kept_units: Sequence[KeptUnits],
    batches: Sequence[Batch],
    progress: Callable[[int], None],
) -> None:
    """Removes the units of `model` that are not in `kept_units`, and refits the remaining weights, layer by layer.

    The function runs the unpruned and the pruned model side by side. Ridge regression refits the last linear layer of
    each attention and feed-forward part on the inputs that pruning keeps. In each attention and feed-forward part,
    a LayerNorm reads the sum of the residual and the last linear layer's output. The regression fits the input of each
    LayerNorm in the pruned model to the input of the same LayerNorm in the unpruned model. The function adds the
    solution of the regression to the weights and the bias of the linear layer. The method follows the mask tuning of
    Kwon et al. 2022, with a matrix in place of the mask.

    If an attention or feed-forward part keeps no unit, the function removes the LayerNorm of this part. To replace a
    removed LayerNorm, the function refits the preceding LayerNorm, channel by channel, to the removed LayerNorm's
    output in the unpruned model.

    Args:
        dense: The unpruned model.
        model: A copy of the unpruned model, changed in place.
        kept_units: The heads and neurons to keep, one entry for each layer.
        batches: The sentences for the fit.
        progress: Progress callback; receives the number of finished layers.
    """
    layout = layout_of(dense)
    dense_states, arguments = _record_layer_inputs(dense, batches)
    # Embeddings of a low rank differ from those of the unpruned model; the fit also reduces this difference.
    states = dense_states if embedding_rank_of(model) is None else _record_layer_inputs(model, batches)[0]
    norms = (layout.attention_norm, layout.output_norm)
    # `last_norm` is the last LayerNorm that the loop has kept in `model`. Pruning always keeps at least one head of the
    # first layer, and thus the LayerNorm after the attention of this layer. This LayerNorm is the first that the loop
    # visits, so `last_norm` is never None when the loop refits `last_norm`.
    last_norm: Any = None
    for index in range(len(kept_units)):
        original, layer = layers_of(dense)[index], layers_of(model)[index]
        keep_units(model, index, kept_units[index].heads, kept_units[index].neurons)
        targets = _record_module_inputs(original, norms, dense_states, arguments)
        parts = zip(
            (layout.output, layout.down), norms, (kept_units[index].heads, kept_units[index].neurons), strict=True
        )
        # `at_layer_input` is True until the loop keeps a LayerNorm of the current layer. Until then, the output of
        # `last_norm` is the input of the current layer. If the loop refits `last_norm` while `at_layer_input` is True,
        # the loop must also update `states`, the recorded inputs of the current layer.
        at_layer_input = True
        for path, norm, units in parts:
            if units:
                _fit_linear(layer, path, norm, states, arguments, targets[norm])
                last_norm, at_layer_input = layer.get_submodule(norm), False
                continue
            norm_inputs = _record_module_inputs(layer, (norm,), states, arguments)[norm]
            scale, shift = _refit_norm(last_norm, norm_inputs, _apply(original.get_submodule(norm), targets[norm]))
            if at_layer_input:
                states = [state * scale + shift for state in states]
        dense_states = _run_layer(original, dense_states, arguments)
        states = _run_layer(layer, states, arguments)
        progress(index + 1)


States = list["torch.Tensor"]
Arguments = list[tuple[tuple[Any, ...], dict[str, Any], "torch.Tensor"]]


def _record_layer_inputs(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[States, Arguments]:
    """Returns, for each batch, the first layer's input states and a tuple of the layer's further arguments.

    The input states have the shape [batch, sequence, width]. The tuple holds the positional arguments, the keyword
    arguments and the token mask of the batch.
    """
    import torch

    states: States = []
    arguments: Arguments = []

    class _Stop(Exception):
        """Ends the forward pass once the first layer's inputs are recorded."""

    def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        other_keywords = dict(keywords)
        hidden = args[0] if args else other_keywords.pop("hidden_states")
        states.append(hidden.clone())
        arguments.append((args[1:], other_keywords, torch.empty(0)))
        raise _Stop

    handle = layers_of(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in batches:
                try:
                    model(**batch.inputs)
                except _Stop:
                    recorded = arguments.pop()
                    arguments.append((recorded[0], recorded[1], batch.inputs["attention_mask"].bool()))
    finally:
        handle.remove()
    return states, arguments


def _run_layer(layer: nn.Module, states: States, arguments: Arguments) -> States:
    import torch

    with torch.no_grad():
        return [
            _layer_output(layer, state, args, keywords)
            for state, (args, keywords, _) in zip(states, arguments, strict=True)
        ]


def _layer_output(
    layer: nn.Module, states: torch.Tensor, args: tuple[Any, ...], keywords: dict[str, Any]
) -> torch.Tensor:
    result = layer(states, *args, **keywords)
    # DistilBERT returns its attention weights before the states, BERT after them.
    parts = result if isinstance(result, tuple) else (result,)
    output: torch.Tensor = next(part for part in parts if part is not None and part.shape == states.shape)
    return output


def _record_module_inputs(
    layer: nn.Module, paths: Sequence[str], states: States, arguments: Arguments
) -> dict[str, States]:
    """Returns the inputs of each named module, one tensor of shape [tokens, width] for each batch, without padding."""
    inputs_by_path: dict[str, States] = {path: [] for path in paths}
    masks: list[torch.Tensor] = []

    def recorder(path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            inputs_by_path[path].append(args[0].expand(*masks[-1].shape, args[0].shape[-1])[masks[-1]])

        return hook

    handles = [layer.get_submodule(path).register_forward_pre_hook(recorder(path)) for path in paths]
    try:
        for state, (args, keywords, mask) in zip(states, arguments, strict=True):
            masks.append(mask)
            _run_layer(layer, [state], [(args, keywords, mask)])
    finally:
        for handle in handles:
            handle.remove()
    return inputs_by_path


def _apply(module: nn.Module, values: States) -> States:
    import torch

    with torch.no_grad():
        return [module(value) for value in values]


def _refit_norm(norm: Any, outputs: States, targets: States) -> tuple[torch.Tensor, torch.Tensor]:
    """Refits the LayerNorm `norm` by least squares, channel by channel; returns a scale and a shift for each channel.

    `outputs`, of shape [tokens, width], are the outputs of `norm` before the fit. `targets`, of the same shape as
    `outputs`, are the outputs that the fit approaches. After the fit, the outputs of `norm` are its old outputs × scale
    + shift.
    """
    import torch

    x, y = torch.cat(outputs), torch.cat(targets)
    x_mean, y_mean = x.mean(0), y.mean(0)
    variance = (x - x_mean).square().mean(0)
    scale = ((x - x_mean) * (y - y_mean)).mean(0) / variance.clamp_min(torch.finfo(x.dtype).tiny)
    shift = y_mean - scale * x_mean
    with torch.no_grad():
        norm.weight.mul_(scale)
        norm.bias.mul_(scale).add_(shift)
    return scale, shift


def _fit_linear(layer: nn.Module, path: str, norm: str, states: States, arguments: Arguments, targets: States) -> None:
    """Refits the linear layer at `path` by ridge regression, so that the input of `norm` approaches `targets`."""
    import torch

    module: Any = layer.get_submodule(path)
    inputs_by_path = _record_module_inputs(layer, (path, norm), states, arguments)
    width = module.in_features
    gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    moment = torch.zeros(width + 1, len(module.bias), dtype=torch.float64)
    for number, target in enumerate(targets):
        inputs = torch.ones(len(target), width + 1)
        inputs[:, :width] = inputs_by_path[path][number]
        gram += (inputs.T @ inputs).double()
        moment += (inputs.T @ (target - inputs_by_path[norm][number])).double()
    ridge = torch.full((width + 1,), RIDGE * float(gram.diagonal()[:-1].mean()), dtype=torch.float64)
    ridge[-1] = 0  # the ridge penalty does not apply to the bias
    correction = torch.linalg.solve(gram + torch.diag(ridge), moment).float()
    with torch.no_grad():
        module.bias += correction[-1]
        module.weight += correction[:-1].T
