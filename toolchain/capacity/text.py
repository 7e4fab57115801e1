"""Plans as lines of text and as JSON, with the assumptions behind their numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from toolchain.capacity.machines import Machines
from toolchain.capacity.outcome import Outcome, PlanT
from toolchain.capacity.replicas import MOST_BUSY, QUERIES, WARM_UP, QueryGoal, ReplicaPlan
from toolchain.capacity.rows import Bounded, RowsGoal, RowsPlan
from toolchain.results.result_file import ResultFile
from toolchain.system.columns import align

_UNITS_S = (("d", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def rows_lines(result: ResultFile, goal: RowsGoal, outcome: Outcome[RowsPlan], width: int | None = None) -> list[str]:
    """Returns the plans for a number of rows as lines of at most `width` characters; None for no limit."""
    title = f"{goal.rows:,.10g} rows within {_duration(goal.within_s)}, measured on {_machine(result)}:"
    lines = []
    for unit, plans in _by_unit(outcome.plans):
        header = ["", "processes", f"{unit}s", "machines", "hours", f"{unit} hours"]
        header += [*(["cost"] if goal.price is not None else []), "rows/s of a process"]
        table = [
            [
                plan.cell,
                f"{plan.processes:,}",
                f"{plan.units:,}",
                f"{plan.machines.count_for(plan.processes):,}",
                _bounded(plan.hours),
                _bounded(plan.unit_hours),
                *([_bounded(plan.cost)] if plan.cost else []),
                _bounded(plan.rows_per_s),
            ]
            for plan in plans
        ]
        lines += align([header, *table], width)
    return _page(title, lines, outcome, rows_assumptions(result, outcome.plans), width)


def rows_json(result: ResultFile, goal: RowsGoal, outcome: Outcome[RowsPlan]) -> dict[str, Any]:
    """Returns the plans for a number of rows as JSON."""
    body = {"rows": goal.rows, "within_s": goal.within_s, "price": goal.price}
    return _json(body, outcome, rows_assumptions(result, outcome.plans))


def rows_assumptions(result: ResultFile, plans: Sequence[RowsPlan]) -> list[str]:
    """Returns the assumptions of plans for a number of rows, one sentence or two for each."""
    if not plans:
        return []
    return [
        "Rows are independent, so N processes answer N times as many rows as the measured one.",
        *_sharing(plans),
        f"Rows are as long as the sentences of {result.data['name']}, sorted by length, in batches of at most "
        f"{result.run.get('batch_size', 1)}. Tokenising counts. Reading, writing and the network do not count.",
        "The processes end in time also at the slow end of the 95 % interval. Nothing is added for failures.",
    ]


def replica_lines(
    result: ResultFile, goal: QueryGoal, trace: str, outcome: Outcome[ReplicaPlan], width: int | None = None
) -> list[str]:
    """Returns the plans for a rate of queries as lines of text.

    Args:
        result: The result file.
        goal: The rate and the p99.
        trace: File of the arrivals; empty for random arrivals.
        outcome: The plans.
        width: Maximum number of characters in a line; None for no limit.
    """
    title = f"{goal.load.qps:,.6g} queries/s with a p99 of {1000 * goal.p99_s:g} ms, measured on {_machine(result)}:"
    lines = []
    for unit, plans in _by_unit(outcome.plans):
        header = ["", "replicas", f"{unit}s", "machines", "largest batch", "window ms", "p50 ms", "p99 ms", "busy"]
        header += ["mean batch", "at the median", "with one queue"] + (
            ["cost per hour"] if goal.price is not None else []
        )
        table = [
            [
                plan.cell,
                f"{plan.replicas:,}",
                f"{plan.units:,}",
                f"{plan.machines.count_for(plan.replicas):,}",
                str(plan.batching.largest),
                f"{1000 * plan.batching.window_s:g}",
                _bounded(plan.latency.p50_s.scaled(1000)),
                _bounded(plan.latency.p99_s.scaled(1000)),
                f"{plan.latency.busy:.0%}",
                f"{plan.latency.mean_batch:.1f}",
                f"{plan.median_replicas:,}",
                "–" if plan.shared_replicas is None else f"{plan.shared_replicas:,}",
                *([f"{plan.cost_per_hour:,.4g}"] if plan.cost_per_hour is not None else []),
            ]
            for plan in plans
        ]
        lines += align([header, *table], width)
    return _page(title, lines, outcome, replica_assumptions(result, goal, trace, outcome.plans), width)


def replica_json(result: ResultFile, goal: QueryGoal, trace: str, outcome: Outcome[ReplicaPlan]) -> dict[str, Any]:
    """Returns the plans for a rate of queries as JSON.

    `trace` is the path of the file with the times of arrival, and is empty if the queries arrive at random times.
    """
    body = {"qps": goal.load.qps, "p99_ms": round(1000 * goal.p99_s, 6), "trace": trace or None, "price": goal.price}
    return _json(body, outcome, replica_assumptions(result, goal, trace, outcome.plans))


def replica_assumptions(result: ResultFile, goal: QueryGoal, trace: str, plans: Sequence[ReplicaPlan]) -> list[str]:
    """Returns the assumptions of plans for a rate of queries, a few sentences for each."""
    if not plans:
        return []
    seeds = plans[0].latency.seeds
    if goal.load.trace_s is None:
        arrivals = "Queries arrive at random times (a Poisson process)."
        queries = f"{QUERIES:,} queries, of which the first {100 * WARM_UP:g} % do not count"
    else:
        queries = f"all {len(goal.load.trace_s):,} queries"
        arrivals = f"Queries arrive as in {trace}, at {goal.load.qps:.6g} queries/s on average."
    return [
        f"{arrivals} The load balancer sends each query to a random replica, as a Kubernetes Service does. A load "
        "balancer with one queue, from which free replicas take queries, needs the replicas in the column `with one "
        "queue`.",
        "A free replica takes all waiting queries that fit into a batch. With a window, it first waits until the batch "
        "is full, or until the oldest query has waited for the window.",
        *_service_texts(result, plans),
        *_sharing(plans),
        f"The p99 is the median of {len(seeds)} simulations of {queries}. Its interval contains 95 % of them, and its "
        "upper end keeps the goal. The column `at the median` has the replicas whose median keeps it. Each simulation "
        f"has random numbers of its own (seeds {seeds[0]} to {seeds[-1]}) and a bootstrap sample of the measured "
        "rounds.",
        f"The load of a replica is at most {100 * MOST_BUSY:g} % of the highest rate that it can answer.",
    ]


def _service_texts(result: ResultFile, plans: Sequence[ReplicaPlan]) -> list[str]:
    texts = [
        f"Queries are as long as the sentences of {result.data['name']}. Tokenising counts. The network and the server "
        "around the model do not count."
    ]
    if len(plans[0].measured_sizes) > 1:
        sizes = ", ".join(map(str, plans[0].measured_sizes))
        texts.append(
            f"Service times are measured times of batches of {sizes} queries. Between two of these sizes, the same "
            "quantile of both is interpolated linearly."
        )
    else:
        texts.append(
            "Only single queries were measured, so each replica answers one query at a time. "
            "`toolchain bench --service-times` also measures batches."
        )
    if plans[0].wake_ms is None:
        texts.append(
            "Queries after idle time count as fast as others, because the result has no times after pauses. "
            "`toolchain bench --service-times` measures them."
        )
    else:
        extra = ", ".join(f"{plan.wake_ms:.2g} ms ({plan.cell})" for plan in plans if plan.wake_ms is not None)
        texts.append(f"After idle time, a batch takes longer, as measured after pauses: up to {extra}.")
    return texts


def _sharing(plans: Sequence[RowsPlan | ReplicaPlan]) -> list[str]:
    """Returns the assumption for each kind of machine on which processes run."""
    return [_sharing_of(machines) for machines in dict.fromkeys(plan.machines for plan in plans)]


def _sharing_of(machines: Machines) -> str:
    count = machines.processes_of_machine
    size = f"one process with {machines.text(machines.units_of_process)}"
    if not machines.units_of_machine:
        return f"The measurement ran {size}. The size of its machine is unknown, so each process has its own machine."
    if count == 1:
        return f"Each machine runs {size}, as the measured one did."
    return (
        f"The measurement ran {size} on a machine with {machines.text(machines.units_of_machine)}. The plan runs "
        f"{count} such processes on each machine, and assumes that they do not slow each other."
    )


def _by_unit(plans: Sequence[PlanT]) -> list[tuple[str, list[PlanT]]]:
    """Returns the plans that count cores, and those that count GPUs, each with their unit."""
    units = dict.fromkeys(plan.machines.unit for plan in plans)
    return [(unit, [plan for plan in plans if plan.machines.unit == unit]) for unit in units]


def _page(
    title: str, table: Sequence[str], outcome: Outcome[Any], assumptions: Sequence[str], width: int | None
) -> list[str]:
    """Returns title, table, refusals and assumptions; without a plan, nothing, because an error states the refusals."""
    if not table:
        return []
    lines = [*_wrap(title, width), *table]
    for error in outcome.refusals:
        lines += _wrap(error.cause, width)
    lines.append("Assumptions:")
    for text in assumptions:
        lines += _wrap(f"  * {text}", width, "    ")
    return lines


def _wrap(text: str, width: int | None, indent: str = "") -> list[str]:
    if not width:
        return [text]
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _json(goal: dict[str, Any], outcome: Outcome[Any], assumptions: Sequence[str]) -> dict[str, Any]:
    return {
        "goal": goal,
        "plans": [plan.to_json() for plan in outcome.plans],
        "refusals": [error.cause for error in outcome.refusals],
        "assumptions": list(assumptions),
    }


def _machine(result: ResultFile) -> str:
    gpus = "".join(f", {gpu['name']}" for gpu in result.machine["gpu"])
    return f"{result.machine['cpu']} ({result.machine['cores']} cores{gpus})"


def _bounded(figure: Bounded) -> str:
    """Returns a figure with its interval, such as ``12.3 [11.9, 12.8]``."""
    if figure.low is None or figure.high is None:
        return _number(figure.value)
    return f"{_number(figure.value)} [{_number(figure.low)}, {_number(figure.high)}]"


def _number(value: float) -> str:
    """Returns a number with at least three significant digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    name, unit_s = next((pair for pair in _UNITS_S if seconds >= pair[1]), _UNITS_S[-1])
    return f"{seconds / unit_s:.6g} {name}"
