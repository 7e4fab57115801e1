"""Least-squares fit of the remaining weights to the states of the unpruned model, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.models.architectures import keep, layers_of, layout_of
from toolchain.pruning.selection import Kept
from toolchain.training.batches import Batch

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

RIDGE = 1e-2  # share of the Gram matrix's mean diagonal: keeps weights for directions that the sentences rarely use


def cut_and_fit(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    kept: Sequence[Kept],
    batches: Sequence[Batch],
    progress: Callable[[int], None],
) -> None:
    """Removes all units of `model` that are not in `kept`, layer by layer, and refits each sub-block.

    Both models run side by side. Ridge regression on the remaining inputs refits the last linear layer of attention and
    of the feed-forward part. The target is the dense model's sum of residual and output, before the LayerNorm. The
    fitted sum contains the residual of the pruned model. The solution is added to the weights and the bias. This
    follows the mask tuning of Kwon et al. 2022, with a matrix in place of the mask.

    When a sub-block keeps no unit, its LayerNorm is removed. The preceding LayerNorm is refitted, channel by channel,
    to match the output of the removed one in the dense model.

    Args:
        dense: The unpruned model.
        model: A copy of the unpruned model, changed in place.
        kept: The heads and neurons to keep, one entry for each layer.
        batches: The sentences for the fit.
        progress: Called with the number of finished layers.
    """
    layout = layout_of(dense)
    dense_states, arguments = _entering(dense, batches)
    states = dense_states
    norms = (layout.attention_norm, layout.output_norm)
    before: Any = None  # the last remaining LayerNorm; the first layer keeps a head and so has one
    for index in range(len(kept)):
        original, layer = layers_of(dense)[index], layers_of(model)[index]
        keep(model, index, kept[index].heads, kept[index].neurons)
        targets = _entering_modules(original, norms, dense_states, arguments)
        parts = zip((layout.output, layout.down), norms, (kept[index].heads, kept[index].neurons), strict=True)
        entering = True  # `before` produces the layer's input, so a refit of it also changes `states`
        for path, norm, units in parts:
            if units:
                _fit(layer, path, norm, states, arguments, targets[norm])
                before, entering = layer.get_submodule(norm), False
                continue
            now = _entering_modules(layer, (norm,), states, arguments)[norm]
            scale, shift = _stand_in(before, now, _through(original.get_submodule(norm), targets[norm]))
            if entering:
                states = [state * scale + shift for state in states]
        dense_states = _run(original, dense_states, arguments)
        states = _run(layer, states, arguments)
        progress(index + 1)


States = list["torch.Tensor"]
Arguments = list[tuple[tuple[Any, ...], dict[str, Any], "torch.Tensor"]]


def _entering(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[States, Arguments]:
    """Returns the first layer's states [batch, sequence, width], and its other arguments with a mask of real tokens."""
    import torch

    states: States = []
    arguments: Arguments = []

    class _Enough(Exception):
        """Ends the forward pass once the first layer's inputs are recorded."""

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        rest = dict(named)
        first = args[0] if args else rest.pop("hidden_states")
        states.append(first.clone())
        arguments.append((args[1:], rest, torch.empty(0)))
        raise _Enough

    handle = layers_of(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in batches:
                try:
                    model(**batch.inputs)
                except _Enough:
                    rest = arguments.pop()
                    arguments.append((rest[0], rest[1], batch.inputs["attention_mask"].bool()))
    finally:
        handle.remove()
    return states, arguments


def _run(layer: nn.Module, states: States, arguments: Arguments) -> States:
    import torch

    with torch.no_grad():
        return [_answer(layer, s, args, named) for s, (args, named, _) in zip(states, arguments, strict=True)]


def _answer(layer: nn.Module, states: torch.Tensor, args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    answer = layer(states, *args, **named)
    # DistilBERT returns its attention weights before the states, BERT after them.
    parts = answer if isinstance(answer, tuple) else (answer,)
    found: torch.Tensor = next(part for part in parts if part is not None and part.shape == states.shape)
    return found


def _entering_modules(
    layer: nn.Module, paths: Sequence[str], states: States, arguments: Arguments
) -> dict[str, States]:
    """Returns the inputs of each named module, one tensor [tokens, width] for each batch, without padding."""
    found: dict[str, States] = {path: [] for path in paths}
    real: list[torch.Tensor] = []

    def recorder(path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            found[path].append(args[0].expand(*real[-1].shape, args[0].shape[-1])[real[-1]])

        return hook

    handles = [layer.get_submodule(path).register_forward_pre_hook(recorder(path)) for path in paths]
    try:
        for state, (args, named, mask) in zip(states, arguments, strict=True):
            real.append(mask)
            _run(layer, [state], [(args, named, mask)])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _through(module: nn.Module, values: States) -> States:
    import torch

    with torch.no_grad():
        return [module(each) for each in values]


def _stand_in(norm: Any, given: States, wanted: States) -> tuple[torch.Tensor, torch.Tensor]:
    """Refits scale and shift of `norm` by least squares, channel by channel, and returns the changes of both.

    `given` [tokens, width] is the output of `norm` before the fit, and `wanted` is the target.
    """
    import torch

    x, y = torch.cat(given), torch.cat(wanted)
    x_mean, y_mean = x.mean(0), y.mean(0)
    variance = (x - x_mean).square().mean(0)
    scale = ((x - x_mean) * (y - y_mean)).mean(0) / variance.clamp_min(torch.finfo(x.dtype).tiny)
    shift = y_mean - scale * x_mean
    with torch.no_grad():
        norm.weight.mul_(scale)
        norm.bias.mul_(scale).add_(shift)
    return scale, shift


def _fit(layer: nn.Module, path: str, norm: str, states: States, arguments: Arguments, targets: States) -> None:
    """Changes the linear layer at `path` by ridge regression so that the sum before `norm` approaches `targets`."""
    import torch

    module: Any = layer.get_submodule(path)
    now = _entering_modules(layer, (path, norm), states, arguments)
    width = module.in_features
    gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    moment = torch.zeros(width + 1, len(module.bias), dtype=torch.float64)
    for number, target in enumerate(targets):
        given = torch.ones(len(target), width + 1)
        given[:, :width] = now[path][number]
        gram += (given.T @ given).double()
        moment += (given.T @ (target - now[norm][number])).double()
    ridge = torch.full((width + 1,), RIDGE * float(gram.diagonal()[:-1].mean()), dtype=torch.float64)
    ridge[-1] = 0  # no penalty on the bias
    change = torch.linalg.solve(gram + torch.diag(ridge), moment).float()
    with torch.no_grad():
        module.bias += change[-1]
        module.weight += change[:-1].T
