"""A plan for a number of rows within a time: processes, machines, hours and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from toolchain.capacity.machines import Machines, missing_samples
from toolchain.errors import VerdictError
from toolchain.results import statistics
from toolchain.results.measurements import Measurement

HOUR_S = 3600.0


@dataclass(frozen=True)
class RowsGoal:
    """A number of rows within a time.

    Attributes:
        rows: Number of rows, at least 1.
        within_s: Time in seconds, above 0.
        price: Price of a core, or of a GPU, for one hour; None if unknown.
    """

    rows: float
    within_s: float
    price: float | None = None


@dataclass(frozen=True)
class Bounded:
    """A figure with the bounds of its 95 % confidence interval; both bounds are None below six rounds."""

    value: float
    low: float | None = None
    high: float | None = None

    def scaled(self, factor: float) -> Bounded:
        """Returns the figure times `factor`."""
        low, high = (None if bound is None else bound * factor for bound in (self.low, self.high))
        return Bounded(self.value * factor, low, high)

    def inverse(self) -> Bounded:
        """Returns 1 / the figure, whose bounds change places."""
        if self.low is None or self.high is None:
            return Bounded(1 / self.value)
        return Bounded(1 / self.value, 1 / self.high, 1 / self.low)

    @property
    def largest(self) -> float:
        """Returns the upper bound, or the value if there are no bounds."""
        return self.value if self.high is None else self.high

    def to_json(self) -> dict[str, float]:
        """Returns the figure as JSON, with six significant digits."""
        bounds = {} if self.low is None or self.high is None else {"low": self.low, "high": self.high}
        return {name: float(f"{value:.6g}") for name, value in {"value": self.value, **bounds}.items()}


@dataclass(frozen=True)
class RowsPlan:
    """The plan of one cell.

    Attributes:
        cell: Name of the cell.
        model: Name of the model.
        machines: The machine that a process needs a part of.
        rows_per_s: Rows per second of one process.
        processes: Number of processes that answer all rows in time, also at the slow end of the interval.
        hours: Hours until all processes have ended.
        unit_hours: Hours of all cores, or GPUs, together.
        cost: Price of `unit_hours`; None without a price.
    """

    cell: str
    model: str
    machines: Machines
    rows_per_s: Bounded
    processes: int
    hours: Bounded
    unit_hours: Bounded
    cost: Bounded | None

    @property
    def units(self) -> int:
        """Returns the number of cores, or GPUs, of all processes."""
        return self.processes * self.machines.units_of_process

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON."""
        return {
            "cell": self.cell,
            "model": self.model,
            "unit": self.machines.unit,
            "units": self.units,
            "processes": self.processes,
            "machines": self.machines.count_for(self.processes),
            "rows_per_s": self.rows_per_s.to_json(),
            "hours": self.hours.to_json(),
            "unit_hours": self.unit_hours.to_json(),
            "cost": self.cost and self.cost.to_json(),
        }


def plan_rows(row: Measurement, machines: Machines, goal: RowsGoal) -> RowsPlan:
    """Returns the smallest plan that answers all rows in time, also at the slow end of the measured interval.

    Args:
        row: Measurement of the cell.
        machines: The machine that measured it.
        goal: Rows, time and price.

    Raises:
        BenchError: The row lacks the necessary samples.
        VerdictError: One row alone takes longer than the time of the goal.
    """
    seconds = seconds_per_row(row)
    if seconds.largest > goal.within_s:
        raise VerdictError(
            f"{row.cell} needs {seconds.largest:.3g} s for one row, which is more than the {goal.within_s:.3g} s of "
            "--within.",
            "Allow more time, or measure a faster variant.",
        )
    # One process cannot answer a part of a row. The rounding removes errors of the floating-point division.
    rows_of_process = math.floor(round(goal.within_s / seconds.largest, 9))
    processes = max(1, math.ceil(round(goal.rows / rows_of_process, 9)))
    total_hours = seconds.scaled(goal.rows / HOUR_S)
    unit_hours = total_hours.scaled(machines.units_of_process)
    return RowsPlan(
        cell=row.cell,
        model=row.model,
        machines=machines,
        rows_per_s=seconds.inverse(),
        processes=processes,
        hours=total_hours.scaled(1 / processes),
        unit_hours=unit_hours,
        cost=None if goal.price is None else unit_hours.scaled(goal.price),
    )


def seconds_per_row(row: Measurement) -> Bounded:
    """Returns the seconds that one process needs for a row: in sorted batches, and for tokenising alone.

    The interval is the bootstrap interval over rounds of `toolchain.results.statistics.mean_interval`.

    Raises:
        BenchError: The row lacks the necessary samples.
    """
    if row.batches is None:
        raise missing_samples(row, "times of batches")
    if row.latency is None or row.with_tokenizing is None:
        raise missing_samples(row, "times of single sentences with tokenising")
    tokenizing_us = [
        max(0.0, total - session)
        for total, session in zip(row.with_tokenizing.means(), row.latency.means(), strict=False)
    ]
    mean_us = sum(tokenizing_us) / len(tokenizing_us)
    value_us = sum(row.batches.values()) / sum(map(sum, row.batches.sentences)) + mean_us
    by_round = row.batches.sentence_times()
    # A result file from elsewhere may have other rounds of single sentences than of batches.
    extras = tokenizing_us if len(tokenizing_us) == len(by_round) else [mean_us] * len(by_round)
    rounds = [batch_us + extra for batch_us, extra in zip(by_round, extras, strict=True)]
    interval = statistics.mean_interval(rounds)
    if interval is None:
        return Bounded(value_us / 1e6)
    # The rounds have unequal numbers of sentences, so the mean over rounds differs a little from the mean over rows.
    scale = value_us / (sum(rounds) / len(rounds)) / 1e6
    return Bounded(value_us / 1e6, interval[0] * scale, interval[1] * scale)
