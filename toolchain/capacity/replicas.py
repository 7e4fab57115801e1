"""A plan for a rate of queries: the smallest number of replicas whose simulated p99 keeps the goal."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from toolchain.capacity.load import Load
from toolchain.capacity.machines import Machines
from toolchain.capacity.queueing import Batching, ServiceTimes, serve
from toolchain.capacity.rows import Bounded
from toolchain.capacity.service import Service, service_of
from toolchain.errors import VerdictError
from toolchain.results.measurements import Measurement
from toolchain.results.statistics import CONFIDENCE

if TYPE_CHECKING:
    import numpy as np

QUERIES = 30_000  # number of queries of a simulation of random arrivals
WARM_UP = 0.1  # share of the random arrivals that do not count, because they meet a queue that began empty
# Largest planned load, as a share of the highest rate of a replica. Near 1, queues grow for longer than a simulation.
MOST_BUSY = 0.95
FIRST_SEED = 20
# Number of simulations of the plan, of a plan with one queue, and of each alternative of the search.
SEEDS, SHARED_SEEDS, SEARCH_SEEDS = 40, 10, 3
# Most queries of the simulations of a plan together, and of an alternative; a long trace has fewer simulations, but at
# least `SEARCH_SEEDS` for the plan, and one for an alternative.
MOST_SIMULATED, MOST_SEARCHED = 2_000_000, 200_000
MOST_REPLICAS = 100_000
MOST_SHARED = 500  # most replicas for which the plan also simulates one queue for all replicas
QUERIES_OF_REPLICA = 100  # fewest queries for each replica that shares a queue
WINDOWS_S = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
WORTHWHILE = 0.98  # a window is tried for batches whose time per query is below this share of a single query's time

Progress = Callable[[str], None]


@dataclass(frozen=True)
class QueryGoal:
    """A rate of queries, and the largest p99 of their latencies.

    Attributes:
        load: The arrivals.
        p99_s: Largest p99 in seconds, waiting included.
        price: Price of a core, or of a GPU, for one hour; None if unknown.
    """

    load: Load
    p99_s: float
    price: float | None = None


@dataclass(frozen=True)
class Latency:
    """Latencies of several simulations in seconds, each with other random numbers.

    Attributes:
        p50_s: Median over the simulations, with the interval that contains 95 % of them.
        p99_s: The same of the p99.
        busy: Mean share of the time in which a replica computes.
        mean_batch: Mean number of queries in a batch.
        seeds: The seeds of the simulations.
    """

    p50_s: Bounded
    p99_s: Bounded
    busy: float
    mean_batch: float
    seeds: Sequence[int]


@dataclass(frozen=True)
class ReplicaPlan:
    """The plan of one cell.

    Attributes:
        cell: Name of the cell.
        model: Name of the model.
        machines: The machine that a replica needs a part of.
        replicas: Number of replicas if a load balancer sends each query to a random replica. The upper bound of their
            p99 keeps the goal.
        median_replicas: Number of replicas whose median p99 keeps the goal, at most `replicas`.
        batching: How each replica forms batches.
        latency: The simulated latency.
        shared_replicas: Number of replicas with the same batches if all replicas take queries from one queue; None if
            it was not simulated, because there are more than `MOST_SHARED` replicas.
        measured_sizes: Batch sizes whose times were measured.
        wake_ms: Largest additional time of a batch after idle time in milliseconds; None if it was not measured.
        price: Price of a core, or of a GPU, for one hour; None if unknown.
    """

    cell: str
    model: str
    machines: Machines
    replicas: int
    median_replicas: int
    batching: Batching
    latency: Latency
    shared_replicas: int | None
    measured_sizes: Sequence[int]
    wake_ms: float | None
    price: float | None

    @property
    def units(self) -> int:
        """Returns the number of cores, or GPUs, of all replicas."""
        return self.replicas * self.machines.units_of_process

    @property
    def cost_per_hour(self) -> float | None:
        """Returns the price of all replicas for one hour; None without a price."""
        return None if self.price is None else self.units * self.price

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON, with times in milliseconds."""
        return {
            "cell": self.cell,
            "model": self.model,
            "unit": self.machines.unit,
            "units": self.units,
            "machines": self.machines.count_for(self.replicas),
            "replicas": self.replicas,
            "median_replicas": self.median_replicas,
            "shared_replicas": self.shared_replicas,
            "largest_batch": self.batching.largest,
            "window_ms": self.batching.window_s * 1000,
            "p50_ms": self.latency.p50_s.scaled(1000).to_json(),
            "p99_ms": self.latency.p99_s.scaled(1000).to_json(),
            "busy": round(self.latency.busy, 4),
            "mean_batch": round(self.latency.mean_batch, 2),
            "cost_per_hour": self.cost_per_hour,
            "measured_sizes": list(self.measured_sizes),
            "wake_ms": None if self.wake_ms is None else round(self.wake_ms, 4),
            "seeds": list(self.latency.seeds),
        }


def plan_replicas(row: Measurement, machines: Machines, goal: QueryGoal, progress: Progress) -> ReplicaPlan:
    """Returns the plan with the fewest replicas; of the batches that need as few, those with the lowest p99.

    Args:
        row: Measurement of the cell.
        machines: The machine that measured it.
        goal: The rate and the p99.
        progress: Function that receives a text about the simulation that runs now.

    Raises:
        BenchError: The row lacks the necessary samples.
        VerdictError: No number of replicas keeps the p99.
    """
    service = service_of(row)
    search = _Search(service, goal, progress)
    search.require_possible(row.cell)
    replicas, batching = search.fewest()
    replicas, median_replicas, latency = search.confirm(row.cell, replicas, batching)
    shared = search.fewest_sharing(replicas, batching) if replicas <= MOST_SHARED else None
    return ReplicaPlan(
        cell=row.cell,
        model=row.model,
        machines=machines,
        replicas=replicas,
        median_replicas=median_replicas,
        batching=batching,
        latency=latency,
        shared_replicas=shared,
        measured_sizes=service.sizes,
        wake_ms=1000 * max(service.wake_s.values()) if service.wake_s else None,
        price=goal.price,
    )


def simulate(
    service: Service,
    load: Load,
    batching: Batching,
    replicas: int,
    seeds: Sequence[int],
    *,
    queries: int | None = None,
    shared: bool = False,
) -> Latency:
    """Simulates the latencies of a load, once for each seed.

    Args:
        service: Service times of a replica.
        load: The arrivals.
        batching: How each replica forms batches.
        replicas: Number of replicas.
        seeds: Seeds of the random numbers; each simulation also has its own bootstrap sample of the measured rounds.
        queries: Number of queries of a simulation of random arrivals, warm-up included; None for `QUERIES`.
        shared: Whether all replicas share one queue; otherwise each query goes to a random replica.
    """
    import numpy as np

    queries = QUERIES if queries is None else queries
    quantiles, busy_s, span_s, count, batches = [], 0.0, 0.0, 0, 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        if shared:
            parts = [load.of_queue(max(queries, QUERIES_OF_REPLICA * replicas), rng)]
        else:
            parts = load.of_replicas(replicas, queries, rng)
        # With its own generator, the service times do not depend on the number of random numbers before them.
        service_s = service.draw(np.concatenate(parts), np.random.default_rng([seed, 1]))
        latencies, offset = [], 0
        for arrivals_s in parts:
            times = functools.partial(_slice, service_s, offset, offset + len(arrivals_s))
            outcome = serve(arrivals_s, times, batching, replicas if shared else 1, service.wake())
            skipped = int(WARM_UP * len(arrivals_s)) if load.trace_s is None else 0
            latencies.append(outcome.latencies_s[skipped:])
            offset += len(arrivals_s)
            busy_s += outcome.busy_s
            batches += outcome.batches
        count += offset
        servers = replicas if shared or load.trace_s is not None else 1
        span_s += servers * float(max(part[-1] for part in parts))
        quantiles.append(np.quantile(np.concatenate(latencies), (0.5, 0.99)))
    p50_s, p99_s = (_bounded(values) for values in np.transpose(quantiles))
    return Latency(p50_s, p99_s, min(1.0, busy_s / span_s), count / batches, tuple(seeds))


def _slice(service_s: ServiceTimes, start: int, end: int, size: int) -> Sequence[float]:
    return service_s(size)[start:end]


def _bounded(values: np.ndarray) -> Bounded:
    import numpy as np

    low, value, high = np.quantile(values, ((1 - CONFIDENCE) / 2, 0.5, (1 + CONFIDENCE) / 2))
    return Bounded(float(value), float(low), float(high))


class _Search:
    """The search for the fewest replicas of one cell."""

    def __init__(self, service: Service, goal: QueryGoal, progress: Progress) -> None:
        self._service, self._goal, self._progress = service, goal, progress
        length = QUERIES if goal.load.trace_s is None else len(goal.load.trace_s)
        self._seeds = range(FIRST_SEED, FIRST_SEED + max(SEARCH_SEEDS, min(SEEDS, MOST_SIMULATED // length)))

    def require_possible(self, cell: str) -> None:
        """Raises `VerdictError` if a query that waits for nothing exceeds the p99 of the goal, or the rate is too high.

        The check does not count the additional time after idle time, which a busier replica does not have.
        """
        # One query in the time of a thousand queries, so that no query waits.
        idle = Load(0.001 / self._service.mean_s(1))
        alone = simulate(replace(self._service, wake_s={}), idle, Batching(), 1, self._seeds)
        if alone.p99_s.largest > self._goal.p99_s:
            raise VerdictError(
                f"No number of replicas keeps a p99 of {1000 * self._goal.p99_s:.4g} ms for {cell}: even if no query "
                f"waits, its p99 is {1000 * alone.p99_s.value:.4g} ms (95 % interval up to "
                f"{1000 * alone.p99_s.largest:.4g} ms).",
                "Allow a larger p99, or measure a faster variant or more threads.",
            )
        if self._first_bound(Batching(self._service.sizes[-1])) > MOST_REPLICAS:
            raise VerdictError(
                f"The rate needs more than {MOST_REPLICAS:,} replicas of {cell}.",
                "Lower the rate, or measure a faster variant.",
            )

    def fewest(self) -> tuple[int, Batching]:
        """Returns the fewest replicas of all kinds of batches, and the batches."""
        best, chosen = MOST_REPLICAS, Batching()
        for batching in (chosen, *self._alternatives()):
            bound = self._first_bound(batching)
            if bound <= best - 1 and (best == MOST_REPLICAS or self._keeps(best - 1, batching)):
                best, chosen = _fewest(bound, best, functools.partial(self._keeps, batching=batching)), batching
        rivals = [chosen, *(Batching(size) for size in self._service.sizes if Batching(size) != chosen)]
        stable = [rival for rival in rivals if self._first_bound(rival) <= best]
        return best, min(stable, key=lambda rival: self._p99_s(best, rival))

    def confirm(self, cell: str, replicas: int, batching: Batching) -> tuple[int, int, Latency]:
        """Returns the replicas for which the upper bound, and the median, of the p99 keeps the goal.

        The third value is the latency of the first number of replicas.

        Raises:
            VerdictError: There is no such number up to `MOST_REPLICAS`.
        """

        @functools.cache
        def latency_of(count: int) -> Latency:
            self._progress(f"{count:,} replicas, {len(self._seeds)} simulations")
            return simulate(self._service, self._goal.load, batching, count, self._seeds)

        def keeps(count: int) -> bool:
            return latency_of(count).p99_s.largest <= self._goal.p99_s

        replicas = _fewest(replicas, MOST_REPLICAS, keeps)
        if not keeps(replicas):
            wake_ms = 1000 * max(self._service.wake_s.values(), default=0.0)
            idle = f" A replica that was idle takes up to {wake_ms:.2g} ms longer." if wake_ms else ""
            raise VerdictError(
                f"No number of replicas up to {MOST_REPLICAS:,} keeps a p99 of {1000 * self._goal.p99_s:.4g} ms for "
                f"{cell}.{idle}",
                "Allow a larger p99, or measure a faster variant.",
            )
        median = _fewest(
            self._first_bound(batching), replicas, lambda count: latency_of(count).p99_s.value <= self._goal.p99_s
        )
        return replicas, median, latency_of(replicas)

    def fewest_sharing(self, most: int, batching: Batching) -> int:
        """Returns the fewest replicas, at most `most`, that keep the goal if they share one queue."""

        def keeps(count: int) -> bool:
            self._progress(f"{count:,} replicas with one queue")
            seeds = self._seeds[:SHARED_SEEDS]
            latency = simulate(self._service, self._goal.load, batching, count, seeds, shared=True)
            return latency.p99_s.largest <= self._goal.p99_s

        return _fewest(self._first_bound(batching), most, keeps)

    def _alternatives(self) -> Iterator[Batching]:
        """Yields the batches to try beside single queries: first without a window."""
        sizes = self._service.sizes[1:]
        single_s = self._service.mean_s(1)
        for window_s in WINDOWS_S:
            for size in sizes:
                is_faster = self._service.mean_s(size) / size < WORTHWHILE * single_s
                if not window_s or (is_faster and window_s < self._goal.p99_s):
                    yield Batching(size, window_s)

    def _first_bound(self, batching: Batching) -> int:
        """Returns the fewest replicas whose load is at most `MOST_BUSY`."""
        return math.ceil(self._goal.load.qps / (MOST_BUSY * self._service.per_second(batching.largest)))

    def _keeps(self, replicas: int, batching: Batching) -> bool:
        return self._p99_s(replicas, batching) <= self._goal.p99_s

    def _p99_s(self, replicas: int, batching: Batching) -> float:
        self._progress(f"{replicas:,} replicas, batches of {batching.largest}")
        trace_s = self._goal.load.trace_s
        length = QUERIES if trace_s is None else len(trace_s)
        seeds = self._seeds[: max(1, min(SEARCH_SEEDS, MOST_SEARCHED // length))]
        return simulate(self._service, self._goal.load, batching, replicas, seeds).p99_s.value


def _fewest(low: int, high: int, keeps: Callable[[int], bool]) -> int:
    """Returns the smallest number from `low` to `high` for which `keeps` is true, or `high` if there is none below it.

    The search doubles its steps above `low`, and then halves the distance. It assumes that a number above one that is
    kept is kept as well.
    """
    step = 1
    while low < high:
        tried = min(low + step - 1, high - 1)
        if keeps(tried):
            high = tried
            break
        low, step = tried + 1, 2 * step
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle + 1, high)
    return high
