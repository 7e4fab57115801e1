"""Structured pruning: removes the least important heads and FFN neurons, then refits the remaining weights.

In order, `prune` chooses layers to remove, measures the importance of units, selects the units to keep, gives the
embedding table a lower rank, removes the other units, and refits the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from toolchain.errors import PruningError
from toolchain.models.architectures import layers_of, layout_of
from toolchain.pruning.costs import EncoderSizes
from toolchain.pruning.least_squares import cut_and_fit
from toolchain.pruning.low_rank import factor_embedding
from toolchain.pruning.selection import Price, select
from toolchain.pruning.setup import PruningSetup
from toolchain.training.scoring import score

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
    embedding_rank: int | None = None,
) -> PreTrainedModel:
    """Returns a pruned copy of the model in `setup`, fitted by least squares and not trained.

    Args:
        setup: The model to prune, with its training sentences.
        ratio: Minimum share of the encoder's linear parameters to remove.
        method: Importance measure, ``fisher`` or ``magnitude``.
        price: Function that returns the cost of a layer's attention or feed-forward part for a number of heads or
            neurons. Pruning removes the units with the lowest ratio of lost importance to saved cost.
        progress: Progress callback; receives the number of finished layers.
        layers: Number of layers to keep; None keeps all layers. Pruning removes entire layers before it selects single
            heads and neurons.
        embedding_rank: Rank of the table of word embeddings, as `Prune` describes; None keeps the table.

    Raises:
        PruningError: The encoder cannot lose the share `ratio` of its parameters, or cannot keep `layers` layers, or
            the embedding table cannot have this rank.
        DataError: A gradient is not finite.
    """
    empty_layers = setup.dispensable_layers(layers) if layers is not None else []
    kept_units = select(setup.importances(method), ratio, EncoderSizes.from_model(setup.model), price, empty_layers)
    model = copy.deepcopy(setup.model)
    if embedding_rank is not None:
        factor_embedding(model, embedding_rank, setup.token_counts)
    cut_and_fit(setup.model, model, kept_units, setup.ranking, progress)
    return model


def mask(model: PreTrainedModel, ratio: float) -> PreTrainedModel:
    """Returns a copy of the model with a share `ratio` of the weight rows of every linear encoder layer set to zero.

    The function chooses the weight rows with the smallest L2 norm; biases stay unchanged. The function applies
    `torch.nn.utils.prune.ln_structured` permanently. The copy is neither smaller nor faster than the model.
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
    embedding_rank: int | None = None,
) -> tuple[float, list[tuple[float, float]]]:
    """Finds the largest ratio of `SEARCH_RATIOS` whose accuracy drop on the held-out rows is at most `max_drop` points.

    The search is a bisection: it assumes that the accuracy never rises with the ratio. The search does not train the
    pruned models.

    Args:
        setup: The model to prune, with its training sentences.
        method: Importance measure, as in `prune`.
        price: Cost function, as in `prune`.
        max_drop: Largest allowed accuracy drop, in percentage points.
        progress: Progress callback; receives three arguments: the number of ratios measured so far, the largest number
            of ratios that the search can measure, and a text.
        layers: Number of layers to keep, as in `prune`.
        embedding_rank: Rank of the table of word embeddings, as in `prune`.

    Returns:
        The largest ratio found, and all measured ratios with their accuracy drops, in ascending order of ratio.

    Raises:
        PruningError: The accuracy drop of every ratio exceeds `max_drop`.
    """
    dense_score = score(setup.model, setup.held_out)
    drops: dict[float, float] = {}
    low, high = -1, len(SEARCH_RATIOS)
    rounds = (len(SEARCH_RATIOS) + 1).bit_length()
    while high - low > 1:
        middle = (low + high) // 2
        ratio = SEARCH_RATIOS[middle]
        progress(len(drops), rounds, f"ratio {ratio:g}")
        try:
            model = prune(setup, ratio, method, price, lambda layer: None, layers, embedding_rank)
        except PruningError:
            high = middle  # the encoder cannot lose the share `ratio` of its parameters
            continue
        drops[ratio] = 100 * (dense_score - score(model, setup.held_out))
        low, high = (middle, high) if drops[ratio] <= max_drop else (low, middle)
    if low < 0:
        raise PruningError(
            f"Even at the smallest ratio, {SEARCH_RATIOS[0]:g}, the pruned model loses more than "
            f"{max_drop:g} points of accuracy on held-out rows"
            + (f" ({drops[SEARCH_RATIOS[0]]:.2f})." if SEARCH_RATIOS[0] in drops else "."),
            "Allow a larger --max-drop, or choose a --ratio and train afterwards with --recover.",
        )
    return SEARCH_RATIOS[low], sorted(drops.items())
