"""Candidates of tuning: their settings, and rules that skip candidates because of known outcomes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from toolchain.artifacts.steps import Export, Optimize, Prune, Quantize, Recover, Step
from toolchain.artifacts.variants import derive_variant
from toolchain.build.trimming import TRAIN

LABEL = "tune"
OBJECTIVES = ("latency", "throughput", "size")
DEPTHS = (67, 50, 100)  # per cent of the layers to keep
RATIOS = (0, 30, 40, 50, 60, 64, 67, 70, 73, 76, 80, 84, 88, 92)
EPOCHS = (0, 1, 4)
KEPT = (0, 1, 2, 4)
OUTWEIGHS = 10  # percentage points of ratio; see `hopeless`
OTHERWISE = 0.3  # points of accuracy that another quantisation may recover

Training = tuple[int, str, int, int]  # ratio, cost, depth, epochs: equal values need one training


@dataclass(frozen=True)
class Candidate:
    """Settings of pruning, recovery and quantisation that tuning can try.

    Attributes:
        ratio: Per cent of the encoder's linear parameters to prune; 0 for no pruning.
        cost: Cost that pruning weighs importance against, ``parameters`` or ``latency``.
        epochs: Epochs of recovery; 0 for no training.
        scheme: Quantisation scheme: ``dynamic`` and ``static`` give int8, ``int4`` gives int4.
        embeddings: Type of the embedding tables, ``int8`` or ``int4``.
        keep_fp32: Number of linear layers that stay fp32.
        trimmed: Whether to drop tokens that do not occur in the training data.
        depth: Per cent of the encoder's layers to keep.
    """

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
        """Returns the settings of the quantisation."""
        return (self.scheme, self.embeddings, self.keep_fp32, self.trimmed)

    @functools.cached_property
    def kind(self) -> tuple[str | int | bool, ...]:
        """Returns the settings in which two candidates must agree before `hopeless` compares their other settings."""
        return (self.depth, self.cost, self.scheme, self.embeddings, self.trimmed)

    @property
    def training(self) -> Training:
        """Returns the settings that it shares with candidates that differ only in quantisation."""
        return (self.ratio, self.cost, self.depth, self.epochs)

    def cut_as_far_as(self, other: Candidate) -> bool:
        """Returns whether this candidate prunes at least as much as `other`, with the same depth and cost."""
        return (self.depth, self.cost) == (other.depth, other.cost) and self.ratio >= other.ratio

    @property
    def untrained(self) -> Candidate:
        """Returns the same candidate without recovery, which has the same speed and size."""
        return replace(self, epochs=0)

    def layers(self, of: int) -> int | None:
        """Returns how many of the encoder's `of` layers to keep; None means all."""
        return max(1, round(of * self.depth / 100)) if self.depth < 100 else None

    def steps(self, layers: int) -> list[Step]:
        """Returns the build steps after the import, for an encoder with `layers` layers."""
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
        """Returns the labelled variants in build order, each with the step that builds it.

        The last variant is the candidate. Labels hold the settings that names omit, so equal settings give equal names.

        Args:
            layers: Number of layers of the model's encoder.
        """
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
            name = derive_variant(name, step, label).name
            if label:
                found[name] = step
        return found


# The choices for each setting, by objective. Unpruned candidates use the first depth and the first cost.
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
    "depth": (100, 67),  # fewer layers make a model faster, but not smaller than fewer neurons do
    "cost": ("parameters",),
    "scheme": ("int4", "dynamic", "static"),
    "embeddings": ("int4", "int8"),
    "trimmed": (True, False),
}
SPACE = {"latency": _FAST, "throughput": _FAST, "size": _SMALL}


@functools.cache
def _unpruned(objective: str) -> list[Candidate]:
    """Returns the candidates without pruning, those with the fewest fp32 layers first."""
    return sorted((each for each in every(objective) if not each.ratio), key=lambda each: each.keep_fp32)


def as_baseline(objective: str) -> Candidate:
    """Returns the unpruned candidate with the quantisation of `onnx-int8`."""
    return next(each for each in _unpruned(objective) if each.quantisation == Candidate().quantisation)


def first(objective: str, ratio: int, epochs: int, given_up: Container[Candidate] = ()) -> Candidate:
    """Returns the candidate to try first at that ratio.

    Its quantisation is that of the first unpruned candidate that is not in `given_up`.
    """
    unpruned = _unpruned(objective)
    plain = next((each for each in unpruned if each not in given_up), unpruned[0])
    return replace(plain, ratio=ratio, epochs=epochs if ratio else 0)


def next_start(
    objective: str, over: Mapping[Training, float], given_up: Container[Candidate], allowed: float
) -> Candidate | None:
    """Returns the next candidate to try before sampling, in a search for the largest ratio that keeps the accuracy.

    The search bisects the ratios with one epoch of training. From that result it climbs one ratio at a time with more
    epochs. More epochs cost more time for each ratio, and gain only a ratio or two.

    In experiments, longer training halved the accuracy drop. So a ratio with up to twice the allowed drop after one
    epoch gets longer training before the bisection ends.

    Args:
        objective: One of `OBJECTIVES`.
        over: Excess accuracy drop of each training in points above `allowed`, for its best quantisation.
        given_up: Candidates that count as not keeping the accuracy.
        allowed: Largest allowed accuracy drop, in percentage points.

    Returns:
        The candidate, or None if the largest ratio is known.
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
    """Returns whether the known outcomes make it unnecessary to build the candidate.

    The function assumes that more pruning makes a model faster, smaller and less accurate. More training makes it more
    accurate. More fp32 layers make it slower, larger and more accurate. With `OUTWEIGHS` points more pruning and no
    more layers, a model is faster for any cost, quantisation and number of fp32 layers. This last rule does not apply
    to the objective ``size``.

    Args:
        objective: One of `OBJECTIVES`.
        candidate: The candidate to check.
        known: For each measured candidate, whether it keeps the accuracy.
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
    """Returns every candidate of an objective. Cost, depth and epochs vary only for pruned candidates."""
    names, choices = zip(*SPACE[objective].items(), strict=True)
    found = (Candidate(**dict(zip(names, values, strict=True))) for values in itertools.product(*choices))
    plain = {name: choices[names.index(name)][0] for name in ("depth", "cost")}
    return tuple(each for each in found if each.ratio or each == replace(each, **plain, epochs=0))


def worthwhile(
    among: Iterable[Candidate], objective: str, known: Mapping[Candidate, bool], given_up: Container[Candidate]
) -> list[Candidate]:
    """Returns the candidates that may still be better than the known outcomes."""
    return [each for each in among if each not in given_up and not hopeless(objective, each, known)]
