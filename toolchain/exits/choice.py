"""Chooses the layers and the confidence threshold of exits on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Artifact
from toolchain.data.labels import MULTI, SINGLE, label_probabilities
from toolchain.errors import GraphError, VerdictError

if TYPE_CHECKING:
    import numpy as np

CONFIDENT_TASKS = (SINGLE, MULTI)  # tasks whose predictions have a confidence
MOST_EXITS = 4
CONFIDENCES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999)
# The small operators of an exit take about as much time as a product with this number of weights, at batch 1.
EXIT_WEIGHTS = 300_000


@dataclass(frozen=True)
class HeldOut:
    """Predictions of the heads and of the graph for held-out rows.

    Attributes:
        confidences: Confidence of each head for each row, of shape [heads, rows].
        right: Whether the prediction for each row is right, of shape [heads + 1, rows]. The last line is for the graph.
        layer_weights: Number of weights of each encoder layer.
    """

    confidences: np.ndarray
    right: np.ndarray
    layer_weights: tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """The effect of one confidence threshold on held-out rows.

    Attributes:
        confidence: Confidence threshold, the smallest confidence with which a text exits.
        drop: Accuracy drop below the graph without exits, in percentage points.
        shares: Share of the rows that use each exit.
        work: Mean work of a row, relative to the graph without exits.
    """

    confidence: float
    drop: float
    shares: tuple[float, ...]
    work: float


@dataclass(frozen=True)
class Choice:
    """The chosen exits: their layers, the chosen point, and the points of all thresholds."""

    layers: tuple[int, ...]
    point: Point
    curve: tuple[Point, ...]


def require_confidences(artifact: Artifact) -> None:
    """Raises `GraphError` if the model of the artifact does not classify texts."""
    if artifact.label_set.task not in CONFIDENT_TASKS:
        raise GraphError(
            f"{artifact.manifest.variant} does not classify texts, so its predictions have no confidence.",
            "Leave exits out.",
        )


def confidences(logits: np.ndarray, task: str) -> np.ndarray:
    """Returns the confidence of a head for each text, as `ExitHead.confidence` describes it, of shape [texts]."""
    import numpy as np

    probabilities = label_probabilities(logits, task)
    if task == MULTI:
        return np.asarray(np.maximum(probabilities, 1 - probabilities).min(axis=1))
    return np.asarray(probabilities.max(axis=1))


def choose(held_out: HeldOut, max_drop: float, layers: Sequence[int] | None) -> Choice:
    """Chooses the exits with the least expected work whose accuracy drop is at most `max_drop`.

    Args:
        held_out: Predictions for the held-out rows.
        max_drop: Largest accuracy drop, in percentage points.
        layers: Layers of the exits; None to choose up to `MOST_EXITS` of them.

    Raises:
        VerdictError: Every choice exceeds `max_drop`, or saves no work.
    """
    count = len(held_out.confidences)
    candidates = (
        [tuple(layers)]
        if layers is not None
        else [chosen for size in range(1, MOST_EXITS + 1) for chosen in combinations(range(count), size)]
    )
    best: Choice | None = None
    for candidate in candidates:
        curve = tuple(_point(held_out, candidate, confidence) for confidence in CONFIDENCES)
        allowed = [point for point in curve if point.drop <= max_drop and point.work < 1]
        if allowed:
            choice = Choice(candidate, min(allowed, key=lambda point: point.work), curve)
            if best is None or choice.point.work < best.point.work:
                best = choice
    if best is None:
        raise VerdictError(
            f"No exits save work at an accuracy drop of at most {max_drop:g} points on the held-out rows.",
            "Allow a larger drop with --max-drop, or leave exits out.",
        )
    return best


def _point(held_out: HeldOut, layers: Sequence[int], confidence: float) -> Point:
    """Returns the effect of exits after these layers on the held-out rows."""
    import numpy as np

    rows = held_out.right.shape[1]
    is_left, right = np.ones(rows, bool), held_out.right[-1].copy()
    total = sum(held_out.layer_weights)
    work, shares, done = 0.0, [], 0
    for layer in layers:
        work += is_left.mean() * (sum(held_out.layer_weights[done:layer]) + EXIT_WEIGHTS)
        done = layer
        exits = is_left & (held_out.confidences[layer] >= confidence)
        right[exits] = held_out.right[layer][exits]
        is_left &= ~exits
        shares.append(round(float(exits.mean()), 4))
    work += is_left.mean() * sum(held_out.layer_weights[done:])
    drop = 100 * (int(held_out.right[-1].sum()) - int(right.sum())) / rows
    return Point(confidence, round(drop, 3), tuple(shares), round(float(work) / total, 4))
