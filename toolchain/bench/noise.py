"""Processor time that the host and other processes used during a measurement, from the system's counters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Noise:
    """Sums of processor time over all `watch` contexts."""

    def __init__(self) -> None:
        self._total = self._stolen = self._others = 0.0
        self._load: list[float] = []

    @contextmanager
    def watch(self, processes: Sequence[int]) -> Iterator[None]:
        """Adds the processor times during the context.

        Args:
            processes: Ids of the measured processes. Their time and this process's time do not count as noise.
        """
        before, mine = _system(), _own(processes)
        yield
        spent = {name: value - before[name] for name, value in _system().items()}
        idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
        # Linux counts the time of virtual guests twice: as guest time and as user time.
        total = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)
        self._total += total
        self._stolen += spent.get("steal", 0.0)
        self._others += total - idle - spent.get("steal", 0.0) - (_own(processes) - mine)
        if hasattr(os, "getloadavg"):
            self._load.append(os.getloadavg()[0])

    def shares(self) -> dict[str, float]:
        """Returns the noise; empty before the first `watch`.

        Returns:
            ``steal_share``, the share of processor time that the host took; ``others_share``, the share of other
            processes; and ``load_1m``, the mean 1-minute load average, if the system has one.
        """
        if not self._total:
            return {}
        found = {"steal_share": self._stolen / self._total, "others_share": self._others / self._total}
        if self._load:
            found["load_1m"] = sum(self._load) / len(self._load)
        return {name: round(max(0.0, value), 4) for name, value in found.items()}


def _system() -> dict[str, float]:
    import psutil

    return dict(psutil.cpu_times()._asdict())


def _own(processes: Sequence[int]) -> float:
    """Returns the user and system seconds of these processes and of this process; ended processes count as 0."""
    import psutil

    spent = 0.0
    for pid in (*processes, os.getpid()):
        try:
            times: Any = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        spent += times.user + times.system
    return spent
