"""What is left after pruning, fitted to what the unpruned model computed: least squares, no training."""

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

RIDGE = 1e-2  # of the Gram matrix's mean diagonal: directions that the sentences hardly show stay as they were


def cut_and_fit(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    kept: Sequence[Kept],
    batches: Sequence[Batch],
    progress: Callable[[int], None],
) -> None:
    """Cuts `model` to `kept`, layer by layer, and fits each sub-block's last linear layer to the dense model's sums.

    Both models are run side by side: the output of attention and of the feed-forward part is fitted by ridge regression
    on what is left of its inputs so that, with the residual that reaches it in the pruned model, it gives the dense
    model's sum before the normalisation. The solution is folded into weights and bias. After Kwon et al. 2022's mask
    tuning, with a matrix in the mask's place. Where a sub-block is gone, the norm before it is fitted to give what the
    dense model's norm behind it gives, channel by channel. `progress` is told of every layer done.
    """
    layout = layout_of(dense)
    dense_states, arguments = _entering(dense, batches)
    states = dense_states
    norms = (layout.attention_norm, layout.output_norm)
    before: Any = None  # the last norm that is left; the first layer has one of its own
    for index in range(len(kept)):
        original, layer = layers_of(dense)[index], layers_of(model)[index]
        keep(model, index, kept[index].heads, kept[index].neurons)
        targets = _entering_modules(original, norms, dense_states, arguments)
        parts = zip((layout.output, layout.down), norms, (kept[index].heads, kept[index].neurons), strict=True)
        entering = True  # what enters the layer is what `before` gives
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
    """What enters the first layer: states [batch, sequence, width]; the other arguments, and which tokens are real."""
    import torch

    states: States = []
    arguments: Arguments = []

    class _Enough(Exception):
        """Ends the forward pass where everything wanted is known."""

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
    # DistilBERT puts its attention's weights before the states, BERT after them.
    parts = answer if isinstance(answer, tuple) else (answer,)
    found: torch.Tensor = next(part for part in parts if part is not None and part.shape == states.shape)
    return found


def _entering_modules(
    layer: nn.Module, paths: Sequence[str], states: States, arguments: Arguments
) -> dict[str, States]:
    """What enters each named module of the layer, one tensor [tokens, width] a batch, padding left out."""
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
    """Fits scale and shift of the `norm` whose result is `given` [tokens, width] so that it comes nearest to `wanted`,
    in least squares, channel by channel; both as they changed."""
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
    """Ridge regression of the change that the linear layer at `path` needs for its sum to reach `targets`."""
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
    ridge[-1] = 0  # the bias is free
    change = torch.linalg.solve(gram + torch.diag(ridge), moment).float()
    with torch.no_grad():
        module.bias += change[-1]
        module.weight += change[:-1].T
