"""A simulation of replicas that answer queries in batches: arrivals and service times in, latencies out."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Function that takes the number of queries in a batch, and returns the service time in seconds for each query that can
# be the first of such a batch.
ServiceTimes = Callable[[int], Sequence[float]]
# Function that takes the seconds for which a replica was idle, and returns the additional seconds of its next batch.
WakeTimes = Callable[[float], float]


@dataclass(frozen=True)
class Batching:
    """How a replica forms batches.

    Attributes:
        largest: Maximum number of queries in a batch.
        window_s: Seconds that a free replica waits for a full batch, counted from the arrival of the oldest waiting
            query; with 0, a free replica takes all waiting queries that fit into one batch.
    """

    largest: int = 1
    window_s: float = 0.0


@dataclass(frozen=True)
class Served:
    """The outcome of a simulation.

    Attributes:
        latencies_s: Latency of each query in seconds, from its arrival to the end of its batch.
        batches: Number of batches.
        busy_s: Seconds of service, over all replicas.
    """

    latencies_s: np.ndarray
    batches: int
    busy_s: float


def no_wake_time(_: float) -> float:
    """Returns 0: a replica that was idle is as fast as a busy one."""
    return 0.0


def serve(
    arrivals_s: np.ndarray,
    service_s: ServiceTimes,
    batching: Batching,
    replicas: int = 1,
    wake_s: WakeTimes = no_wake_time,
) -> Served:
    """Simulates one queue, from which free replicas take batches in the order of arrival.

    Args:
        arrivals_s: Time of arrival of each query in seconds, in increasing order.
        service_s: The service times; the batch whose first query has the index i takes ``service_s(size)[i]``.
        batching: How a replica forms batches.
        replicas: Number of replicas that share the queue. An idle replica that became free first takes the next batch.
        wake_s: Additional time of a batch after idle time.
    """
    import numpy as np

    arrivals, count = arrivals_s.tolist(), len(arrivals_s)
    largest, window = batching.largest, batching.window_s if batching.largest > 1 else 0.0
    tables: dict[int, Sequence[float]] = {}
    free = [0.0] * replicas  # a heap of the times at which the replicas become free
    ends, sizes, first, busy_s = [], [], 0, 0.0
    while first < count:
        start, limit = max(free[0], arrivals[first]), first + largest
        if window:
            full = arrivals[limit - 1] if limit <= count else math.inf
            start = max(start, min(arrivals[first] + window, full))
        size = bisect_right(arrivals, start, first, min(limit, count)) - first
        table = tables.get(size)
        if table is None:
            table = tables[size] = service_s(size)
        duration = table[first]
        if start > free[0]:
            duration += wake_s(start - free[0])
        heapq.heapreplace(free, start + duration)
        ends.append(start + duration)
        sizes.append(size)
        busy_s += duration
        first += size
    return Served(np.repeat(ends, sizes) - arrivals_s, len(sizes), busy_s)
