"""Structured pruning: removes the least important heads and FFN neurons, then refits the remaining weights.

`prune` runs the parts in this order: importance (and depth) → selection → removal and fit.
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
from toolchain.pruning.setup import PruningSetup
from toolchain.training.loop import accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEARCH_RATIOS = tuple(percent / 100 for percent in range(5, 100, 5))


def prune(
    setup: PruningSetup,
    ratio: float,
    method: str,
    price: Price,
    progress: Callable[[int], None],
    layers: int | None = None,
) -> PreTrainedModel:
    """Returns a pruned copy of the model in `setup`, fitted by least squares and not trained.

    Args:
        setup: The model to prune, with its training sentences.
        ratio: Minimum share of the encoder's linear parameters to remove.
        method: Importance measure, ``fisher`` or ``magnitude``.
        price: Cost of a layer's attention or feed-forward part by its number of heads or neurons. The selection weighs
            importance against this cost.
        progress: Called with the number of finished layers.
        layers: Number of layers to keep; the others are removed before the selection. None removes no layer.

    Raises:
        PruningError: The model cannot lose this share of its parameters, or does not have this many layers.
        DataError: A gradient is not finite.
    """
    empty_layers = setup.dispensable_layers(layers) if layers is not None else []
    kept_units = select(setup.importances(method), ratio, EncoderSizes.from_model(setup.model), price, empty_layers)
    model = copy.deepcopy(setup.model)
    cut_and_fit(setup.model, model, kept_units, setup.ranking, progress)
    return model


def mask(model: PreTrainedModel, ratio: float) -> PreTrainedModel:
    """Returns a copy with the weakest rows (L2 norm) of every linear encoder layer set to zero, a share of `ratio`.

    Biases stay unchanged. The function applies `torch.nn.utils.prune.ln_structured` permanently. The model gets neither
    smaller nor faster.
    """
    from torch.nn.utils import prune as masks

    layout, masked_model = layout_of(model), copy.deepcopy(model)
    for layer in layers_of(masked_model):
        for path in (layout.query, layout.key, layout.value, layout.output, layout.up, layout.down):
            module = layer.get_submodule(path)
            masks.ln_structured(module, "weight", amount=ratio, n=2, dim=0)
            masks.remove(module, "weight")
    return masked_model


def largest_ratio(
    setup: PruningSetup,
    method: str,
    price: Price,
    max_drop: float,
    progress: Callable[[int, int, str], None],
    layers: int | None = None,
) -> tuple[float, list[tuple[float, float]]]:
    """Finds the largest ratio of `SEARCH_RATIOS` whose accuracy drop on the held-out rows is at most `max_drop` points.

    The search is a bisection: it assumes that a larger ratio is never more accurate. It does not train.

    Args:
        setup: The model to prune, with its training sentences.
        method: As in `prune`.
        price: As in `prune`.
        max_drop: Largest allowed accuracy drop, in percentage points.
        progress: Called with the number of measured ratios, the largest possible number and a text.
        layers: As in `prune`.

    Returns:
        The ratio, and every measured ratio with its drop, in ascending order of ratio.

    Raises:
        PruningError: Every ratio has a larger accuracy drop.
    """
    dense_accuracy = accuracy(setup.model, setup.held_out)
    drops: dict[float, float] = {}
    low, high = -1, len(SEARCH_RATIOS)
    rounds = (len(SEARCH_RATIOS) + 1).bit_length()
    while high - low > 1:
        middle = (low + high) // 2
        ratio = SEARCH_RATIOS[middle]
        progress(len(drops), rounds, f"ratio {ratio:g}")
        try:
            model = prune(setup, ratio, method, price, lambda layer: None, layers)
        except PruningError:
            high = middle  # the model cannot lose this share
            continue
        drops[ratio] = 100 * (dense_accuracy - accuracy(model, setup.held_out))
        low, high = (middle, high) if drops[ratio] <= max_drop else (low, middle)
    if low < 0:
        raise PruningError(
            f"Even the smallest ratio, {SEARCH_RATIOS[0]:g}, loses more than {max_drop:g} points on held-out rows"
            + (f" ({drops[SEARCH_RATIOS[0]]:.2f})." if SEARCH_RATIOS[0] in drops else "."),
            "Allow a larger --max-drop, or choose a --ratio and train afterwards with --recover.",
        )
    return SEARCH_RATIOS[low], sorted(drops.items())
