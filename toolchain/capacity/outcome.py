"""The plans of all chosen rows of a result file, and the reasons why some rows have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from toolchain.capacity.machines import Machines
from toolchain.capacity.replicas import ReplicaPlan
from toolchain.capacity.rows import RowsPlan
from toolchain.errors import BenchError, VerdictError
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile

PlanT = TypeVar("PlanT", RowsPlan, ReplicaPlan)


@dataclass(frozen=True)
class Outcome(Generic[PlanT]):
    """The plans of one goal.

    Attributes:
        plans: The plans: first those for cores, then those for GPUs, and each with the fewest first.
        refusals: The error of each cell that cannot reach the goal.
    """

    plans: Sequence[PlanT]
    refusals: Sequence[VerdictError]

    def require_plan(self) -> None:
        """Raises `VerdictError` if there is no plan."""
        if not self.plans:
            first, *others = self.refusals
            count = f"{len(others)} other cell{'s' if len(others) > 1 else ''}"
            counted = f" {count} cannot reach the goal either." if others else ""
            raise VerdictError(first.cause + counted, first.hint)


def plan_all(
    result: ResultFile, rows: Sequence[Measurement], plan: Callable[[Measurement, Machines], PlanT]
) -> Outcome[PlanT]:
    """Returns the plans of rows.

    Args:
        result: The result file.
        rows: Measured rows of the result file, at least one.
        plan: Function that returns the plan of a row, or raises `VerdictError` if the row cannot reach the goal.

    Raises:
        BenchError: A row lacks necessary samples.
    """
    plans: list[PlanT] = []
    refusals = []
    for row in rows:
        try:
            plans.append(plan(row, Machines.of(result, row)))
        except VerdictError as error:
            refusals.append(error)
    return Outcome(sorted(plans, key=lambda each: (each.machines.unit == "GPU", each.units)), refusals)


def choose_rows(result: ResultFile, variants: Sequence[str]) -> list[Measurement]:
    """Returns the measured rows of a result file, or those of the named variants.

    Args:
        result: The result file.
        variants: Names of variants or cells; empty for all measured rows.

    Raises:
        BenchError: A named variant has no samples in the result file, or no row has.
    """
    measured = [row for row in result.rows if row.status == "ok"]
    for name in variants:
        if not any(name in (row.variant, row.cell) for row in measured):
            others = ", ".join(row.cell for row in measured) or "none"
            raise BenchError(
                f"The result file has no measurement of {name}.",
                f"Choose one of its measured cells ({others}), or measure it with "
                f"`toolchain bench --variant {name.partition('@')[0]}`.",
            )
    if not measured:
        raise BenchError("The result file has no measured row.", "Measure with `toolchain bench`.")
    return [row for row in measured if not variants or row.variant in variants or row.cell in variants]
