"""The comparison as CSV for a spreadsheet or a data frame: one line for each row."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from toolchain.compare.rows import Row
from toolchain.results.scores import Accuracy, EntityScore, RegressionScore, Score
from toolchain.system.escaping import escape_formula

# Name of a column → function that returns a row's value. Column names contain the units. Shares are from 0 to 1, and
# points are percentage points. A ratio above 1 is better than the baseline.
COLUMNS: dict[str, Callable[[Row], Any]] = {
    "model": lambda row: row.measurement.model,
    "cell": lambda row: row.measurement.cell,
    "variant": lambda row: row.measurement.variant,
    "provider": lambda row: row.measurement.provider,
    "artifact_id": lambda row: row.measurement.artifact_id,
    "machine": lambda row: row.run.machine["id"],
    "cpu": lambda row: row.run.machine["cpu"],
    "gpus": lambda row: "; ".join(str(gpu["name"]) for gpu in row.run.machine["gpu"]),
    "threads": lambda row: row.run.run.get("threads"),
    "batch_size": lambda row: row.run.run.get("batch_size"),
    "created": lambda row: row.run.created,
    "data": lambda row: row.run.data["name"],
    "data_sha256": lambda row: row.run.data["sha256"],
    "sentences": lambda row: row.run.data["rows"],
    "status": lambda row: row.measurement.status,
    "reason": lambda row: row.measurement.reason,
    "mend": lambda row: row.measurement.mend,
    "baseline": lambda row: row.baseline and row.baseline.cell,
    "accuracy": lambda row: _score(row, Accuracy, "value"),
    "accuracy_low": lambda row: _bound(row, Accuracy, "low"),
    "accuracy_high": lambda row: _bound(row, Accuracy, "high"),
    "accuracy_points": lambda row: row.accuracy_points,
    "lost": lambda row: row.quality and row.quality.lost,
    "won": lambda row: row.quality and row.quality.won,
    "mcnemar_p": lambda row: _p_value(row, "McNemar"),
    "macro_f1": lambda row: row.quality and row.quality.macro_f1,
    "balanced_accuracy": lambda row: row.quality and row.quality.balanced_accuracy,
    "calibration_error": lambda row: row.quality and row.quality.calibration_error,
    "probability_shift_largest": lambda row: row.quality and row.quality.largest_shift,
    "probability_shift_mean": lambda row: row.quality and row.quality.mean_shift,
    "batch_changed": lambda row: row.measurement.batch_changed,
    "latency_p50_ms": lambda row: row.measurement.latency_ms.get("p50"),
    "latency_p50_low_ms": lambda row: row.latency_interval and row.latency_interval[0],
    "latency_p50_high_ms": lambda row: row.latency_interval and row.latency_interval[1],
    "latency_p90_ms": lambda row: row.measurement.latency_ms.get("p90"),
    "latency_p95_ms": lambda row: row.measurement.latency_ms.get("p95"),
    "latency_p99_ms": lambda row: row.measurement.latency_ms.get("p99"),
    "latency_mean_ms": lambda row: row.measurement.latency_ms.get("mean"),
    "with_tokenizing_p50_ms": lambda row: row.measurement.with_tokenizing_ms.get("p50"),
    "resident_p50_ms": lambda row: row.measurement.resident_ms.get("p50"),
    "cold_start_p50_ms": lambda row: row.measurement.cold_start_ms.get("p50"),
    "load_p50_ms": lambda row: row.measurement.load_ms.get("p50"),
    "speedup": lambda row: row.speedup and row.speedup.value,
    "speedup_low": lambda row: row.speedup and row.speedup.low,
    "speedup_high": lambda row: row.speedup and row.speedup.high,
    "mean_speedup": lambda row: row.mean_speedup and row.mean_speedup.value,
    "mean_speedup_low": lambda row: row.mean_speedup and row.mean_speedup.low,
    "mean_speedup_high": lambda row: row.mean_speedup and row.mean_speedup.high,
    "exits_work": lambda row: row.measurement.facts.get("exits", {}).get("work"),
    "throughput_per_s": lambda row: row.measurement.throughput_per_s,
    "throughput_gain": lambda row: row.throughput_gain and row.throughput_gain.value,
    "throughput_gain_low": lambda row: row.throughput_gain and row.throughput_gain.low,
    "throughput_gain_high": lambda row: row.throughput_gain and row.throughput_gain.high,
    "peak_memory_bytes": lambda row: row.measurement.memory_bytes.get("peak"),
    "gpu_peak_memory_bytes": lambda row: row.measurement.memory_bytes.get("gpu", {}).get("peak"),
    "memory_reduction": lambda row: row.memory_reduction,
    "size_bytes": lambda row: row.measurement.size_bytes.get("total"),
    "gzip_bytes": lambda row: row.measurement.size_bytes.get("gzip"),
    "size_reduction": lambda row: row.size_reduction,
    "pareto": lambda row: row.pareto,
    "noisy": lambda row: row.noisy,
    "stale": lambda row: row.stale,
    "r2": lambda row: _score(row, RegressionScore, "r2"),
    "r2_low": lambda row: _bound(row, RegressionScore, "low"),
    "r2_high": lambda row: _bound(row, RegressionScore, "high"),
    "mean_absolute_error": lambda row: _score(row, RegressionScore, "mean_absolute_error"),
    "root_mean_squared_error": lambda row: _score(row, RegressionScore, "root_mean_squared_error"),
    "pearson": lambda row: row.quality and row.quality.pearson,
    "spearman": lambda row: row.quality and row.quality.spearman,
    "entity_f1": lambda row: _score(row, EntityScore, "value"),
    "entity_f1_low": lambda row: _bound(row, EntityScore, "low"),
    "entity_f1_high": lambda row: _bound(row, EntityScore, "high"),
    "precision": lambda row: _score(row, EntityScore, "precision"),
    "recall": lambda row: _score(row, EntityScore, "recall"),
    "wilcoxon_p": lambda row: _p_value(row, "Wilcoxon"),
    "server_qps": lambda row: _server(row, "qps"),
    "server_p99_limit_ms": lambda row: _server(row, "p99_limit_ms"),
    "server_p99_ms": lambda row: row.measurement.server_ms.get("p99"),
    "server_mean_batch": lambda row: _server(row, "mean_batch"),
    "server_gain": lambda row: row.server_gain and row.server_gain.value,
    "exit_shares": lambda row: "; ".join(f"{share:g}" for share in row.measurement.exit_shares) or None,
}


def _server(row: Row, name: str) -> Any:
    """Returns a value of the fact ``server``; None if the scenario was not measured."""
    return row.measurement.facts.get("server", {}).get(name)


def _p_value(row: Row, test: str) -> float | None:
    """Returns the p-value of the row's test; None if the row has another test, or none."""
    return row.quality.p if row.quality and row.quality.test == test else None


def _score(row: Row, kind: type[Score], name: str) -> Any:
    """Returns a figure of the row's score; None if the row has no score of this kind."""
    return getattr(row.measurement.score, name) if isinstance(row.measurement.score, kind) else None


def _bound(row: Row, kind: type[Score], name: str) -> float | None:
    """Returns a bound of the interval of the row's score; None if the row has no score of this kind."""
    return getattr(row.quality, name) if row.quality and isinstance(row.measurement.score, kind) else None


def to_csv(rows: Sequence[Row]) -> str:
    """Returns a header line and one line for each row as CSV (RFC 4180); an empty field is unknown.

    An apostrophe precedes each text that a spreadsheet would read as a formula. Later releases keep the column names
    and add new columns at the end.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell(figure(row)) for figure in COLUMNS.values()])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return escape_formula(value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)
