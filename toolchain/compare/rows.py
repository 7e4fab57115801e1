"""Rows of one or more runs side by side, each with ratios to the baseline of its own run."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolchain.errors import ResultFileError
from toolchain.results import statistics
from toolchain.results.measurements import PROBABILITY, Measurement, Samples
from toolchain.results.result_file import ResultFile
from toolchain.results.statistics import Ratio

BASELINE = "torch-fp32"
# Above any of these limits, a row is noisy. They limit the processor time that the host takes, the processor time
# that other processes use, and the half-width of the median's interval as a share of the median.
STEAL_SHARE = 0.02
OTHERS_SHARE = 0.05
INTERVAL_SHARE = 0.10


@dataclass(frozen=True)
class Quality:
    """Scores of a row's answers beyond its accuracy; None marks an unknown score.

    Attributes:
        low: Lower bound of Wilson's 95 % interval of the accuracy.
        high: Upper bound of Wilson's 95 % interval of the accuracy.
        macro_f1: Mean F1 score over labels; every label has the same weight.
        balanced_accuracy: Mean recall over labels; every label has the same weight. For a multi-label model, the mean
            includes the recall of each label's absence.
        calibration_error: Expected calibration error of the probabilities.
        lost: Number of sentences that the baseline answers correctly and this row answers wrongly.
        won: Number of sentences that the baseline answers wrongly and this row answers correctly.
        p: p-value of McNemar's test on `lost` and `won`.
        largest_shift: Maximum over sentences of the shift from the baseline. A sentence's shift is the largest
            difference of a label's probability.
        mean_shift: Mean of the same shift over sentences.
        batch_changed: Number of sentences measured at batch 1 whose answer is different in a batch.
    """

    low: float
    high: float
    macro_f1: float | None = None
    balanced_accuracy: float | None = None
    calibration_error: float | None = None
    lost: int | None = None
    won: int | None = None
    p: float | None = None
    largest_shift: float | None = None
    mean_shift: float | None = None
    batch_changed: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a comparison.

    Attributes:
        measurement: The measurement of the cell.
        run: The run that contains the measurement.
        baseline: Measurement of the baseline in the same run; None if the run has none.
        stale: Whether a newer artifact has replaced the measured artifact.
        pareto: Whether the row is on the Pareto front of accuracy, latency and size.
    """

    measurement: Measurement
    run: ResultFile
    baseline: Measurement | None
    stale: bool
    pareto: bool = False

    @property
    def accuracy_points(self) -> float | None:
        """Returns the accuracy minus the baseline's accuracy, in percentage points; None if either is unknown."""
        mine, base = self.measurement.accuracy, self.baseline and self.baseline.accuracy
        return (mine.value - base.value) * 100 if mine and base else None

    @functools.cached_property
    def speedup(self) -> Ratio | None:
        """Returns baseline latency / row latency at batch 1.

        The ratio uses the medians of the rounds. If the rounds cannot be paired, it uses the two p50 figures.
        """
        return self._paired(lambda m: m.latency, Samples.medians) or self._plain(lambda m: m.latency_ms.get("p50"))

    @functools.cached_property
    def throughput_gain(self) -> Ratio | None:
        """Returns row throughput / baseline throughput.

        The ratio uses the rounds. If the rounds cannot be paired, it uses the two sentences-per-second figures.
        """
        paired = self._paired(lambda m: m.batches, Samples.spent_each)
        return paired or self._plain(lambda m: m.throughput_per_s and 1 / m.throughput_per_s)

    @property
    def memory_reduction(self) -> float | None:
        """Returns baseline peak memory / row peak memory; above 1 is smaller.

        None for published figures, because their sources measure memory in different ways.
        """
        if self.measurement.status == "reported":
            return None
        found = self._plain(lambda m: m.memory_bytes.get("peak"))
        return found.value if found else None

    @property
    def size_reduction(self) -> float | None:
        """Returns baseline size / row size; above 1 is smaller."""
        found = self._plain(lambda m: m.size_bytes.get("total"))
        return found.value if found else None

    @functools.cached_property
    def latency_interval(self) -> tuple[float, float] | None:
        """Returns the 95 % interval of the median latency at batch 1, in milliseconds."""
        samples = self.measurement.latency
        return statistics.median_interval(samples) if samples else None

    @property
    def noisy(self) -> str:
        """Returns the reasons why the row's times are unreliable; empty if there are none."""
        noise, bounds, p50 = self.measurement.noise, self.latency_interval, self.measurement.latency_ms.get("p50")
        found = []
        if (share := noise.get("steal_share", 0.0)) > STEAL_SHARE:
            found.append(f"the host took {share:.0%} of the processor")
        if (share := noise.get("others_share", 0.0)) > OTHERS_SHARE:
            found.append(f"other processes had {share:.0%} of it")
        if bounds and p50 and (bounds[1] - bounds[0]) / 2 > INTERVAL_SHARE * p50:
            found.append(f"the median's interval is {bounds[0]:.2f} to {bounds[1]:.2f} ms")
        return ", ".join(found)

    @functools.cached_property
    def quality(self) -> Quality | None:
        """Returns the scores of the answers; None if the row has no measured accuracy."""
        mine, labels = self.measurement, self.run.data.get("labels")
        if mine.accuracy is None or mine.status != "ok":
            return None
        low, high = statistics.wilson(mine.accuracy.correct, mine.accuracy.count)
        found = Quality(low, high, batch_changed=mine.batch_changed)
        if not labels or not mine.predictions:
            return found
        multi = bool(self.run.data.get("multi_label"))
        counts = statistics.by_label(mine.predictions, labels, multi)
        asked = [(p, label) for p, label in zip(mine.probabilities, labels, strict=False) if p is not None]
        sure = [[value / PROBABILITY for value in p] for p, _ in asked]
        error = statistics.calibration_error(sure, [label for _, label in asked], multi) if asked else None
        found = replace(
            found,
            macro_f1=statistics.macro_f1(counts),
            balanced_accuracy=statistics.balanced_accuracy(counts, multi),
            calibration_error=error,
        )
        if not self.baseline or not self.baseline.predictions:
            return found
        shifts = _shifts(mine, self.baseline)
        lost, won = (len(self.changed(kind)) for kind in ("lost", "won"))
        return replace(
            found,
            lost=lost,
            won=won,
            p=statistics.mcnemar(lost, won),
            largest_shift=max(shifts, default=None),
            mean_shift=sum(shifts) / len(shifts) if shifts else None,
        )

    def changed(self, kind: str) -> list[int]:
        """Returns the indices of the sentences that only one of the row and its baseline answers correctly.

        Args:
            kind: ``lost`` for sentences that only the baseline answers correctly, ``won`` for sentences that only this
                row answers correctly.
        """
        labels = self.run.data.get("labels")
        if not labels or not self.baseline:
            return []
        rows = zip(self.measurement.predictions, self.baseline.predictions, labels, strict=False)
        judged = [(mine == label, its == label) for mine, its, label in rows]
        return [
            index for index, pair in enumerate(judged) if pair == ((False, True) if kind == "lost" else (True, False))
        ]

    def _paired(
        self, samples: Callable[[Measurement], Samples | None], figure: Callable[[Samples], list[float]]
    ) -> Ratio | None:
        """Returns the ratio of the two rows' figures, paired by round; None if their rounds cannot be paired."""
        mine, base = samples(self.measurement), self.baseline and samples(self.baseline)
        if not mine or not base or len(mine.rounds) != len(base.rounds):
            return None
        return Ratio(1.0) if self.measurement is self.baseline else statistics.ratio(figure(base), figure(mine))

    def _plain(self, figure: Callable[[Measurement], float | None]) -> Ratio | None:
        mine, base = figure(self.measurement), self.baseline and figure(self.baseline)
        return Ratio(base / mine) if mine and base else None

    def to_json(self) -> dict[str, Any]:
        """Returns the row with its ratios, intervals and marks, without samples, predictions and probabilities."""
        body = self.measurement.to_json()
        for name in ("samples", "predictions", "probabilities"):
            body.pop(name, None)
        if self.measurement.by_length:
            body["by_length"] = {n: samples.milliseconds() for n, samples in self.measurement.by_length.items()}
        ratios: dict[str, Any] = {
            name: found.to_json() for name in ("speedup", "throughput_gain") if (found := getattr(self, name))
        }
        names = ("accuracy_points", "memory_reduction", "size_reduction")
        ratios |= {name: round(value, 4) for name in names if (value := getattr(self, name)) is not None}
        if self.quality:
            ratios["quality"] = {
                name: round(value, 6) for name, value in asdict(self.quality).items() if value is not None
            }
        if self.latency_interval:
            ratios["latency_interval_ms"] = [round(value, 4) for value in self.latency_interval]
        baseline = self.baseline.cell if self.baseline else None
        machine = {key: self.run.machine[key] for key in ("id", "cpu", "cores", "gpu")}
        marks = {"noisy": self.noisy, "pareto": self.pareto, "stale": self.stale}
        return {**body, "machine": machine, "baseline": baseline, **ratios, **marks}


def _shifts(mine: Measurement, base: Measurement) -> list[float]:
    """Returns the largest probability difference over labels, for each sentence that both rows measured at batch 1."""
    pairs = zip(mine.probabilities, base.probabilities, strict=False)
    return [max(abs(a - b) for a, b in zip(p, q, strict=True)) / PROBABILITY for p, q in pairs if p and q]


def compare(
    runs: Sequence[ResultFile], baseline: str | None = None, current: Mapping[tuple[str, str], str] | None = None
) -> list[Row]:
    """Returns the newest row of each combination of settings, rows with figures first.

    A combination consists of model, cell, machine, artifact, data, threads and batch size.

    Args:
        runs: The result files.
        baseline: A variant or a cell. If None, the baseline is torch-fp32 on the CPU, or else on the row's own
            provider.
        current: (model, variant) → id of the artifact that is now in the export folder. Rows of other artifacts are
            stale.

    Raises:
        ResultFileError: There are no rows, or no row has the given baseline.
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
    return marked(rows)


def marked(rows: Sequence[Row]) -> list[Row]:
    """Returns copies of the rows, each with its Pareto mark among these rows."""
    return [replace(row, pareto=_on_front(row, rows)) for row in rows]


def _baseline(measurement: Measurement, run: ResultFile, asked: str | None) -> Measurement | None:
    """Returns the first candidate for a baseline that has a row of the same run, model and status."""
    if measurement.status not in ("ok", "reported"):
        return None
    provider = measurement.provider
    wanted = [asked, f"{asked}@{provider}", f"{asked}@cpu"] if asked else [f"{BASELINE}@cpu", f"{BASELINE}@{provider}"]
    rows = {row.cell: row for row in run.rows if row.model == measurement.model and row.status == measurement.status}
    return next((rows[cell] for cell in wanted if cell in rows), None)


def _on_front(row: Row, rows: Sequence[Row]) -> bool:
    """Returns whether no other row dominates this row.

    A row dominates another row of the same model, machine and data if it is nowhere worse and somewhere better. The
    criteria are accuracy, latency and size.
    """
    mine = _merits(row)
    if mine is None:
        return False
    where = (row.measurement.model, row.run.machine["id"], row.run.data["sha256"])
    for other in rows:
        its = _merits(other)
        if its is None or (other.measurement.model, other.run.machine["id"], other.run.data["sha256"]) != where:
            continue
        if its != mine and all(a >= b for a, b in zip(its, mine, strict=True)):
            return False
    return True


def _merits(row: Row) -> tuple[float, float, float] | None:
    """Returns accuracy, negative p50 and negative size, so that more is better; None if one was not measured."""
    found = row.measurement
    p50, size = found.latency_ms.get("p50"), found.size_bytes.get("total")
    if found.status != "ok" or not found.accuracy or not p50 or not size:
        return None
    return found.accuracy.value, -p50, -float(size)


# Order → its sort key: the smallest key is best. Rows without the figure come last.
ORDERS: dict[str, Callable[[Row], float | None]] = {
    "accuracy": lambda row: -row.measurement.accuracy.value if row.measurement.accuracy else None,
    "latency": lambda row: row.measurement.latency_ms.get("p50"),
    "throughput": lambda row: -row.measurement.throughput_per_s if row.measurement.throughput_per_s else None,
    "memory": lambda row: row.measurement.memory_bytes.get("peak"),
    "size": lambda row: row.measurement.size_bytes.get("total"),
}


def arrange(rows: Sequence[Row], order: str | None, patterns: Sequence[str], provider: str | None = None) -> list[Row]:
    """Returns the matching rows in order, with new Pareto marks.

    Args:
        rows: The rows to select from.
        order: A key of `ORDERS`; None keeps the given order.
        patterns: Shell patterns for cells or variants, such as ``onnx-*``; empty matches all rows.
        provider: Provider of the rows; None matches all providers.

    Raises:
        ResultFileError: No row matches.
    """

    def fits(found: Measurement) -> bool:
        named = any(fnmatch.fnmatchcase(name, p) for p in patterns for name in (found.cell, found.variant))
        return (named or not patterns) and provider in (None, found.provider)

    found = [row for row in rows if fits(row.measurement)]
    if not found:
        cells = ", ".join(dict.fromkeys(row.measurement.cell for row in rows))
        wanted = ", ".join([*patterns, *([f"*@{provider}"] if provider else [])])
        raise ResultFileError(f"No row fits {wanted}.", f"There are: {cells}.")
    if order:
        figure = ORDERS[order]
        found.sort(key=lambda row: (figure(row) is None, figure(row) or 0.0))
    return marked(found)
