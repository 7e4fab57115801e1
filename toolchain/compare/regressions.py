"""Regressions from an old run to a new run on the same machine and data, cell by cell.

Every figure is compared as a cost: time, bytes or wrong answers. A change is the increase of a cost as a share of the
cost in the old run. The rounds of two runs are not interleaved, and the speed of a machine drifts between runs.
If both runs have the same baseline, the comparison reduces the effect of this drift. In this case, the time of a row is
divided by the baseline's time in the same run. The resulting relative times hide a slowdown of all rows. If the
baseline becomes faster, the relative times of all other rows increase.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from toolchain.errors import ResultFileError, VerdictError
from toolchain.results import statistics
from toolchain.results.providers import is_on_gpu
from toolchain.results.scores import Accuracy, EntityScore, RegressionScore, Score
from toolchain.results.statistics import CONFIDENCE, Ratio

if TYPE_CHECKING:
    from toolchain.compare.rows import Row
    from toolchain.results.measurements import Measurement

_TOLERANCE = 1e-9  # Tolerance for rounding: as floats, 105 bytes are slightly more than 5 % above 100 bytes.


def parse_share(text: str) -> float:
    """Returns a percentage as a share: 0.05 for ``5%`` and for ``5``.

    Raises:
        ValueError: The text is not a percentage from 0 to 100, or it is ambiguous: ``0.05`` may mean 5 % or 0.05 %.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(%?)", text.strip())
    percent = float(match[1]) if match else math.inf
    if not match or percent > 100:
        raise ValueError(f"{text!r} is not a percentage from 0 to 100, such as 5%")
    if not match[2] and 0 < percent < 1:
        raise ValueError(f"{text!r} may mean {percent:.0%} or {percent:g}%; write the % sign")
    return percent / 100


@dataclass(frozen=True)
class Change:
    """The change of one figure of a cell from the old run to the new run; None marks an unknown value.

    Attributes:
        figure: Name of the figure.
        old: The figure in the old run.
        new: The figure in the new run.
        regressed: Whether the change is a regression by the rules of `find_regressions`.
        worse: Increase of the cost as a share of the old cost; negative is better.
        low: Lower bound of the 95 % interval of `worse`; None if there are too few rounds.
        high: Upper bound of the 95 % interval of `worse`; None if there are too few rounds.
        may_be_none: Whether the 95 % interval of `worse` includes 0, or the test of the score is not significant.
        remark: Further information about the change; may be empty.
    """

    figure: str
    old: float
    new: float | None
    regressed: bool
    worse: float | None = None
    low: float | None = None
    high: float | None = None
    may_be_none: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Pair:
    """A row of the old run and the row of the same cell in the new run.

    Attributes:
        old: Row of the old run.
        new: Row of the new run; None if the new run has no row of this cell.
        changes: The change of each figure of the cell; empty if the new run did not measure the cell.
        lost: Empty if the new run measured the cell. Otherwise the status and reason of the cell's row in the new run,
            or ``missing`` if the new run has no row of the cell.
    """

    old: Row
    new: Row | None
    changes: tuple[Change, ...] = ()
    lost: str = ""

    @property
    def regressed(self) -> bool:
        """Returns whether the new run did not measure the cell, or any figure of the cell regressed."""
        return bool(self.lost) or any(change.regressed for change in self.changes)


@dataclass(frozen=True)
class Regressions:
    """The result of comparing two runs.

    Attributes:
        limit: Largest tolerated increase of a cost, as a share.
        pairs: The compared pairs of rows, and the rows of the old run whose cell the new run did not measure.
        not_compared: Model, cell and reason of each cell that is not compared.
    """

    limit: float
    pairs: tuple[Pair, ...]
    not_compared: tuple[tuple[str, str, str], ...]

    @property
    def regressed_pairs(self) -> tuple[Pair, ...]:
        """Returns the pairs of rows whose cell regressed."""
        return tuple(pair for pair in self.pairs if pair.regressed)


class _Key(NamedTuple):
    """Settings that a row of the old run and a row of the new run must share to be compared.

    Two rows with the same model and cell may differ in other settings, such as the machine. For each of these other
    settings, `_DIFFERENCES` holds the reason why the two rows are not compared, such as ``another machine``.
    """

    model: str
    cell: str
    machine: str
    data: str
    threads: int | None
    batch: int | None
    device: int | None


_DIFFERENCES = ("another machine", "other data", "another number of threads", "another batch size", "another GPU")


def _comparison_key(row: Row) -> _Key:
    run, measurement = row.run, row.measurement
    gpu = run.run.get("device_id", 0) if is_on_gpu(measurement.provider) else None
    settings = run.run.get("threads"), run.run.get("batch_size"), gpu
    return _Key(measurement.model, measurement.cell, run.machine["id"], run.data["sha256"], *settings)


def find_regressions(new: Sequence[Row], old: Sequence[Row], limit: float) -> Regressions:
    """Compares each measured row of the old run with the row of the new run that has the same settings.

    The settings of a row are model, cell, machine, data, threads, batch size and, for CUDA, the GPU. Of several
    rows with the same settings, the newest one counts.

    * Latency (p50) and throughput regress if their cost grows by more than the limit and the 95 % interval of the
      growth excludes 0. With too few rounds for an interval, the limit alone decides whether latency and throughput
      regress.
    * Times are relative to the baseline if the old row and the new row have the same baseline, and absolute otherwise.
      The times of a baseline row are reported but never regress.
    * Peak memory and size regress if they grow by more than the limit.
    * Accuracy regresses if the number of wrong answers grows by more than the limit and McNemar's test is significant.
      The increase of wrong answers is divided by the old number of wrong answers, or by 1 if the old number is 0. If
      the predicted labels are unknown, the limit alone decides whether accuracy regresses.
    * Entity F1 regresses as accuracy does; the number of wrong and of missed entities counts.
    * The error of a regression model regresses if the mean absolute error grows by more than the limit and Wilcoxon's
      signed-rank test is significant.
    * A figure regresses if the old run has it and the new run lacks it. A figure that the old run lacks is not
      compared.
    * A cell regresses if its row in the new run is missing or has the status failed or unavailable.

    Args:
        new: Rows of the new run.
        old: Rows of the old run.
        limit: Largest tolerated increase of a cost, as a share: 0.05 for 5 %.

    Raises:
        ResultFileError: No pair of rows can be compared.
    """
    measured_rows = [row for row in old if row.measurement.status == "ok"]
    old_by_key, new_by_key = (
        {_comparison_key(row): row for row in sorted(rows, key=lambda r: r.run.created)}
        for rows in (measured_rows, new)
    )
    pairs, not_compared = [], []
    for key, row in old_by_key.items():
        similar = [new_key for new_key in new_by_key if new_key[:2] == key[:2]]
        if key in new_by_key:
            pairs.append(_make_pair(row, new_by_key[key], limit))
        elif similar:
            settings = zip(_DIFFERENCES, key[2:], similar[-1][2:], strict=True)
            differences = [text for text, old_value, new_value in settings if old_value != new_value]
            not_compared.append((*key[:2], ", ".join(differences)))
        else:
            pairs.append(Pair(row, None, lost="missing"))
    if not any(pair.new for pair in pairs):
        reasons = (
            "; ".join(dict.fromkeys(reason for *_, reason in not_compared))
            or "the runs have no measured cell in common"
        )
        hint = "Make both runs with `toolchain bench` on one machine, with the same data and number of threads."
        raise ResultFileError(f"The two runs cannot be compared: {reasons}.", hint)
    old_cells = {key[:2] for key in old_by_key}
    added = [key for key, row in new_by_key.items() if key[:2] not in old_cells and row.measurement.status == "ok"]
    not_compared += [(*key[:2], "not measured in the old run") for key in added]
    return Regressions(limit, tuple(pairs), tuple(not_compared))


def _make_pair(old: Row, new: Row, limit: float) -> Pair:
    new_measurement = new.measurement
    if new_measurement.status != "ok":
        return Pair(old, new, lost=f"{new_measurement.status}: {new_measurement.reason}".removesuffix(": "))
    figures = {name: old_value for name, read in _FIGURES.items() if (old_value := read(old.measurement)) is not None}
    return Pair(old, new, tuple(_make_change(name, old_value, old, new, limit) for name, old_value in figures.items()))


def _make_change(figure: str, old_value: float, old: Row, new: Row, limit: float) -> Change:
    new_value = _FIGURES[figure](new.measurement)
    if new_value is None:
        return Change(figure, old_value, None, True, remark="unknown in the new run")
    cost, may_be_none, remark, can_regress = _figure_cost(figure, old, new)
    low, high = (None if bound is None else bound - 1 for bound in (cost.low, cost.high))
    worse = cost.value - 1
    regressed = can_regress and not may_be_none and worse - limit > _TOLERANCE
    return Change(figure, old_value, new_value, regressed, worse, low, high, may_be_none, remark)


_FIGURES: Mapping[str, Callable[[Measurement], float | None]] = {
    "latency_p50_ms": lambda found: found.latency_ms.get("p50"),
    "throughput_per_s": lambda found: found.throughput_per_s,
    "peak_memory_bytes": lambda found: found.memory_bytes.get("peak"),
    "size_bytes": lambda found: found.size_bytes.get("total"),
    "accuracy": lambda found: found.score.value if isinstance(found.score, Accuracy) else None,
    "entity_f1": lambda found: found.score.value if isinstance(found.score, EntityScore) else None,
    "mean_absolute_error": lambda found: (
        found.score.mean_absolute_error if isinstance(found.score, RegressionScore) else None
    ),
}
# Name of a time figure → function that returns a row's speed-up over its baseline, and function that returns the time
# of each round.
_TIMES: Mapping[str, tuple[Callable[[Row], Ratio | None], Callable[[Measurement], list[float]]]] = {
    "latency_p50_ms": (lambda row: row.speedup, lambda found: found.latency.medians() if found.latency else []),
    "throughput_per_s": (
        lambda row: row.throughput_gain,
        lambda found: found.batches.sentence_times() if found.batches else [],
    ),
}


class _Cost(NamedTuple):
    """The change of a cost from the old run to the new run.

    Attributes:
        ratio: New cost / old cost.
        may_be_none: Whether the 95 % interval of `ratio` includes 1, or the test of the score is not significant.
        remark: Further information about the change; may be empty.
        can_regress: Whether the change can be a regression; false for the times of a baseline.
    """

    ratio: Ratio
    may_be_none: bool = False
    remark: str = ""
    can_regress: bool = True


def _figure_cost(figure: str, old: Row, new: Row) -> _Cost:
    if figure in _TIMES:
        return _time_cost(*_TIMES[figure], old, new)
    if figure in ("accuracy", "entity_f1"):
        return _tested_cost(_wrong_answers_cost(old.measurement, new.measurement), old, new)
    if figure == "mean_absolute_error":
        return _tested_cost(_error_cost(old.measurement, new.measurement), old, new)
    old_value, new_value = (max(_FIGURES[figure](row.measurement) or 0, 1) for row in (old, new))
    return _Cost(Ratio(new_value / old_value))


def _time_cost(
    gain: Callable[[Row], Ratio | None], rounds: Callable[[Measurement], list[float]], old: Row, new: Row
) -> _Cost:
    old_gain, new_gain = gain(old), gain(new)
    same_baseline = old.baseline and new.baseline and old.baseline.cell == new.baseline.cell
    is_baseline = old.measurement is old.baseline and new.measurement is new.baseline
    if same_baseline and old_gain and new_gain and not is_baseline:
        cost = _quotient(old_gain, new_gain)
        remark = f"relative to {old.baseline.cell} of each run" if old.baseline else ""
    else:
        cost = _quotient(*(_as_ratio(rounds(row.measurement)) for row in (new, old)))
        remark = (
            "the baseline: not compared"
            if is_baseline
            else "no common baseline, so the change includes the drift of the machine's speed"
        )
    return _Cost(cost, cost.differs is False, remark, not is_baseline)


def _as_ratio(rounds: Sequence[float]) -> Ratio:
    return statistics.ratio(rounds, [1.0] * len(rounds))


def _quotient(numerator: Ratio, denominator: Ratio) -> Ratio:
    """Returns the quotient of two ratios from separate runs, with its 95 % interval.

    The lower bound of a quotient ``q = n / d`` satisfies ``log²(q / q.low) = log²(n / n.low) + log²(d.high / d)``. The
    upper bound of ``q = n / d`` satisfies ``log²(q.high / q) = log²(n.high / n) + log²(d / d.low)``. See Zou and Donner
    2008, "Construction of confidence limits about effect measures: a general approach".
    """
    value = numerator.value / denominator.value
    if numerator.low is None or numerator.high is None or denominator.low is None or denominator.high is None:
        return Ratio(value)
    down = math.hypot(math.log(numerator.value / numerator.low), math.log(denominator.high / denominator.value))
    up = math.hypot(math.log(numerator.high / numerator.value), math.log(denominator.value / denominator.low))
    return Ratio(value, value * math.exp(-down), value * math.exp(up))


def _wrong_answers_cost(old: Measurement, new: Measurement) -> Ratio:
    wrong = [_count_wrong(found.score) for found in (old, new)]
    return Ratio(1 + (wrong[1] - wrong[0]) / max(wrong[0], 1))


def _count_wrong(score: Score | None) -> int:
    """Returns the number of wrong answers, or for entities, the number of wrong and of missed entities."""
    if isinstance(score, EntityScore):
        return score.predicted + score.labelled - 2 * score.found
    return score.count - score.correct if isinstance(score, Accuracy) else 0


def _error_cost(old: Measurement, new: Measurement) -> Ratio:
    old_error, new_error = (_FIGURES["mean_absolute_error"](found) or 0.0 for found in (old, new))
    return Ratio(new_error / old_error) if old_error else Ratio(1 + new_error)


def _tested_cost(cost: Ratio, old: Row, new: Row) -> _Cost:
    """Returns the change of a score's cost with the test of the two rows' answers."""
    quality = replace(new, baseline=old.measurement).quality
    if quality is None or quality.p is None or cost.value == 1:
        return _Cost(cost)
    return _Cost(cost, quality.p >= 1 - CONFIDENCE, f"{quality.test} p {quality.p:.2g}")


def require_no_regressions(result: Regressions) -> None:
    """Requires that no cell regressed.

    Raises:
        VerdictError: A cell regressed.
    """
    if not result.regressed_pairs:
        return
    cells = []
    for pair in result.regressed_pairs:
        if pair.lost:
            reason = pair.new.measurement.status if pair.new else "missing"
        else:
            reason = ", ".join(change.figure for change in pair.changes if change.regressed)
        cells.append(f"{pair.old.measurement.cell} ({reason})")
    limit = f"{result.limit * 100:g}%"
    cause = f"{len(cells)} of {len(result.pairs)} cells are no longer measured or are worse by more than {limit}"
    hint = "Find the change that caused the regression. If the regression is intended, compare with a newer run."
    raise VerdictError(f"{cause}: {'; '.join(cells)}.", hint)
