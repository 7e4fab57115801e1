"""Gate: which measured rows are within the limits, which of them to take, and what the others break."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from toolchain.errors import ResultFileError, VerdictError
from toolchain.results.statistics import CONFIDENCE

if TYPE_CHECKING:
    from toolchain.compare.rows import Row

NEAREST = 3  # how many misses are worth naming
_TOLERANCE = 1e-9  # 90 % and 89 % are a point apart, and a little more in binary


@dataclass(frozen=True)
class Limits:
    """What a row may have at most; None limits nothing.

    `max_drop` is in percentage points of accuracy below the row's baseline, `max_p95_ms` the latency at batch 1. A
    megabyte is 10^6 bytes: of the artifact, and of the process at its peak (host memory, on a GPU as well).
    """

    max_drop: float | None = None
    max_p95_ms: float | None = None
    max_size_mb: float | None = None
    max_memory_mb: float | None = None


def _drop(row: Row) -> float | None:
    return None if row.accuracy_points is None else -row.accuracy_points


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


# Limit → what it limits, the unit, and the figure in it.
_FIGURES: Mapping[str, tuple[str, str, Callable[[Row], float | None]]] = {
    "max_drop": ("accuracy drop", "points", _drop),
    "max_p95_ms": ("p95", "ms", lambda row: row.measurement.latency_ms.get("p95")),
    "max_size_mb": ("size", "MB", lambda row: _megabytes(row.measurement.size_bytes.get("total"))),
    "max_memory_mb": ("peak memory", "MB", lambda row: _megabytes(row.measurement.memory_bytes.get("peak"))),
}


@dataclass(frozen=True)
class Broken:
    """A limit, by its name in `Limits`, that a row breaks or cannot be shown to keep: then `value` is None.

    Both figures are in the limit's unit; `remark` is what else bears on it.
    """

    limit: str
    allowed: float
    value: float | None
    remark: str = ""

    @property
    def excess(self) -> float:
        """How far over, as a share of the limit (of 1 where that is 0); infinite for an unknown figure."""
        return math.inf if self.value is None else (self.value - self.allowed) / (self.allowed or 1.0)

    def __str__(self) -> str:
        what, unit, _ = _FIGURES[self.limit]
        if self.value is None:
            text = f"{what} unknown, limit {self.allowed:g} {unit}"
        else:
            share = f" ({self.excess:.1%})" if self.allowed else ""
            by = self.value - self.allowed
            text = f"{what} {self.value:.2f} {unit}, limit {self.allowed:g}: over by {by:.3g}{share}"
        return f"{text}; {self.remark}" if self.remark else text


@dataclass(frozen=True)
class Miss:
    """A measured row outside the limits, and those it breaks."""

    row: Row
    broken: tuple[Broken, ...]


@dataclass(frozen=True)
class Verdict:
    """What the limits leave: the `winner` and all that `passed`, fastest first; the Pareto `front` of all measured
    rows, within the limits or not, fastest first; the `misses` that come nearest, nearest first."""

    limits: Limits
    winner: Row | None
    passed: tuple[Row, ...]
    front: tuple[Row, ...]
    misses: tuple[Miss, ...]


def choose(rows: Sequence[Row], limits: Limits) -> Verdict:
    """Judges the measured rows; one whose figure is unknown does not pass that figure's limit.

    The winner is the passing row of the lowest median latency: the limits already say what accuracy, tail, size and
    memory may cost, and what is left to gain is speed. Of equally fast rows it is the smaller, then the more accurate,
    then the first by name. Nearest are the misses that break the fewest limits, then those least over them, in sum of
    shares. Raises `ResultFileError` for measured rows of several machines or data sets, whose times and drops say
    nothing of each other.
    """
    measured = sorted((row for row in rows if row.measurement.status == "ok"), key=_preference)
    if len({(row.run.machine["id"], row.run.data["sha256"]) for row in measured}) > 1:
        raise ResultFileError(
            "Limits are judged among rows of one machine and one data set, these are of several.",
            "Give the result files of one machine on the same data.",
        )
    judged = [(row, _broken(row, limits)) for row in measured]
    passed = tuple(row for row, broken in judged if not broken)
    missed = [Miss(row, broken) for row, broken in judged if broken]
    missed.sort(key=lambda miss: (len(miss.broken), sum(limit.excess for limit in miss.broken)))
    front = tuple(row for row in measured if row.pareto)
    return Verdict(limits, passed[0] if passed else None, passed, front, tuple(missed[:NEAREST]))


def _preference(row: Row) -> tuple[float, float, float, str, str]:
    found = row.measurement
    size = found.size_bytes.get("total", math.inf)
    accuracy = found.accuracy.value if found.accuracy else -math.inf
    return found.latency_ms.get("p50", math.inf), size, -accuracy, found.cell, found.model


def _broken(row: Row, limits: Limits) -> tuple[Broken, ...]:
    found = []
    for name, allowed in asdict(limits).items():
        if allowed is None:
            continue
        value = _FIGURES[name][2](row)
        # Asked this way round, a limit that is no number is kept by nothing.
        if value is None or not value - allowed <= _TOLERANCE:
            found.append(Broken(name, allowed, value, _remark(row, name, value)))
    return tuple(found)


def _remark(row: Row, limit: str, value: float | None) -> str:
    if limit != "max_drop":
        return ""
    if value is None:
        return "its run has no baseline" if row.baseline is None else "it or its baseline has no accuracy"
    return chance(row)


def chance(row: Row) -> str:
    """Whether the row's difference in accuracy from its baseline may be chance: by McNemar's test where the answers are
    there, else by the interval of its accuracy; empty for no difference, or where nothing can be said."""
    quality, base = row.quality, row.baseline and row.baseline.accuracy
    if not quality or not base or not row.accuracy_points:
        return ""
    if quality.p is not None:
        return f"McNemar p {quality.p:.2g}" + (": may be chance" if quality.p >= 1 - CONFIDENCE else "")
    if quality.low <= base.value <= quality.high:
        return f"its interval, {quality.low:.2%} to {quality.high:.2%}, has the baseline's in it: may be chance"
    return ""


def require(verdict: Verdict) -> None:
    """Raises `VerdictError` where no row passed."""
    if verdict.winner:
        return
    if not verdict.misses:
        raise VerdictError("No row to judge was measured.", "`toolchain bench` measures some.")
    nearest = verdict.misses[0]
    broken = "; ".join(map(str, nearest.broken))
    raise VerdictError(
        f"No row is within the limits. The nearest is {nearest.row.measurement.cell}: {broken}.",
        "Loosen a limit, or measure other variants; `toolchain variants` lists them.",
    )
