"""The load of a plan: random arrivals, or arrivals from a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Load:
    """The arrivals at all replicas together.

    Attributes:
        qps: Mean number of queries per second.
        trace_s: Times of arrival in seconds, whose mean rate is `qps`; None for a Poisson process.
    """

    qps: float
    trace_s: np.ndarray | None = None

    @classmethod
    def of_trace(cls, arrivals_s: np.ndarray, qps: float | None = None) -> Load:
        """Returns a load whose queries arrive at the times of a trace.

        Args:
            arrivals_s: Times of arrival in seconds after the first one.
            qps: Rate to which the trace is stretched or compressed; None for the trace's own rate.
        """
        own_qps = (len(arrivals_s) - 1) / float(arrivals_s[-1])
        return cls(own_qps, arrivals_s) if qps is None else cls(qps, arrivals_s * (own_qps / qps))

    def of_replicas(self, replicas: int, queries: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Returns the arrivals at some replicas, if each query goes to a random replica.

        A random part of a Poisson process is a Poisson process, so one replica stands for all of them. Of a trace, the
        result has all replicas that receive a query.

        Args:
            replicas: Number of replicas.
            queries: Number of queries of a Poisson process.
            rng: Source of the random numbers.
        """
        import numpy as np

        if self.trace_s is None:
            return [self._poisson(self.qps / replicas, queries, rng)]
        if replicas == 1:
            return [self.trace_s]
        chosen = rng.integers(replicas, size=len(self.trace_s))
        order = np.argsort(chosen, kind="stable")
        counts = np.bincount(chosen)
        return np.split(self.trace_s[order], np.cumsum(counts[counts > 0])[:-1])

    def of_queue(self, queries: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the arrivals at one queue that all replicas share."""
        return self._poisson(self.qps, queries, rng) if self.trace_s is None else self.trace_s

    @staticmethod
    def _poisson(qps: float, queries: int, rng: np.random.Generator) -> np.ndarray:
        arrivals: np.ndarray = rng.standard_exponential(queries).cumsum() / qps
        return arrivals
