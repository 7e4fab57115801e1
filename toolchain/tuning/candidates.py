"""Candidates of a search, and rules that skip a candidate because of the measurements of other candidates."""

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
DEPTHS = (67, 50, 100)  # per cent of the encoder's layers to keep
RATIOS = (0, 30, 40, 50, 60, 64, 67, 70, 73, 76, 80, 84, 88, 92)
EPOCHS = (0, 1, 4)
FP32_LAYERS = (0, 1, 2, 4)
# `is_hopeless` treats a model as faster than another model if its pruning ratio is at least this many percentage points
# higher.
RATIO_MARGIN = 10
REQUANTISATION_GAIN = 0.3  # Percentage points of accuracy that a trained model may gain from a different quantisation.

# The settings `ratio`, `cost`, `depth` and `epochs` of a candidate. If two candidates have equal values of these four
# settings, the search trains only one model for both candidates.
Training = tuple[int, str, int, int]


@dataclass(frozen=True)
class Candidate:
    """Settings of pruning, recovery and quantisation that tuning can try.

    Attributes:
        ratio: Per cent of the encoder's linear parameters to prune; 0 for no pruning.
        cost: Cost of a head or neuron, ``parameters`` or ``latency``. Pruning removes the heads and neurons with the
            lowest ratio of importance to cost.
        epochs: Epochs of recovery; 0 for no training.
        scheme: Quantisation scheme; ``dynamic`` and ``static`` give int8 weights, and ``int4`` gives int4 weights.
        embeddings: Data type of the embedding tables, ``int8`` or ``int4``.
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
        parts = ["not pruned"]
        if self.ratio:
            parts = [f"{self.ratio} % of the linear parameters pruned with --cost {self.cost}"]
            parts += [f"{self.depth} % of the layers kept"] if self.depth < 100 else []
            parts += [f"{self.epochs} epochs of recovery"]
        parts += [f"{self.scheme} quantisation", f"{self.embeddings} embedding tables"]
        parts += [f"{self.keep_fp32} linear layers in fp32"] if self.keep_fp32 else []
        parts += ["trimmed vocabulary"] if self.trimmed else []
        return ", ".join(parts)

    @property
    def quantisation(self) -> tuple[str | int | bool, ...]:
        """Returns the settings of the quantisation."""
        return (self.scheme, self.embeddings, self.keep_fp32, self.trimmed)

    @functools.cached_property
    def kind(self) -> tuple[str | int | bool, ...]:
        """Returns the settings `depth`, `cost`, `scheme`, `embeddings` and `trimmed`.

        If two candidates differ in one of these settings, `is_hopeless` does not compare their numbers of fp32 layers.
        """
        return (self.depth, self.cost, self.scheme, self.embeddings, self.trimmed)

    @property
    def training(self) -> Training:
        """Returns the settings of pruning and recovery; candidates with equal settings differ only in quantisation."""
        return (self.ratio, self.cost, self.depth, self.epochs)

    def prunes_as_much_as(self, other: Candidate) -> bool:
        """Returns whether `other` has equal `depth` and `cost`, and at most the pruning ratio of this candidate."""
        return (self.depth, self.cost) == (other.depth, other.cost) and self.ratio >= other.ratio

    @property
    def untrained(self) -> Candidate:
        """Returns the same candidate without recovery, which has the same speed and size."""
        return replace(self, epochs=0)

    def layers(self, total: int) -> int | None:
        """Returns how many of the encoder's `total` layers to keep; None means all."""
        return max(1, round(total * self.depth / 100)) if self.depth < 100 else None

    def steps(self, layers: int, exits: float | None = None) -> list[Step]:
        """Returns the build steps after the step `import`, for an encoder with `layers` layers.

        Args:
            layers: Number of layers of the model's encoder.
            exits: Weight of exits in the recovery, as in `Recover`.
        """
        steps: list[Step] = []
        if self.ratio:
            steps.append(Prune(self.ratio / 100, cost=self.cost, layers=self.layers(layers)))
            if self.epochs:
                steps.append(Recover(self.epochs, exits=exits))
        scheme_type = "int4" if self.scheme == "int4" else "int8"
        tables = self.embeddings if self.embeddings != scheme_type else None
        quantisation = Quantize(
            scheme=self.scheme,
            embeddings=tables,
            keep_fp32=self.keep_fp32 or None,
            trim_vocab=TRAIN if self.trimmed else None,
        )
        return [*steps, Export(), Optimize.for_provider("cpu"), quantisation]

    def chain(self, layers: int, exits: float | None = None) -> dict[str, Step]:
        """Returns the candidate's labelled variants in build order, each with the step that builds it.

        The last returned variant is the candidate's quantised model, which the search measures. A variant's label holds
        the settings that the rest of the name does not show. Variants with equal settings have equal names.

        Args:
            layers: Number of layers of the model's encoder.
            exits: Weight of exits in the recovery, as in `Recover`.
        """
        layer_count = self.layers(layers)
        structure = "-".join(
            [
                LABEL,
                *(["latency"] if self.cost == "latency" else []),
                *([f"{layer_count}layers"] if layer_count else []),
            ]
        )
        steps = self.steps(layers, exits)
        quantised_label = "-".join(
            [
                structure if self.ratio else LABEL,
                *([f"{self.embeddings}tables"] if steps[-1].embeddings else []),  # type: ignore[union-attr]
                *([f"keep{self.keep_fp32}"] if self.keep_fp32 else []),
                *(["trimmed"] if self.trimmed else []),
            ]
        )
        chain: dict[str, Step] = {}
        name = "torch-fp32"
        for step in steps:
            label = quantised_label if isinstance(step, Quantize) else structure if self.ratio else ""
            name = derive_variant(name, step, label).name
            if label:
                chain[name] = step
        return chain


# The values to try for each setting of a candidate, by objective. The settings `depth` and `cost` only affect pruning,
# so an unpruned candidate always has their first values.
_FAST: dict[str, Sequence[str | int | bool]] = {
    "ratio": RATIOS,
    "depth": DEPTHS,
    "cost": ("latency", "parameters"),
    "epochs": EPOCHS,
    "scheme": ("dynamic", "static"),
    "embeddings": ("int8",),
    "keep_fp32": FP32_LAYERS,
    "trimmed": (False,),
}
_SMALL: dict[str, Sequence[str | int | bool]] = {
    **_FAST,
    # Among models of equal size, fewer layers improve only the speed, so the objective ``size`` tries fewer depths than
    # the objective ``latency``.
    "depth": (100, 67),
    "cost": ("parameters",),
    "scheme": ("int4", "dynamic", "static"),
    "embeddings": ("int4", "int8"),
    "trimmed": (True, False),
}
SPACE = {"latency": _FAST, "throughput": _FAST, "size": _SMALL}


@functools.cache
def _unpruned_candidates(objective: str) -> list[Candidate]:
    """Returns the candidates without pruning, starting with those that have the fewest fp32 layers."""
    return sorted(
        (candidate for candidate in all_candidates(objective) if not candidate.ratio),
        key=lambda candidate: candidate.keep_fp32,
    )


def baseline_candidate(objective: str) -> Candidate:
    """Returns the unpruned candidate with the quantisation of `onnx-int8`."""
    return next(
        candidate for candidate in _unpruned_candidates(objective) if candidate.quantisation == Candidate().quantisation
    )


def first_candidate(objective: str, ratio: int, epochs: int, given_up: Container[Candidate] = ()) -> Candidate:
    """Returns the candidate to try first at a pruning ratio.

    The candidate has the quantisation of the first unpruned candidate that is not in `given_up`.
    """
    unpruned = _unpruned_candidates(objective)
    unpruned_candidate = next((candidate for candidate in unpruned if candidate not in given_up), unpruned[0])
    return replace(unpruned_candidate, ratio=ratio, epochs=epochs if ratio else 0)


def next_start(
    objective: str, excess_drops: Mapping[Training, float], given_up: Container[Candidate], max_drop: float
) -> Candidate | None:
    """Returns the next candidate in the search for the largest pruning ratio within the allowed accuracy drop.

    First, the search trains each candidate for one epoch, and finds the largest pruning ratio by bisection. Then the
    search trains each candidate for more than one epoch. In this second part, the search raises the pruning ratio by
    one entry of the list `RATIOS` at a time. More epochs raise the largest pruning ratio by only one or two entries of
    `RATIOS`, so the second part needs few of the longer trainings. When `next_start` returns None, Optuna's sampler
    proposes the candidates.

    In experiments, longer training halved the accuracy drop. If one epoch leaves up to twice the allowed accuracy drop,
    the search next tries more epochs at the same pruning ratio.

    Args:
        objective: Objective of the search, one of `OBJECTIVES`.
        excess_drops: For each training, the accuracy drop of its best quantisation minus `max_drop`, in points.
        given_up: Candidates that the search does not try again; they count as failed.
        max_drop: Largest allowed accuracy drop, in percentage points.

    Returns:
        The next candidate, or None if the largest pruning ratio within the allowed accuracy drop is already known.
    """
    return _climb(objective, excess_drops, given_up, max_drop) or _climb(objective, excess_drops, given_up, 0.0)


def _climb(
    objective: str, excess_drops: Mapping[Training, float], given_up: Container[Candidate], tolerance: float
) -> Candidate | None:
    low = 0
    for epochs in EPOCHS[1:]:
        high = len(RATIOS)
        ladder = [first_candidate(objective, ratio, epochs, given_up) for ratio in RATIOS]
        if ladder[0].training not in excess_drops and ladder[0] not in given_up:
            return ladder[0]
        while high - low > 1:
            middle = (low + high) // 2 if epochs == EPOCHS[1] else low + 1
            candidate = ladder[middle]
            keeps = excess_drops.get(candidate.untrained.training, math.inf) <= 0
            if not keeps and candidate.training not in excess_drops and candidate not in given_up:
                return candidate
            excess = 0.0 if keeps else excess_drops.get(candidate.training, math.inf)
            low, high = (middle, high) if excess <= 0 else (low, middle)
            if 0 < excess <= tolerance and epochs < EPOCHS[-1]:
                low = middle - 1
                break
    return None


def is_hopeless(objective: str, candidate: Candidate, kept_by_candidate: Mapping[Candidate, bool]) -> bool:
    """Returns whether the measured candidates show that `candidate` need not be built.

    The function assumes that more pruning makes a model faster, smaller and less accurate. It assumes that more
    training makes a model more accurate. It assumes that more fp32 layers make a model slower, larger and more
    accurate. For the objectives ``latency`` and ``throughput``, the function makes one more assumption about two models
    A and B. It assumes that A is faster than B if the pruning ratio of A is at least `RATIO_MARGIN` percentage points
    higher, and A does not have more layers than B. This last assumption holds even if A and B differ in the setting
    `cost`, in quantisation or in the number of fp32 layers.

    Args:
        objective: Objective of the search, one of `OBJECTIVES`.
        candidate: The candidate to check.
        kept_by_candidate: For each measured candidate, whether its accuracy drop is within the limit.
    """
    if candidate in kept_by_candidate:
        return True
    for other, keeps in kept_by_candidate.items():
        same_kind = other.kind == candidate.kind
        prunes_more = (
            other.ratio >= candidate.ratio + RATIO_MARGIN and other.depth <= candidate.depth and objective != "size"
        )
        if keeps and (
            prunes_more or (same_kind and other.ratio >= candidate.ratio and other.keep_fp32 <= candidate.keep_fp32)
        ):
            return True
        is_easier = other.ratio <= candidate.ratio and other.epochs >= candidate.epochs
        if same_kind and not keeps and is_easier and other.keep_fp32 >= candidate.keep_fp32:
            return True
    return False


@functools.cache
def all_candidates(objective: str) -> tuple[Candidate, ...]:
    """Returns every candidate for an objective. Cost, depth and epochs vary only for pruned candidates."""
    names, choices = zip(*SPACE[objective].items(), strict=True)
    combinations = (Candidate(**dict(zip(names, values, strict=True))) for values in itertools.product(*choices))
    unpruned_settings = {name: choices[names.index(name)][0] for name in ("depth", "cost")}
    return tuple(
        candidate
        for candidate in combinations
        if candidate.ratio or candidate == replace(candidate, **unpruned_settings, epochs=0)
    )


def select_worthwhile(
    candidates: Iterable[Candidate],
    objective: str,
    kept_by_candidate: Mapping[Candidate, bool],
    given_up: Container[Candidate],
) -> list[Candidate]:
    """Returns the candidates that may still be better than the measured candidates."""
    return [
        candidate
        for candidate in candidates
        if candidate not in given_up and not is_hopeless(objective, candidate, kept_by_candidate)
    ]
