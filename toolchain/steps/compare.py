"""Compare: rows of any number of runs side by side, each against the baseline of its own run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ResultFileError
from toolchain.measurements import Measurement, ResultFile

BASELINE = "torch-fp32"


@dataclass(frozen=True)
class Row:
    """A measurement, the run it belongs to, its baseline (None where that run has none), and whether the artifact it
    measured has been replaced since."""

    measurement: Measurement
    run: ResultFile
    baseline: Measurement | None
    stale: bool

    @property
    def accuracy_points(self) -> float | None:
        """Percentage points above the baseline."""
        mine, base = self.measurement.accuracy, self.baseline and self.baseline.accuracy
        return (mine.value - base.value) * 100 if mine and base else None

    @property
    def speedup(self) -> float | None:
        """Baseline p50 / p50 at batch 1: more is faster."""
        return self._ratio(lambda m: m.latency_ms.get("p50"))

    @property
    def throughput_gain(self) -> float | None:
        """Sentences a second / the baseline's: more is faster."""
        inverse = self._ratio(lambda m: m.throughput_per_s)
        return 1 / inverse if inverse else None

    @property
    def memory_reduction(self) -> float | None:
        """Baseline peak memory / peak memory: more is smaller. None for published figures: what they count differs."""
        if self.measurement.status == "reported":
            return None
        return self._ratio(lambda m: m.memory_bytes.get("peak"))

    @property
    def size_reduction(self) -> float | None:
        """Baseline bytes / bytes: more is smaller."""
        return self._ratio(lambda m: m.size_bytes.get("total"))

    def _ratio(self, figure: Any) -> float | None:
        mine, base = figure(self.measurement), self.baseline and figure(self.baseline)
        return base / mine if mine and base else None

    def to_json(self) -> dict[str, Any]:
        """The row with its ratios, without samples and predictions."""
        body = self.measurement.to_json()
        for name in ("samples", "predictions"):
            body.pop(name, None)
        names = ("accuracy_points", "speedup", "throughput_gain", "memory_reduction", "size_reduction")
        ratios = {name: round(value, 4) for name in names if (value := getattr(self, name)) is not None}
        baseline = self.baseline.cell if self.baseline else None
        machine = {key: self.run.machine[key] for key in ("id", "cpu", "cores", "gpu")}
        return {**body, "machine": machine, "baseline": baseline, **ratios, "stale": self.stale}


def compare(
    runs: Sequence[ResultFile], baseline: str | None = None, current: Mapping[tuple[str, str], str] | None = None
) -> list[Row]:
    """One row a (model, cell, machine, artifact, data, threads, batch size), the newest of each; measured rows first.

    `baseline` is a variant or a cell; by default torch-fp32 on the CPU, else on the row's own provider. `current` maps
    (model, variant) to the artifact id that lies there now. Raises `ResultFileError` where no row is such a baseline.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    for run in sorted(runs, key=lambda r: r.created):
        for measurement in run.rows:
            how = (run.data["sha256"], run.run.get("threads"), run.run.get("batch_size"))
            key = (measurement.model, measurement.cell, run.machine["id"], measurement.artifact_id, *how)
            lies = (current or {}).get((measurement.model, measurement.variant))
            stale = bool(measurement.artifact_id and lies and lies != measurement.artifact_id)
            newest.pop(key, None)
            newest[key] = Row(measurement, run, _baseline(measurement, run, baseline), stale)
    rows = sorted(newest.values(), key=lambda row: row.measurement.status not in ("ok", "reported"))
    if not rows:
        raise ResultFileError("There are no rows to compare.", "`toolchain bench` measures some.")
    if baseline and not any(row.baseline for row in rows):
        cells = ", ".join(dict.fromkeys(row.measurement.cell for row in rows if row.measurement.status == "ok"))
        raise ResultFileError(f"No row is the baseline {baseline!r}.", f"Measured are: {cells or 'none'}.")
    return rows


def _baseline(measurement: Measurement, run: ResultFile, asked: str | None) -> Measurement | None:
    """The baseline of the same run and model: the first of the candidates that was measured."""
    if measurement.status not in ("ok", "reported"):
        return None
    provider = measurement.provider
    wanted = [asked, f"{asked}@{provider}", f"{asked}@cpu"] if asked else [f"{BASELINE}@cpu", f"{BASELINE}@{provider}"]
    rows = {row.cell: row for row in run.rows if row.model == measurement.model and row.status == measurement.status}
    return next((rows[cell] for cell in wanted if cell in rows), None)
