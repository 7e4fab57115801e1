"""Rows of one or more runs side by side, each with ratios to the baseline of its own run."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolchain.data.labels import MULTI, REGRESSION, LabelSet, number
from toolchain.errors import ResultFileError
from toolchain.results import statistics
from toolchain.results.measurements import PROBABILITY, Measurement, Samples
from toolchain.results.providers import CUDA_GRAPHS, TENSORRT, includes
from toolchain.results.result_file import ResultFile
from toolchain.results.scores import Accuracy, EntityScore, RegressionScore, count_entities
from toolchain.results.statistics import Ratio

BASELINE = "torch-fp32"
STEAL_SHARE = 0.02  # Limit for the share of processor time that the host of a virtual machine takes.
OTHERS_SHARE = 0.05  # Limit for the share of processor time that processes outside the benchmark use.
INTERVAL_SHARE = 0.10  # Limit for the half-width of the median latency's 95 % interval, divided by the median.


@dataclass(frozen=True)
class Quality:
    """Scores of a row's answers beyond its main score; None marks an unknown score, or one of another task.

    Attributes:
        low: Lower bound of the main score's 95 % interval: Wilson's interval of an accuracy, or the bootstrap over
            sentences for R² and entity F1.
        high: Upper bound of this interval.
        macro_f1: Mean F1 score over labels; every label has the same weight.
        balanced_accuracy: Mean recall over labels; every label has the same weight. For a multi-label model, the mean
            also includes the specificity of each label. The specificity of a label is the share of right answers among
            the sentences without this label.
        calibration_error: Expected calibration error of the probabilities.
        precision: Share of the predicted entities that are right.
        recall: Share of the data's entities that are predicted.
        lost: Number of sentences that the baseline answers correctly and this row answers wrongly.
        won: Number of sentences that the baseline answers wrongly and this row answers correctly.
        p: p-value of `test`, which compares the row with its baseline.
        test: Name of the test: McNemar's test on `lost` and `won`. For regression: Wilcoxon's signed-rank test on the
            absolute errors.
        root_mean_squared_error: Root mean squared error of the scores of a regression.
        pearson: Pearson's correlation of scores and labels.
        spearman: Spearman's correlation of scores and labels.
        largest_shift: Largest shift of a sentence. A sentence's shift is the largest difference over labels between the
            probabilities of the row and of the baseline, or for regression, the difference between the two scores.
        mean_shift: Mean of the shift over sentences.
        batch_changed: Number of sentences measured at batch 1 whose answer in a batch differs from the answer at
            batch 1.
    """

    low: float
    high: float
    macro_f1: float | None = None
    balanced_accuracy: float | None = None
    calibration_error: float | None = None
    precision: float | None = None
    recall: float | None = None
    lost: int | None = None
    won: int | None = None
    p: float | None = None
    test: str | None = None
    root_mean_squared_error: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    largest_shift: float | None = None
    mean_shift: float | None = None
    batch_changed: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a comparison.

    Attributes:
        measurement: The measurement of the cell.
        run: The run that contains the measurement.
        baseline: Measurement of the baseline in the same run; None if the run has no baseline.
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
        """Returns the score minus the baseline's score, in percentage points; None if either is unknown."""
        own, baseline = self.measurement.score, self.baseline and self.baseline.score
        return (own.value - baseline.value) * 100 if own and baseline else None

    @functools.cached_property
    def speedup(self) -> Ratio | None:
        """Returns baseline latency / row latency at batch 1.

        Each round gives one ratio: the baseline's median latency in this round / the row's median latency in this
        round. The speed-up is the geometric mean of the ratios of all rounds. If samples are missing, or baseline and
        row have different numbers of rounds, the speed-up is the baseline's p50 / the row's p50.
        """
        return self._paired_ratio(lambda m: m.latency, Samples.medians) or self._figure_ratio(
            lambda m: m.latency_ms.get("p50")
        )

    @functools.cached_property
    def mean_speedup(self) -> Ratio | None:
        """Returns the ratio of the mean latencies of baseline and row; None without samples."""
        return self._paired_ratio(lambda m: m.latency, Samples.means)

    @functools.cached_property
    def throughput_gain(self) -> Ratio | None:
        """Returns row throughput / baseline throughput.

        Each round gives one ratio: the baseline's mean time per sentence in this round / the row's mean time per
        sentence in this round. The gain is the geometric mean of the ratios of all rounds. If samples are missing, or
        baseline and row have different numbers of rounds, the gain is the ratio of the two throughputs.
        """
        paired = self._paired_ratio(lambda m: m.batches, Samples.sentence_times)
        return paired or self._figure_ratio(lambda m: m.throughput_per_s and 1 / m.throughput_per_s)

    @property
    def server_gain(self) -> Ratio | None:
        """Returns row rate / baseline rate of the scenario ``server``; None unless both keep the same limit."""
        facts = [m.facts.get("server") for m in (self.measurement, self.baseline) if m]
        limits = {fact.get("p99_limit_ms") for fact in facts if fact}
        if len(facts) < 2 or None in facts or len(limits) > 1 or None in limits:
            return None
        return self._figure_ratio(lambda m: 1 / m.facts["server"]["qps"] if m.facts["server"]["qps"] else None)

    @property
    def memory_reduction(self) -> float | None:
        """Returns baseline peak memory / row peak memory; above 1, the row needs less memory.

        The ratio is None for published figures, because their sources measure memory in different ways.
        """
        if self.measurement.status == "reported":
            return None
        ratio = self._figure_ratio(lambda m: m.memory_bytes.get("peak"))
        return ratio.value if ratio else None

    @property
    def size_reduction(self) -> float | None:
        """Returns baseline size / row size; above 1, the row is smaller."""
        ratio = self._figure_ratio(lambda m: m.size_bytes.get("total"))
        return ratio.value if ratio else None

    @functools.cached_property
    def latency_interval(self) -> tuple[float, float] | None:
        """Returns the 95 % interval of the median latency at batch 1, in milliseconds."""
        samples = self.measurement.latency
        return statistics.median_interval(samples) if samples else None

    @property
    def noisy(self) -> str:
        """Returns the reasons why the row's times are unreliable; empty if there are none."""
        noise, bounds, p50 = self.measurement.noise, self.latency_interval, self.measurement.latency_ms.get("p50")
        reasons = []
        if (share := noise.get("steal_share", 0.0)) > STEAL_SHARE:
            reasons.append(f"the host took {share:.0%} of the processor time of the virtual machine")
        if (share := noise.get("others_share", 0.0)) > OTHERS_SHARE:
            reasons.append(f"other processes used {share:.0%} of the processor time")
        if bounds and p50 and (bounds[1] - bounds[0]) / 2 > INTERVAL_SHARE * p50:
            reasons.append(f"the median's interval is {bounds[0]:.2f} to {bounds[1]:.2f} ms")
        return ", ".join(reasons)

    @functools.cached_property
    def quality(self) -> Quality | None:
        """Returns the scores of the answers; None if the row has no measured score."""
        measurement = self.measurement
        if measurement.score is None or measurement.status != "ok":
            return None
        if isinstance(measurement.score, RegressionScore):
            return self._regression_quality(measurement.score)
        if isinstance(measurement.score, EntityScore):
            return self._entity_quality(measurement.score)
        return self._label_quality(measurement.score)

    def _label_quality(self, accuracy: Accuracy) -> Quality:
        """Returns the scores of a classifier's answers."""
        measurement, labels = self.measurement, self.run.data.get("labels")
        low, high = statistics.wilson(accuracy.correct, accuracy.count)
        quality = Quality(low, high, batch_changed=measurement.batch_changed)
        if not labels or not measurement.predictions:
            return quality
        multi = self.run.task == MULTI
        predictions, correct = ([int(number(a)) for a in answers] for answers in (measurement.predictions, labels))
        counts = statistics.count_by_label(predictions, correct, multi)
        scored = [(p, label) for p, label in zip(measurement.probabilities, correct, strict=False) if p is not None]
        confidences = [[value / PROBABILITY for value in p] for p, _ in scored]
        error = statistics.calibration_error(confidences, [label for _, label in scored], multi) if scored else None
        quality = replace(
            quality,
            macro_f1=statistics.macro_f1(counts),
            balanced_accuracy=statistics.balanced_accuracy(counts, multi),
            calibration_error=error,
        )
        if not self.baseline or not self.baseline.predictions:
            return quality
        shifts = _probability_shifts(measurement, self.baseline)
        lost, won = (len(self.changed_sentences(kind)) for kind in ("lost", "won"))
        return replace(
            quality,
            lost=lost,
            won=won,
            p=statistics.mcnemar(lost, won),
            test="McNemar",
            largest_shift=max(shifts, default=None),
            mean_shift=sum(shifts) / len(shifts) if shifts else None,
        )

    def _entity_quality(self, score: EntityScore) -> Quality | None:
        """Returns the scores of a token classifier's answers; None without predictions."""
        labels, predictions = self.run.data.get("labels", ()), self.measurement.predictions
        if not labels or not predictions:
            return None
        label_set = LabelSet(tuple(self.run.data["label_names"]), self.run.task)
        low, high = statistics.f1_interval(tuple(count_entities(predictions, labels, label_set)))
        quality = Quality(
            low,
            high,
            precision=score.precision,
            recall=score.recall,
            batch_changed=self.measurement.batch_changed,
        )
        if not self.baseline or not self.baseline.predictions:
            return quality
        lost, won = (len(self.changed_sentences(kind)) for kind in ("lost", "won"))
        return replace(quality, lost=lost, won=won, p=statistics.mcnemar(lost, won), test="McNemar")

    def _regression_quality(self, score: RegressionScore) -> Quality | None:
        """Returns the scores of a regression model's answers; None without predictions."""
        labels = tuple(map(number, self.run.data.get("labels", ())))
        predictions = tuple(map(number, self.measurement.predictions))
        if not labels or not predictions:
            return None
        low, high = statistics.r2_interval(predictions, labels)
        pearson, spearman = statistics.correlations(predictions, labels)
        quality = Quality(
            low,
            high,
            root_mean_squared_error=score.root_mean_squared_error,
            pearson=pearson,
            spearman=spearman,
        )
        if not self.baseline or not self.baseline.predictions:
            return quality
        baseline_predictions = tuple(map(number, self.baseline.predictions))
        shifts = [abs(a - b) for a, b in zip(predictions, baseline_predictions, strict=True)]
        return replace(
            quality,
            p=statistics.wilcoxon(predictions, baseline_predictions, labels),
            test="Wilcoxon",
            largest_shift=max(shifts),
            mean_shift=sum(shifts) / len(shifts),
        )

    def changed_sentences(self, kind: str) -> list[int]:
        """Returns the indices of the sentences that the row loses or wins against its baseline.

        Args:
            kind: ``lost`` for sentences that only the baseline answers correctly, ``won`` for sentences that only this
                row answers correctly.

        Returns:
            The indices, from 0; empty for regression.
        """
        labels = self.run.data.get("labels")
        if not labels or not self.baseline or self.run.task == REGRESSION:
            return []
        rows = zip(self.measurement.predictions, self.baseline.predictions, labels, strict=False)
        outcomes = [
            (prediction == label, baseline_prediction == label) for prediction, baseline_prediction, label in rows
        ]
        return [
            index for index, pair in enumerate(outcomes) if pair == ((False, True) if kind == "lost" else (True, False))
        ]

    def _paired_ratio(
        self, samples: Callable[[Measurement], Samples | None], figure: Callable[[Samples], list[float]]
    ) -> Ratio | None:
        """Returns the geometric mean over rounds of baseline figure / row figure.

        The result is None if samples are missing, or if baseline and row have different numbers of rounds.
        """
        own_samples, baseline_samples = samples(self.measurement), self.baseline and samples(self.baseline)
        if not own_samples or not baseline_samples or len(own_samples.rounds) != len(baseline_samples.rounds):
            return None
        return (
            Ratio(1.0)
            if self.measurement is self.baseline
            else statistics.ratio(figure(baseline_samples), figure(own_samples))
        )

    def _figure_ratio(self, figure: Callable[[Measurement], float | None]) -> Ratio | None:
        own_value, baseline_value = figure(self.measurement), self.baseline and figure(self.baseline)
        return Ratio(baseline_value / own_value) if own_value and baseline_value else None

    def to_json(self) -> dict[str, Any]:
        """Returns the row for JSON with ratios, intervals and marks, but without samples and values of sentences."""
        body = self.measurement.to_json()
        for name in ("samples", "after_pause", "predictions", "probabilities", "exits"):
            body.pop(name, None)
        if self.measurement.by_length:
            body["by_length"] = {n: samples.milliseconds() for n, samples in self.measurement.by_length.items()}
        ratios: dict[str, Any] = {
            name: ratio.to_json()
            for name in ("speedup", "mean_speedup", "throughput_gain", "server_gain")
            if (ratio := getattr(self, name))
        }
        names = ("accuracy_points", "memory_reduction", "size_reduction")
        ratios |= {name: round(value, 4) for name in names if (value := getattr(self, name)) is not None}
        if self.quality:
            ratios["quality"] = {
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in asdict(self.quality).items()
                if value is not None
            }
        ratios |= {"exit_shares": list(shares)} if (shares := self.measurement.exit_shares) else {}
        if self.latency_interval:
            ratios["latency_interval_ms"] = [round(value, 4) for value in self.latency_interval]
        machine = {key: self.run.machine[key] for key in ("id", "cpu", "cores", "gpu")}
        marks = {"noisy": self.noisy, "pareto": self.pareto, "stale": self.stale}
        return {**body, "machine": machine, "baseline": self.baseline and self.baseline.cell, **ratios, **marks}


def _probability_shifts(measurement: Measurement, baseline: Measurement) -> list[float]:
    """Returns the probability shift of each sentence that was measured at batch 1 in the row and in its baseline.

    A sentence's shift is the largest difference over labels between the probabilities of the row and of the baseline.
    """
    pairs = zip(measurement.probabilities, baseline.probabilities, strict=False)
    return [max(abs(a - b) for a, b in zip(p, q, strict=True)) / PROBABILITY for p, q in pairs if p and q]


def compare(
    runs: Sequence[ResultFile], baseline: str | None = None, current: Mapping[tuple[str, str], str] | None = None
) -> list[Row]:
    """Returns the newest row of each combination of settings, rows with figures first.

    A combination of settings consists of model, cell, machine, artifact, data, threads and batch size.

    Args:
        runs: The result files.
        baseline: Name of the variant or cell that is the baseline. None chooses torch-fp32 on the CPU, or
            torch-fp32 on the row's provider if the run has no row of torch-fp32 on the CPU.
        current: (model, variant) → id of the artifact that is now in the export folder. A row is stale if the id of the
            measured artifact differs from the id of the current artifact.

    Raises:
        ResultFileError: There are no rows, or no row has the given baseline.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    for run, measurement in ((file, each) for file in sorted(runs, key=lambda r: r.created) for each in file.rows):
        settings = (run.data["sha256"], run.run.get("threads"), run.run.get("batch_size"))
        key = (measurement.model, measurement.cell, run.machine["id"], measurement.artifact_id, *settings)
        current_id = (current or {}).get((measurement.model, measurement.variant))
        stale = bool(measurement.artifact_id and current_id and current_id != measurement.artifact_id)
        newest.pop(key, None)
        newest[key] = Row(measurement, run, _baseline(measurement, run, baseline), stale)
    rows = sorted(newest.values(), key=lambda row: row.measurement.status not in ("ok", "reported"))
    if not rows:
        raise ResultFileError("There are no rows to compare.", "Measure cells with `toolchain bench`.")
    if baseline and not any(row.baseline for row in rows):
        cells = ", ".join(dict.fromkeys(row.measurement.cell for row in rows if row.measurement.status == "ok"))
        raise ResultFileError(f"No row is the baseline {baseline!r}.", f"The measured cells are: {cells or 'none'}.")
    return mark_front(rows)


def with_baseline(rows: Sequence[Row], baseline: str) -> list[Row]:
    """Returns copies of the rows with another baseline, as `compare` chooses it for this name of a variant or cell."""
    return [replace(row, baseline=_baseline(row.measurement, row.run, baseline)) for row in rows]


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """Returns copies of the rows, with `pareto` set for the Pareto front of these rows."""
    return [replace(row, pareto=_is_on_front(row, rows)) for row in rows]


def _baseline(measurement: Measurement, run: ResultFile, requested: str | None) -> Measurement | None:
    """Returns the row of the requested or default baseline in the run; None if there is none.

    The baseline has the same model and the same status as `measurement`.
    """
    if measurement.status not in ("ok", "reported"):
        return None
    providers = [measurement.provider, "cpu"] if requested else ["cpu", measurement.provider]
    if measurement.provider in (CUDA_GRAPHS, TENSORRT):
        providers.append("cuda")  # most variants run on the GPU on ``cuda`` only
    candidates = [requested or "", *(f"{requested or BASELINE}@{provider}" for provider in providers)]
    rows = {row.cell: row for row in run.rows if row.model == measurement.model and row.status == measurement.status}
    return next((rows[cell] for cell in candidates if cell in rows), None)


def _is_on_front(row: Row, rows: Sequence[Row]) -> bool:
    """Returns whether no other row dominates this row.

    The criteria are accuracy, latency and size. A row dominates another row of the same model, machine and data if it
    is worse in no criterion and better in at least one.
    """
    own_figures = _pareto_figures(row)
    if own_figures is None:
        return False
    group = (row.measurement.model, row.run.machine["id"], row.run.data["sha256"])
    for other in rows:
        other_figures = _pareto_figures(other)
        if (
            other_figures is None
            or (other.measurement.model, other.run.machine["id"], other.run.data["sha256"]) != group
        ):
            continue
        if other_figures != own_figures and all(a >= b for a, b in zip(other_figures, own_figures, strict=True)):
            return False
    return True


def _pareto_figures(row: Row) -> tuple[float, float, float] | None:
    """Returns accuracy, negative p50 and negative size, so that more is better; None if one of the three is unknown."""
    measurement = row.measurement
    p50, size = measurement.latency_ms.get("p50"), measurement.size_bytes.get("total")
    if measurement.status != "ok" or not measurement.score or not p50 or not size:
        return None
    return measurement.score.value, -p50, -float(size)


# Name of an order → function that returns a row's sort key. The smallest key comes first; rows without a key come last.
ORDERS: dict[str, Callable[[Row], float | None]] = {
    "accuracy": lambda row: -row.measurement.score.value if row.measurement.score else None,
    "latency": lambda row: row.measurement.latency_ms.get("p50"),
    "throughput": lambda row: -row.measurement.throughput_per_s if row.measurement.throughput_per_s else None,
    "server": lambda row: -row.measurement.facts["server"]["qps"] if "server" in row.measurement.facts else None,
    "memory": lambda row: row.measurement.memory_bytes.get("peak"),
    "size": lambda row: row.measurement.size_bytes.get("total"),
}


def arrange(rows: Sequence[Row], order: str | None, patterns: Sequence[str], provider: str | None = None) -> list[Row]:
    """Returns the rows that match provider and patterns, sorted by `order`, with new Pareto marks.

    Args:
        rows: The rows to select from.
        order: Name of the sort order, a key of `ORDERS`; None keeps the order of `rows`.
        patterns: Shell patterns for cells or variants, such as ``onnx-*``; empty matches all rows.
        provider: Provider of the rows; None matches all providers, and ``cuda`` also matches ``cuda-graphs``.

    Raises:
        ResultFileError: No row matches.
    """

    def matches(row: Row) -> bool:
        names = (row.measurement.cell, row.measurement.variant)
        has_pattern = any(fnmatch.fnmatchcase(name, each) for each in patterns for name in names)
        return (has_pattern or not patterns) and (provider is None or includes(provider, row.measurement.provider))

    selected = [row for row in rows if matches(row)]
    if not selected:
        cells = ", ".join(dict.fromkeys(row.measurement.cell for row in rows))
        criteria = [*patterns, *([f"*@{provider}"] if provider else [])]
        raise ResultFileError(f"No row matches {', '.join(criteria)}.", f"The cells are: {cells}.")
    if figure := ORDERS.get(order or ""):
        selected.sort(key=lambda row: (figure(row) is None, figure(row) or 0.0))
    return mark_front(selected)
