"""Which heads and FFN neurons go: the least importance for what is saved, chosen over all layers at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from toolchain.errors import PruningError
from toolchain.pruning.costs import EncoderSizes
from toolchain.pruning.importance import Importance, LayerImportance

BLOCK = 32  # FFN neurons go by blocks: kernels work on whole vectors
MOST_SWAPS = 2000


@dataclass(frozen=True)
class Kept:
    """The heads and neurons of one layer that stay, in ascending order."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


Price = Callable[[str, int], float]


@dataclass(frozen=True)
class _Group:
    """One sub-block's units, least important first, with the counts it may keep."""

    layer: int
    kind: str
    order: list[int]
    counts: list[int]  # descending from all, to none but for the first layer's heads
    lost: list[float]  # importance lost at each count


@dataclass(frozen=True)
class _Step:
    """From one count of a group to a lower one on its lower convex hull."""

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
    """The units every layer keeps, none in `emptied` ones, so that at least `ratio` of the encoder's linear parameters
    goes for the least importance.

    Every group (a layer's heads, a layer's neurons in blocks) is cut along the lower convex hull of importance over
    `price`, and all groups' cuts are taken in order of importance per price: the Lagrangian solution of the knapsack.
    The first layer keeps a head: without any the model could not read a sentence, and there is no layer before it whose
    norm could stand in for its own. Then within each group, as many units are chosen again with the pairs' interaction
    counted. Raises `PruningError` where that much cannot go.
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
            # A sub-block that goes whole takes what its units do together with it.
            sums[-1] = max(sums[-1], float(units.moment.sum()))
            groups.append(_Group(layer, kind, order, counts, [sums[total - count] for count in counts]))
    return groups


def _cut(
    groups: Sequence[_Group], wanted: float, encoder: EncoderSizes, price: Price, emptied: Collection[int]
) -> list[int] | None:
    """The count each group keeps, none in `emptied` layers, once at least `wanted` parameters are gone; None where that
    cannot be."""
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
    """The group's cuts along its lower convex hull: each loses more importance per price saved than the one before."""
    points = [
        (price(group.kind, group.counts[0]) - price(group.kind, count), lost, count)
        for count, lost in zip(group.counts, group.lost, strict=True)
    ]
    hull: list[tuple[float, float, int]] = []
    for saved, lost, count in points:
        if hull and saved <= hull[-1][0]:
            continue  # as dear as a larger one: a measured price need not fall with every unit
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-1], (saved, lost)):
            hull.pop()
        hull.append((saved, lost, count))
    return [_Step(index, after[2], _slope(before, after)) for before, after in itertools.pairwise(hull)]


def _slope(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def rearrange(importance: Importance, kept: Sequence[int]) -> tuple[int, ...]:
    """As many units as `kept`, chosen so that what is removed costs least together; ascending.

    Swaps the pair that lowers the removed units' joint loss most, until none does: Kwon et al.'s mask rearrangement.
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
