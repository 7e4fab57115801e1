"""Selection of heads and FFN neurons to remove, over all layers at once: least importance lost per cost saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from toolchain.errors import PruningError
from toolchain.pruning.costs import EncoderSizes
from toolchain.pruning.importance import Importance, LayerImportance

BLOCK = 32  # neurons removed together: kernels work on full vectors
MOST_SWAPS = 2000


@dataclass(frozen=True)
class Kept:
    """Indices of the heads and neurons that one layer keeps, in ascending order."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


Price = Callable[[str, int], float]


@dataclass(frozen=True)
class _Group:
    """Units of one sub-block, least important first, with the counts it may keep."""

    layer: int
    kind: str
    order: list[int]
    counts: list[int]  # descending from all units to 0, or to 1 for the first layer's heads
    lost: list[float]  # importance lost at each count


@dataclass(frozen=True)
class _Step:
    """Reduction of a group from one count to a lower one, along its lower convex hull."""

    group: int
    to: int
    density: float


def select(
    importances: Sequence[LayerImportance],
    ratio: float,
    encoder: EncoderSizes,
    price: Price,
    emptied: Collection[int] = (),
) -> list[Kept]:
    """Selects the units that every layer keeps, with the least importance lost.

    A group is one layer's heads, or one layer's neurons in blocks. Each group loses units along the lower convex hull
    of importance over `price`. The function takes these reductions of all groups in order of importance per price. This
    is the Lagrangian solution of the knapsack problem.

    Then it selects the same number of units in each group again, now with the interactions of pairs. The first layer
    keeps at least one head. Without any head the model cannot read a sentence. No earlier layer has a LayerNorm that
    could replace the first layer's.

    Args:
        importances: One entry for each layer.
        ratio: Minimum share of the encoder's linear parameters to remove.
        encoder: Sizes of the unpruned encoder.
        price: Cost of a sub-block by its kind, ``heads`` or ``neurons``, and its number of units.
        emptied: Indices of layers that keep no unit.

    Returns:
        One entry for each layer.

    Raises:
        PruningError: The encoder cannot lose this share of its parameters.
    """
    groups = _groups(importances)
    chosen = _cut(groups, ratio * encoder.parameters, encoder, price, emptied)
    if chosen is None:
        most = 1 - encoder.of_units("heads", 1) / encoder.parameters
        raise PruningError(
            f"At a ratio of {ratio:g} nothing of the encoder would be left.",
            f"One attention head must stay: the highest ratio of this model is {int(100 * most) / 100:g}.",
        )
    kept: dict[tuple[int, str], tuple[int, ...]] = {}
    for group, count in zip(groups, chosen, strict=True):
        layer = importances[group.layer]
        importance = layer.heads if group.kind == "heads" else layer.neurons
        kept[group.layer, group.kind] = rearrange(importance, group.order[len(group.order) - count :])
    return [Kept(kept[layer, "heads"], kept[layer, "neurons"]) for layer in range(len(importances))]


def _groups(importances: Sequence[LayerImportance]) -> list[_Group]:
    groups = []
    for layer, importance in enumerate(importances):
        for kind, units, block in (("heads", importance.heads, 1), ("neurons", importance.neurons, BLOCK)):
            alone = units.alone
            order = alone.argsort(stable=True).tolist()
            total = len(order)
            least = 1 if (layer, kind) == (0, "heads") else 0
            counts = sorted({total, *range(least, total, block)}, reverse=True)
            sums = [0.0, *alone[order].cumsum(0).tolist()]
            # A fully removed sub-block also loses the joint effect of its units.
            sums[-1] = max(sums[-1], float(units.moment.sum()))
            groups.append(_Group(layer, kind, order, counts, [sums[total - count] for count in counts]))
    return groups


def _cut(
    groups: Sequence[_Group], wanted: float, encoder: EncoderSizes, price: Price, emptied: Collection[int]
) -> list[int] | None:
    """Returns each group's count, 0 in `emptied` layers; None if the groups cannot lose `wanted` parameters."""
    steps = sorted(
        (
            step
            for index, group in enumerate(groups)
            if group.layer not in emptied
            for step in _hull(index, group, price)
        ),
        key=lambda step: step.density,
    )
    counts = [0 if group.layer in emptied else group.counts[0] for group in groups]
    gone = sum(encoder.of_units(group.kind, group.counts[0]) for group in groups if group.layer in emptied)
    for step in steps:
        if gone >= wanted:
            break
        kind = groups[step.group].kind
        gone += encoder.of_units(kind, counts[step.group]) - encoder.of_units(kind, step.to)
        counts[step.group] = step.to
    return counts if gone >= wanted else None


def _hull(index: int, group: _Group, price: Price) -> list[_Step]:
    """Returns the reductions along the lower convex hull, in ascending order of importance lost per price saved."""
    points = [
        (price(group.kind, group.counts[0]) - price(group.kind, count), lost, count)
        for count, lost in zip(group.counts, group.lost, strict=True)
    ]
    hull: list[tuple[float, float, int]] = []
    for saved, lost, count in points:
        if hull and saved <= hull[-1][0]:
            continue  # saves no more than a larger count: measured prices may not fall with each unit
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-1], (saved, lost)):
            hull.pop()
        hull.append((saved, lost, count))
    return [_Step(index, after[2], _slope(before, after)) for before, after in itertools.pairwise(hull)]


def _slope(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def rearrange(importance: Importance, kept: Sequence[int]) -> tuple[int, ...]:
    """Selects as many units as `kept` has, so that the removed units have the least joint importance.

    Each round swaps the removed and the kept unit whose swap lowers the joint importance most. The function stops when
    no swap lowers it, or after `MOST_SWAPS` rounds. This is the mask rearrangement of Kwon et al. 2022.

    Args:
        importance: Importance of the group's units.
        kept: Indices of the units to start from.

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
        inside, outside = removed.nonzero().squeeze(1), (~removed).nonzero().squeeze(1)
        joint = moment[:, inside].sum(1)
        change = (
            (moment.diagonal()[inside] - 2 * joint[inside])[:, None]
            + (moment.diagonal()[outside] + 2 * joint[outside])[None, :]
            - 2 * moment[inside][:, outside]
        )
        best = int(change.argmin())
        back, out = divmod(best, len(outside))
        if float(change[back, out]) >= -1e-12 * float(moment.diagonal().sum()):
            break
        removed[inside[back]], removed[outside[out]] = False, True
    return tuple((~removed).nonzero().squeeze(1).tolist())
