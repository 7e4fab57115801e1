"""The text of a point in a plot: variant, machine, scenario, and values with units and intervals."""

from __future__ import annotations

from toolchain.compare.report.columns import host_name, machine_name
from toolchain.compare.rows import Row
from toolchain.results import statistics
from toolchain.results.measurements import Samples
from toolchain.results.statistics import CONFIDENCE, Ratio
from toolchain.system.escaping import escape_line

NO_INTERVAL = "no interval"


def point_text(row: Row, *lines: str) -> str:
    """Returns the text of a row's point: one line with the cell and the machine, then the given lines."""
    threads = row.run.run.get("threads")
    host = host_name(row) if row.measurement.provider == "cpu" else machine_name(row)
    place = ", ".join([host, *([f"{threads} threads"] if threads else [])])
    return "\n".join([escape_line(f"{row.measurement.cell} on {place}"), *lines])


def bounds_text(bounds: tuple[float | None, float | None] | None, form: str = ".2f", unit: str = "") -> str:
    """Returns an interval as text; `NO_INTERVAL` if there is none."""
    low, high = bounds or (None, None)
    if low is None or high is None:
        return NO_INTERVAL
    return f"{CONFIDENCE * 100:.0f} % interval {low:{form}} to {high:{form}}{unit}"


def score_text(row: Row) -> str:
    """Returns the row's score with its interval; empty without a score."""
    score, quality = row.measurement.score, row.quality
    if score is None:
        return ""
    bounds = (100 * quality.low, 100 * quality.high) if quality else None
    return f"{score.name}: {100 * score.value:.2f} %, {bounds_text(bounds, unit=' %')}"


def latency_text(row: Row) -> str:
    """Returns the median latency at batch 1 with its interval, or the published mean."""
    figures = row.measurement.latency_ms
    if "p50" in figures:
        return f"latency at batch 1: median {figures['p50']:.2f} ms, {bounds_text(row.latency_interval, unit=' ms')}"
    return f"latency at batch 1: mean {figures.get('mean', 0.0):.2f} ms, published, {NO_INTERVAL}"


def mean_latency_text(row: Row) -> str:
    """Returns the mean latency at batch 1, with the interval of the mean over rounds."""
    samples = row.measurement.latency
    bounds = statistics.mean_interval([mean / 1000 for mean in samples.means()]) if samples else None
    mean = row.measurement.latency_ms["mean"]
    return f"latency at batch 1: mean {mean:.2f} ms, {bounds_text(bounds, unit=' ms')}"


def length_text(tokens: int, samples: Samples) -> str:
    """Returns the median latency of sentences with a number of tokens, with its interval."""
    bounds = bounds_text(statistics.median_interval(samples), unit=" ms")
    return f"latency at batch 1, {tokens} tokens: median {samples.milliseconds()['p50']:.2f} ms, {bounds}"


def ratio_text(ratio: Ratio) -> str:
    """Returns a speed-up with its interval."""
    return f"{ratio.value:.2f}× as fast, {bounds_text((ratio.low, ratio.high))}"


def baseline_text(row: Row) -> str:
    """Returns the row's speed-up and score points against its baseline; empty if both are unknown.

    The text of the baseline itself is ``baseline``.
    """
    if row.measurement is row.baseline:
        return "baseline"
    parts = [ratio_text(row.speedup)] if row.speedup else []
    parts += [] if row.accuracy_points is None else [f"{row.accuracy_points:+.2f} points"]
    return f"against {escape_line(row.baseline.cell)}: {'; '.join(parts)}" if parts and row.baseline else ""
