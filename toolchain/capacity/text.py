"""Plans as lines of text and as JSON, with the assumptions behind their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.capacity.machines import Machines
from toolchain.capacity.outcome import Outcome
from toolchain.capacity.replicas import QUERIES, QueryGoal, ReplicaPlan
from toolchain.capacity.rows import Bounded, RowsGoal, RowsPlan
from toolchain.results.result_file import ResultFile
from toolchain.system.columns import align

_UNITS_S = (("d", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def rows_lines(result: ResultFile, goal: RowsGoal, outcome: Outcome[RowsPlan]) -> list[str]:
    """Returns the plans for a number of rows as lines of text."""
    header = ["", "rows/s of a process", "processes", "cores", "machines", "hours", "core hours"]
    table = [
        [
            plan.cell,
            _bounded(plan.rows_per_s),
            f"{plan.processes:,}",
            _units(plan),
            f"{plan.machines.count_for(plan.processes):,}",
            _bounded(plan.hours),
            _bounded(plan.unit_hours),
            *([_bounded(plan.cost)] if plan.cost else []),
        ]
        for plan in outcome.plans
    ]
    header += ["cost"] if goal.price is not None else []
    title = f"{goal.rows:,.10g} rows within {_duration(goal.within_s)}, measured on {_machine(result)}:"
    return _page(title, header, table, outcome, rows_assumptions(result, outcome.plans))


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
        *_sharing(plan.machines for plan in plans),
        f"Rows are as long as the sentences of {result.data['name']}, sorted by length, in batches of at most "
        f"{result.run.get('batch_size', 1)}. Tokenising counts. Reading, writing and the network do not count.",
        "The processes end in time also at the slow end of the 95 % interval. Nothing is added for failures.",
    ]


def replica_lines(result: ResultFile, goal: QueryGoal, trace: str, outcome: Outcome[ReplicaPlan]) -> list[str]:
    """Returns the plans for a rate of queries as lines of text; `trace` names the file of the arrivals, or is empty."""
    header = ["", "replicas", "cores", "machines", "largest batch", "window ms", "p50 ms", "p99 ms", "busy"]
    header += ["mean batch", "with one queue"] + (["cost per hour"] if goal.price is not None else [])
    table = [
        [
            plan.cell,
            f"{plan.replicas:,}",
            _units(plan),
            f"{plan.machines.count_for(plan.replicas):,}",
            str(plan.batching.largest),
            f"{1000 * plan.batching.window_s:g}",
            _bounded(plan.latency.p50_s.scaled(1000)),
            _bounded(plan.latency.p99_s.scaled(1000)),
            f"{plan.latency.busy:.0%}",
            f"{plan.latency.mean_batch:.1f}",
            "–" if plan.shared_replicas is None else f"{plan.shared_replicas:,}",
            *([f"{plan.cost_per_hour:,.4g}"] if plan.cost_per_hour is not None else []),
        ]
        for plan in outcome.plans
    ]
    title = f"{goal.load.qps:,.6g} queries/s with a p99 of {1000 * goal.p99_s:g} ms, measured on {_machine(result)}:"
    return _page(title, header, table, outcome, replica_assumptions(result, goal, trace, outcome.plans))


def replica_json(result: ResultFile, goal: QueryGoal, trace: str, outcome: Outcome[ReplicaPlan]) -> dict[str, Any]:
    """Returns the plans for a rate of queries as JSON; `trace` names the file of the arrivals, or is empty."""
    body = {"qps": goal.load.qps, "p99_ms": 1000 * goal.p99_s, "trace": trace or None, "price": goal.price}
    return _json(body, outcome, replica_assumptions(result, goal, trace, outcome.plans))


def replica_assumptions(result: ResultFile, goal: QueryGoal, trace: str, plans: Sequence[ReplicaPlan]) -> list[str]:
    """Returns the assumptions of plans for a rate of queries, a few sentences for each."""
    if not plans:
        return []
    count = len(plans[0].latency.seeds)
    if goal.load.trace_s is None:
        arrivals, queries = "Queries arrive at random times (a Poisson process).", f"{QUERIES:,} queries"
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
        *_sharing(plan.machines for plan in plans),
        f"The p99 is the median of {count} simulations of {queries}. Its interval contains 95 % of them, and its upper "
        "end keeps the goal. Each simulation has random numbers of its own (seeds "
        f"{plans[0].latency.seeds[0]} to {plans[0].latency.seeds[-1]}), and a bootstrap sample of the measured rounds.",
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


def _sharing(all_machines: Any) -> list[str]:
    """Returns the assumption for machines on which several processes run."""
    machines: Machines = next(iter(all_machines))
    count = machines.processes_of_machine
    size = f"one process with {machines.text(machines.units_of_process)}"
    if not machines.units_of_machine:
        return [f"The measurement ran {size}. The size of its machine is unknown, so each process has its own machine."]
    if count == 1:
        return [f"Each machine runs {size}, as the measured one did."]
    return [
        f"The measurement ran {size} on a machine with {machines.text(machines.units_of_machine)}. The plan runs "
        f"{count} such processes on each machine, and assumes that they do not slow each other."
    ]


def _page(
    title: str, header: Sequence[str], table: Sequence[Sequence[str]], outcome: Outcome[Any], assumptions: Sequence[str]
) -> list[str]:
    lines = [title, *align([list(header), *table])] if table else []
    lines += [error.cause for error in outcome.refusals] if table else []
    return [*lines, *(["Assumptions:"] if assumptions else []), *(f"  * {text}" for text in assumptions)]


def _json(goal: dict[str, Any], outcome: Outcome[Any], assumptions: Sequence[str]) -> dict[str, Any]:
    return {
        "goal": goal,
        "plans": [plan.to_json() for plan in outcome.plans],
        "refusals": [error.cause for error in outcome.refusals],
        "assumptions": list(assumptions),
    }


def _units(plan: RowsPlan | ReplicaPlan) -> str:
    return f"{plan.units:,}" if plan.machines.unit == "core" else plan.machines.text(plan.units)


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
