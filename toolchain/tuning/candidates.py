"""What tuning may try: settings of pruning, recovery and quantisation, and what one outcome says of others."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from toolchain.artifacts.variants import Export, Optimize, Prune, Quantize, Recover, Step, child
from toolchain.build.trimming import TRAIN

LABEL = "tune"
OBJECTIVES = ("latency", "throughput", "size")
DEPTHS = (67, 50, 100)  # per cent of the layers that stay
RATIOS = (0, 30, 40, 50, 60, 64, 67, 70, 73, 76, 80, 84, 88, 92)
EPOCHS = (0, 1, 4)
KEPT = (0, 1, 2, 4)
OUTWEIGHS = 10  # points of ratio
OTHERWISE = 0.3  # points of accuracy that another quantisation may bring

Training = tuple[int, str, int, int]  # ratio, cost, depth, epochs: what those share that need to be trained but once


@dataclass(frozen=True)
class Candidate:
    """`ratio` per cent of the encoder pruned at a `cost`, `epochs` of recovery, then int8 or int4 by `scheme`, tables
    by `embeddings`, `keep_fp32` linear layers left out, the vocabulary `trimmed` to that of the training data; of the
    encoder's layers `depth` per cent stay."""

    ratio: int = 0
    cost: str = "parameters"
    epochs: int = 0
    scheme: str = "dynamic"
    embeddings: str = "int8"
    keep_fp32: int = 0
    trimmed: bool = False
    depth: int = 100

    def __str__(self) -> str:
        depth = f", {self.depth} % of the layers" if self.depth < 100 else ""
        pruned = f"{self.ratio} % pruned by {self.cost}{depth}, {self.epochs} epochs" if self.ratio else "not pruned"
        kept = f", {self.keep_fp32} linear layers in fp32" if self.keep_fp32 else ""
        trimmed = ", vocabulary trimmed" if self.trimmed else ""
        return f"{pruned}, {self.scheme}, tables {self.embeddings}{kept}{trimmed}"

    @property
    def quantisation(self) -> tuple[str | int | bool, ...]:
        """How it is quantised."""
        return (self.scheme, self.embeddings, self.keep_fp32, self.trimmed)

    @functools.cached_property
    def kind(self) -> tuple[str | int | bool, ...]:
        """What must be the same for one candidate to say something of another."""
        return (self.depth, self.cost, self.scheme, self.embeddings, self.trimmed)

    @property
    def training(self) -> Training:
        """What it shares with those that are only quantised otherwise."""
        return (self.ratio, self.cost, self.depth, self.epochs)

    def cut_as_far_as(self, other: Candidate) -> bool:
        """Whether at least as much is pruned, in the same way."""
        return (self.depth, self.cost) == (other.depth, other.cost) and self.ratio >= other.ratio

    @property
    def untrained(self) -> Candidate:
        """The same without recovery: as fast and as large."""
        return replace(self, epochs=0)

    def layers(self, of: int) -> int | None:
        """How many stay `of` so many; None for all."""
        return max(1, round(of * self.depth / 100)) if self.depth < 100 else None

    def steps(self, layers: int) -> list[Step]:
        """From the imported checkpoint on, whose encoder has so many `layers`."""
        pruning = Prune(self.ratio / 100, cost=self.cost, layers=self.layers(layers))
        found: list[Step] = [pruning] if self.ratio else []
        if self.ratio and self.epochs:
            found.append(Recover(self.epochs))
        own = "int4" if self.scheme == "int4" else "int8"
        tables = self.embeddings if self.embeddings != own else None
        last = Quantize(
            scheme=self.scheme,
            embeddings=tables,
            keep_fp32=self.keep_fp32 or None,
            trim_vocab=TRAIN if self.trimmed else None,
        )
        return [*found, Export(), Optimize.for_provider("cpu"), last]

    def chain(self, layers: int) -> dict[str, Step]:
        """Variant → the step that makes it, in order, for a model of so many `layers`; the last is the candidate.
        Labels say what names do not: the same settings, the same name."""
        kept = self.layers(layers)
        structure = "-".join(
            [LABEL, *(["latency"] if self.cost == "latency" else []), *([f"{kept}layers"] if kept else [])]
        )
        steps = self.steps(layers)
        last = "-".join(
            [
                structure if self.ratio else LABEL,
                *([f"{self.embeddings}tables"] if steps[-1].embeddings else []),  # type: ignore[union-attr]
                *([f"keep{self.keep_fp32}"] if self.keep_fp32 else []),
                *(["trimmed"] if self.trimmed else []),
            ]
        )
        found: dict[str, Step] = {}
        name = "torch-fp32"
        for step in steps:
            label = last if isinstance(step, Quantize) else structure if self.ratio else ""
            name = child(name, step, label).name
            if label:
                found[name] = step
        return found


# What each objective lets tuning vary; the rest stays as the first value.
_FAST: dict[str, Sequence[str | int | bool]] = {
    "ratio": RATIOS,
    "depth": DEPTHS,
    "cost": ("latency", "parameters"),
    "epochs": EPOCHS,
    "scheme": ("dynamic", "static"),
    "embeddings": ("int8",),
    "keep_fp32": KEPT,
    "trimmed": (False,),
}
_SMALL: dict[str, Sequence[str | int | bool]] = {
    **_FAST,
    "depth": (100, 67),  # layers less make a model faster, and no smaller than neurons less
    "cost": ("parameters",),
    "scheme": ("int4", "dynamic", "static"),
    "embeddings": ("int4", "int8"),
    "trimmed": (True, False),
}
SPACE = {"latency": _FAST, "throughput": _FAST, "size": _SMALL}


@functools.cache
def _unpruned(objective: str) -> list[Candidate]:
    """The candidates that are quantised only, those with the fewest layers in fp32 first."""
    return sorted((each for each in every(objective) if not each.ratio), key=lambda each: each.keep_fp32)


def as_baseline(objective: str) -> Candidate:
    """The candidate that is quantised as `onnx-int8` is."""
    return next(each for each in _unpruned(objective) if each.quantisation == Candidate().quantisation)


def first(objective: str, ratio: int, epochs: int, given_up: Container[Candidate] = ()) -> Candidate:
    """What is tried at that ratio before anything else. It is quantised as the first of the unpruned candidates that
    was not `given_up`."""
    unpruned = _unpruned(objective)
    plain = next((each for each in unpruned if each not in given_up), unpruned[0])
    return replace(plain, ratio=ratio, epochs=epochs if ratio else 0)


def next_start(
    objective: str, over: Mapping[Training, float], given_up: Container[Candidate], allowed: float
) -> Candidate | None:
    """What is tried before sampling: the largest ratio that keeps the accuracy, with one epoch by bisection, then with
    more from there upwards, since these bring a step or two and cost more each; None when that is known. `over` says of
    what was trained how many points more it loses than the `allowed`, quantised as it loses least; what was `given_up`
    does not keep the accuracy.

    Longer training was seen to halve what is lost: what loses up to twice the allowed with one epoch is trained longer
    before the ratio that needs no more than one is bracketed.
    """
    return _climbed(objective, over, given_up, allowed) or _climbed(objective, over, given_up, 0.0)


def _climbed(
    objective: str, over: Mapping[Training, float], given_up: Container[Candidate], near: float
) -> Candidate | None:
    low = 0
    for epochs in EPOCHS[1:]:
        high = len(RATIOS)
        ladder = [first(objective, ratio, epochs, given_up) for ratio in RATIOS]
        if ladder[0].training not in over and ladder[0] not in given_up:
            return ladder[0]
        while high - low > 1:
            middle = (low + high) // 2 if epochs == EPOCHS[1] else low + 1
            candidate = ladder[middle]
            kept = over.get(candidate.untrained.training, math.inf) <= 0
            if not kept and candidate.training not in over and candidate not in given_up:
                return candidate
            excess = 0.0 if kept else over.get(candidate.training, math.inf)
            low, high = (middle, high) if excess <= 0 else (low, middle)
            if 0 < excess <= near and epochs < EPOCHS[-1]:
                low = middle - 1
                break
    return None


def hopeless(objective: str, candidate: Candidate, known: Mapping[Candidate, bool]) -> bool:
    """Whether what is known of others says that the candidate need not be built.

    More pruning is faster and smaller and loses more; more training loses less; more in fp32 is slower, larger and
    loses less. By `OUTWEIGHS` more pruning, with no more layers, is faster than any other way to weigh, quantise and
    exclude.
    """
    if candidate in known:
        return True
    for other, kept in known.items():
        alike = other.kind == candidate.kind
        further = other.ratio >= candidate.ratio + OUTWEIGHS and other.depth <= candidate.depth and objective != "size"
        if kept and (further or (alike and other.ratio >= candidate.ratio and other.keep_fp32 <= candidate.keep_fp32)):
            return True
        loses = other.ratio <= candidate.ratio and other.epochs >= candidate.epochs
        if alike and not kept and loses and other.keep_fp32 >= candidate.keep_fp32:
            return True
    return False


@functools.cache
def every(objective: str) -> tuple[Candidate, ...]:
    """All that an objective lets tuning try; of what is not pruned, one for all costs, depths and epochs."""
    names, choices = zip(*SPACE[objective].items(), strict=True)
    found = (Candidate(**dict(zip(names, values, strict=True))) for values in itertools.product(*choices))
    plain = {name: choices[names.index(name)][0] for name in ("depth", "cost")}
    return tuple(each for each in found if each.ratio or each == replace(each, **plain, epochs=0))


def worthwhile(
    among: Iterable[Candidate], objective: str, known: Mapping[Candidate, bool], given_up: Container[Candidate]
) -> list[Candidate]:
    """Those that may still be better than what is known."""
    return [each for each in among if each not in given_up and not hopeless(objective, each, known)]
