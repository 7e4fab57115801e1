"""Checks measured rows against limits, and finds the passing rows, the winner and the nearest misses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from toolchain.errors import ResultFileError, VerdictError
from toolchain.results.statistics import CONFIDENCE

if TYPE_CHECKING:
    from toolchain.compare.rows import Row

NEAREST = 3  # Maximum number of near misses in a verdict.
_TOLERANCE = 1e-9  # Tolerance for rounding: as floats, 90 % minus 89 % is slightly more than one point.


@dataclass(frozen=True)
class Limits:
    """Upper limits on the figures of a row; None sets no limit.

    Attributes:
        max_drop: Accuracy drop below the row's baseline, in percentage points.
        max_p95_ms: 95th percentile of the latency at batch 1, in milliseconds.
        max_size_mb: Size of the artifact, in megabytes (10^6 bytes).
        max_memory_mb: Peak memory of the process on the host, in megabytes (10^6 bytes). The memory limit never applies
            to GPU memory.
    """

    max_drop: float | None = None
    max_p95_ms: float | None = None
    max_size_mb: float | None = None
    max_memory_mb: float | None = None


def _drop(row: Row) -> float | None:
    return None if row.accuracy_points is None else -row.accuracy_points


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


# Name of a limit → name and unit of the limited figure, and the function that returns a row's figure in this unit.
_FIGURES: Mapping[str, tuple[str, str, Callable[[Row], float | None]]] = {
    "max_drop": ("accuracy drop", "points", _drop),
    "max_p95_ms": ("p95", "ms", lambda row: row.measurement.latency_ms.get("p95")),
    "max_size_mb": ("size", "MB", lambda row: _megabytes(row.measurement.size_bytes.get("total"))),
    "max_memory_mb": ("peak memory", "MB", lambda row: _megabytes(row.measurement.memory_bytes.get("peak"))),
}


@dataclass(frozen=True)
class BrokenLimit:
    """A limit that a row exceeds, or that cannot be checked because the row's figure is unknown.

    Attributes:
        limit: Name of the limit in `Limits`.
        allowed: The limit, in the unit of the limited figure.
        value: The row's figure, in the unit of the limit; None if the figure is unknown.
        remark: Further information about the figure, such as a test of significance; may be empty.
    """

    limit: str
    allowed: float
    value: float | None
    remark: str = ""

    @property
    def excess(self) -> float:
        """Returns (figure - limit) / limit, or the figure if the limit is 0; infinite for an unknown figure."""
        return math.inf if self.value is None else (self.value - self.allowed) / (self.allowed or 1.0)

    def __str__(self) -> str:
        figure, unit, _ = _FIGURES[self.limit]
        if self.value is None:
            text = f"{figure} unknown, limit {self.allowed:g} {unit}"
        else:
            share = f" ({self.excess:.1%})" if self.allowed else ""
            difference = self.value - self.allowed
            text = f"{figure} {self.value:.2f} {unit}, limit {self.allowed:g}: over by {difference:.3g}{share}"
        return f"{text}; {self.remark}" if self.remark else text


@dataclass(frozen=True)
class Miss:
    """A measured row outside the limits, with the limits that it breaks."""

    row: Row
    broken: tuple[BrokenLimit, ...]


@dataclass(frozen=True)
class Verdict:
    """The result of checking rows against limits.

    Attributes:
        limits: The limits.
        winner: The fastest row within the limits; None if no row is within the limits.
        passed: All rows within the limits, fastest first.
        front: Pareto front of all measured rows, within the limits or not, fastest first.
        misses: At most `NEAREST` rows outside the limits, the row nearest to the limits first.
    """

    limits: Limits
    winner: Row | None
    passed: tuple[Row, ...]
    front: tuple[Row, ...]
    misses: tuple[Miss, ...]


def check_limits(rows: Sequence[Row], limits: Limits) -> Verdict:
    """Checks the measured rows against the limits and chooses the winner.

    If a limited figure is unknown, the row breaks the limit. The winner is the passing row with the lowest median
    latency, because the limits already bound accuracy drop, p95, size and memory. Among equally fast rows, the smallest
    wins, then the most accurate, then the first by name. The nearest misses break the fewest limits. Rows that break
    equally many limits are sorted by their sum of `BrokenLimit.excess`, smallest sum first.

    Raises:
        ResultFileError: The measured rows come from several machines or data sets, so their times and accuracy drops
            are not comparable.
    """
    measured_rows = sorted((row for row in rows if row.measurement.status == "ok"), key=_sort_key)
    if len({(row.run.machine["id"], row.run.data["sha256"]) for row in measured_rows}) > 1:
        raise ResultFileError(
            "Limits apply to rows of one machine and one data set, but these rows come from several machines or data "
            "sets.",
            "Pass only the result files of one machine and one data set.",
        )
    checked = [(row, _broken_limits(row, limits)) for row in measured_rows]
    passed = tuple(row for row, broken in checked if not broken)
    misses = [Miss(row, broken) for row, broken in checked if broken]
    misses.sort(key=lambda miss: (len(miss.broken), sum(limit.excess for limit in miss.broken)))
    front = tuple(row for row in measured_rows if row.pareto)
    return Verdict(limits, passed[0] if passed else None, passed, front, tuple(misses[:NEAREST]))


def _sort_key(row: Row) -> tuple[float, float, float, str, str]:
    measurement = row.measurement
    size = measurement.size_bytes.get("total", math.inf)
    score = measurement.score.value if measurement.score else -math.inf
    return measurement.latency_ms.get("p50", math.inf), size, -score, measurement.cell, measurement.model


def _broken_limits(row: Row, limits: Limits) -> tuple[BrokenLimit, ...]:
    broken = []
    for name, allowed in asdict(limits).items():
        if allowed is None:
            continue
        value = _FIGURES[name][2](row)
        # If the limit or the figure is NaN (not a number), every comparison is false. The condition is `not a <= b`
        # instead of `a > b`, so that a limit counts as broken in this case.
        if value is None or not value - allowed <= _TOLERANCE:
            broken.append(BrokenLimit(name, allowed, value, _limit_remark(row, name, value)))
    return tuple(broken)


def _limit_remark(row: Row, limit: str, value: float | None) -> str:
    if limit != "max_drop":
        return ""
    if value is None:
        return "the run has no baseline" if row.baseline is None else "the row or its baseline has no score"
    return chance_remark(row)


def chance_remark(row: Row) -> str:
    """Returns a remark on whether the row's score differs from the baseline's score by chance.

    If the predictions of the row and of its baseline are known, the remark is the result of the test that
    `rows.Quality` names. Without predictions, the remark depends on the 95 % interval of the row's score.

    Returns:
        The remark; empty if the row and its baseline have the same score, or if one of the two scores is unknown.
        Without predictions, the remark is empty if the 95 % interval of the row's score excludes the baseline's score.
    """
    quality, base = row.quality, row.baseline and row.baseline.score
    if not quality or not base or not row.accuracy_points:
        return ""
    if quality.p is not None:
        return f"{quality.test} p {quality.p:.2g}" + (": may be chance" if quality.p >= 1 - CONFIDENCE else "")
    if quality.low <= base.value <= quality.high:
        interval = f"{quality.low:.2%} to {quality.high:.2%}"
        return f"the interval {interval} includes the baseline's {base.name}, so the difference may be chance"
    return ""


def require_winner(verdict: Verdict) -> None:
    """Requires that a measured row is within the limits.

    Raises:
        VerdictError: No row is within the limits, or there is no measured row.
    """
    if verdict.winner:
        return
    if not verdict.misses:
        raise VerdictError("There is no measured row to check.", "Measure cells with `toolchain bench`.")
    nearest = verdict.misses[0]
    broken = "; ".join(map(str, nearest.broken))
    raise VerdictError(
        f"No row is within the limits. The nearest row is {nearest.row.measurement.cell}: {broken}.",
        "Raise a limit, or measure other variants; `toolchain variants` lists them.",
    )
