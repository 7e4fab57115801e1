"""Selects the heads and FFN neurons to remove in all layers at once, by the ratio of lost importance to saved cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from toolchain.errors import PruningError
from toolchain.pruning.costs import EncoderSizes
from toolchain.pruning.importance import Importance, LayerImportance

BLOCK = 32  # neurons are removed in blocks of this size, because kernels compute on full vectors
MOST_SWAPS = 2000


@dataclass(frozen=True)
class KeptUnits:
    """Indices of the heads and neurons that one layer keeps, in ascending order."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


Price = Callable[[str, int], float]


@dataclass(frozen=True)
class _Group:
    """One layer's heads or neurons, least important first, with the numbers of units that the layer may keep."""

    layer: int
    kind: str
    order: list[int]
    # Possible numbers of units to keep, in descending order: from all units to 0, or to 1 for the first layer's heads.
    counts: list[int]
    losses: list[float]  # The importance that the layer loses for each number of kept units in `counts`.


@dataclass(frozen=True)
class _Reduction:
    """A possible reduction of one layer's heads or neurons, with its ratio of lost importance to saved cost."""

    group: int
    count: int
    density: float


def select(
    importances: Sequence[LayerImportance],
    ratio: float,
    encoder: EncoderSizes,
    price: Price,
    empty_layers: Collection[int] = (),
) -> list[KeptUnits]:
    """Selects the units that every layer keeps, so that the model loses the least importance.

    A group is either the heads of one layer, or the neurons of one layer in blocks of `BLOCK` neurons. Each group of
    units has a curve: the lost importance as a function of the saved cost. Each point of the curve stands for a number
    of units to keep. The function computes the lower convex hull of each curve. Each segment of a hull connects two
    points of the curve. A segment stands for a possible reduction, from a larger to a smaller number of kept units.
    The function sorts the reductions of all groups by the ratio of lost importance to saved cost, lowest first. The
    function applies the sorted reductions until the share `ratio` of the parameters is removed. This greedy order of
    the reductions is the Lagrangian solution of the knapsack problem.

    After the reductions, `rearrange` may replace kept units of a group by removed units of the same group, because
    pairs of units interact. The first layer always keeps at least one head. Without any head, the model cannot combine
    the tokens of a sentence. If a layer loses all its heads, pruning refits the preceding LayerNorm, but no LayerNorm
    of the encoder precedes the first layer.

    Args:
        importances: The importances of each layer's heads and neurons, first layer to last.
        ratio: Minimum share of the encoder's linear parameters to remove.
        encoder: Sizes of the unpruned encoder.
        price: Function that returns the cost of a group by its kind, ``heads`` or ``neurons``, and its number of units.
        empty_layers: Indices of layers that keep no unit.

    Returns:
        The units that each layer keeps, first layer to last.

    Raises:
        PruningError: The encoder cannot lose the share `ratio` of its parameters.
    """
    groups = _build_groups(importances)
    counts = _choose_counts(groups, ratio * encoder.parameters, encoder, price, empty_layers)
    if counts is None:
        highest_ratio = 1 - encoder.unit_parameters("heads", 1) / encoder.parameters
        raise PruningError(
            f"A ratio of {ratio:g} would remove the entire encoder.",
            f"One attention head must stay, so the highest ratio of this model is {int(100 * highest_ratio) / 100:g}.",
        )
    kept_units: dict[tuple[int, str], tuple[int, ...]] = {}
    for group, count in zip(groups, counts, strict=True):
        layer = importances[group.layer]
        importance = layer.heads if group.kind == "heads" else layer.neurons
        kept_units[group.layer, group.kind] = rearrange(importance, group.order[len(group.order) - count :])
    return [KeptUnits(kept_units[layer, "heads"], kept_units[layer, "neurons"]) for layer in range(len(importances))]


def _build_groups(importances: Sequence[LayerImportance]) -> list[_Group]:
    groups = []
    for layer, importance in enumerate(importances):
        for kind, units, block in (("heads", importance.heads, 1), ("neurons", importance.neurons, BLOCK)):
            unit_costs = units.unit_costs
            order = unit_costs.argsort(stable=True).tolist()
            total = len(order)
            least_count = 1 if (layer, kind) == (0, "heads") else 0
            counts = sorted({total, *range(least_count, total, block)}, reverse=True)
            sums = [0.0, *unit_costs[order].cumsum(0).tolist()]
            # `sums[n]` is the sum of the importances of the first n units in `order`. If all heads or all neurons of a
            # layer are removed, the larger number counts: their joint importance, or the sum of their importances.
            sums[-1] = max(sums[-1], float(units.moment.sum()))
            groups.append(_Group(layer, kind, order, counts, [sums[total - count] for count in counts]))
    return groups


def _choose_counts(
    groups: Sequence[_Group], target: float, encoder: EncoderSizes, price: Price, empty_layers: Collection[int]
) -> list[int] | None:
    """Returns the number of units that each group keeps; None if the groups cannot lose `target` parameters.

    The groups of the layers in `empty_layers` keep no unit.
    """
    reductions = sorted(
        (
            reduction
            for index, group in enumerate(groups)
            if group.layer not in empty_layers
            for reduction in _hull_reductions(index, group, price)
        ),
        key=lambda reduction: reduction.density,
    )
    counts = [0 if group.layer in empty_layers else group.counts[0] for group in groups]
    removed = sum(
        encoder.unit_parameters(group.kind, group.counts[0]) for group in groups if group.layer in empty_layers
    )
    for reduction in reductions:
        if removed >= target:
            break
        kind = groups[reduction.group].kind
        removed += encoder.unit_parameters(kind, counts[reduction.group]) - encoder.unit_parameters(
            kind, reduction.count
        )
        counts[reduction.group] = reduction.count
    return counts if removed >= target else None


def _hull_reductions(index: int, group: _Group, price: Price) -> list[_Reduction]:
    """Returns the possible reductions of a group of units, sorted by the ratio of lost importance to saved cost."""
    points = [
        (price(group.kind, group.counts[0]) - price(group.kind, count), loss, count)
        for count, loss in zip(group.counts, group.losses, strict=True)
    ]
    hull: list[tuple[float, float, int]] = []
    for saving, loss, count in points:
        if hull and saving <= hull[-1][0]:
            continue  # by measured costs, a larger number of units may cost no more than a smaller number
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-1], (saving, loss)):
            hull.pop()
        hull.append((saving, loss, count))
    return [_Reduction(index, end[2], _slope(start, end)) for start, end in itertools.pairwise(hull)]


def _slope(start: tuple[float, ...], end: tuple[float, ...]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def rearrange(importance: Importance, kept: Sequence[int]) -> tuple[int, ...]:
    """Selects `len(kept)` units to keep, so that the removed units have a small joint importance.

    Each round swaps one removed unit with one kept unit, and chooses the swap that lowers the joint importance of the
    removed units most. The function stops when no swap lowers the joint importance, or after `MOST_SWAPS` rounds. The
    method is the mask rearrangement of Kwon et al. 2022.

    Args:
        importance: Importance of one layer's heads or neurons.
        kept: Indices of the units that are kept before the first swap.

    Returns:
        Indices of the selected units, in ascending order.
    """
    import torch

    moment = importance.moment
    removed = torch.ones(len(moment), dtype=torch.bool)
    removed[list(kept)] = False
    if removed.all() or not removed.any():
        return tuple(sorted(kept))
    for _ in range(MOST_SWAPS):
        removed_units, kept_units = removed.nonzero().squeeze(1), (~removed).nonzero().squeeze(1)
        joint_costs = moment[:, removed_units].sum(1)
        changes = (
            (moment.diagonal()[removed_units] - 2 * joint_costs[removed_units])[:, None]
            + (moment.diagonal()[kept_units] + 2 * joint_costs[kept_units])[None, :]
            - 2 * moment[removed_units][:, kept_units]
        )
        best = int(changes.argmin())
        row, column = divmod(best, len(kept_units))
        if float(changes[row, column]) >= -1e-12 * float(moment.diagonal().sum()):
            break
        removed[removed_units[row]], removed[kept_units[column]] = False, True
    return tuple((~removed).nonzero().squeeze(1).tolist())
