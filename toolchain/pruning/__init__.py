"""Structured pruning: the heads and FFN neurons that matter least are cut out of the matrices, and the rest is fitted.

`prune` composes the parts: importance (and depth) → selection → cut and fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from toolchain.errors import PruningError
from toolchain.models.architectures import layers_of, layout_of
from toolchain.pruning.costs import EncoderSizes
from toolchain.pruning.least_squares import cut_and_fit
from toolchain.pruning.selection import Price, select
from toolchain.pruning.subject import Subject
from toolchain.training.loop import accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEARCHED = tuple(percent / 100 for percent in range(5, 100, 5))


def prune(
    subject: Subject,
    ratio: float,
    method: str,
    price: Price,
    progress: Callable[[int], None],
    layers: int | None = None,
) -> PreTrainedModel:
    """The subject's model with at least `ratio` of its encoder's linear parameters removed, and all but so many
    `layers`, fitted, not trained.

    `price` is what importance is weighed against; `progress` is told of every layer done. Raises `PruningError` where
    so much cannot go, `DataError` where the gradients are not finite.
    """
    emptied = subject.dispensable(layers) if layers is not None else []
    kept = select(subject.importances(method), ratio, EncoderSizes.of(subject.model), price, emptied)
    model = copy.deepcopy(subject.model)
    cut_and_fit(subject.model, model, kept, subject.ranking, progress)
    return model


def mask(model: PreTrainedModel, ratio: float) -> PreTrainedModel:
    """The model with the `ratio` of weakest rows (L2) of every linear layer of the encoder set to zero, biases kept.

    `torch.nn.utils.prune.ln_structured` made permanent: nothing gets smaller, and nothing gets faster.
    """
    from torch.nn.utils import prune as masks

    layout, masked = layout_of(model), copy.deepcopy(model)
    for layer in layers_of(masked):
        for path in (layout.query, layout.key, layout.value, layout.output, layout.up, layout.down):
            module = layer.get_submodule(path)
            masks.ln_structured(module, "weight", amount=ratio, n=2, dim=0)
            masks.remove(module, "weight")
    return masked


def largest_ratio(
    subject: Subject,
    method: str,
    price: Price,
    max_drop: float,
    progress: Callable[[int, int, str], None],
    layers: int | None = None,
) -> tuple[float, list[tuple[float, float]]]:
    """The largest of `SEARCHED` ratios whose accuracy on the held-out rows drops by at most `max_drop` points.

    Found by bisection, which takes a larger ratio to be no better than a smaller one; no training. Also returns every
    ratio tried with its drop. Raises `PruningError` where none keeps the accuracy.
    """
    before = accuracy(subject.model, subject.held_out)
    tried: dict[float, float] = {}
    low, high = -1, len(SEARCHED)
    rounds = (len(SEARCHED) + 1).bit_length()
    while high - low > 1:
        middle = (low + high) // 2
        ratio = SEARCHED[middle]
        progress(len(tried), rounds, f"ratio {ratio:g}")
        try:
            model = prune(subject, ratio, method, price, lambda layer: None, layers)
        except PruningError:
            high = middle  # more than this model has
            continue
        tried[ratio] = 100 * (before - accuracy(model, subject.held_out))
        low, high = (middle, high) if tried[ratio] <= max_drop else (low, middle)
    if low < 0:
        raise PruningError(
            f"Even the smallest ratio tried, {SEARCHED[0]:g}, loses more than {max_drop:g} points on held-out rows"
            + (f" ({tried[SEARCHED[0]]:.2f})." if SEARCHED[0] in tried else "."),
            "Allow a larger --max-drop, or prune at a --ratio with --recover.",
        )
    return SEARCHED[low], sorted(tried.items())
