"""Noise: processor time that other processes and the host of a virtual machine use during a measurement."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Noise:
    """Sums of processor time over all `watch` contexts, from the system's counters."""

    def __init__(self) -> None:
        self._total_s = self._stolen_s = self._others_s = 0.0
        self._loads: list[float] = []

    @contextmanager
    def watch(self, processes: Sequence[int]) -> Iterator[None]:
        """Adds the processor time that passes during the context to this object's sums.

        Args:
            processes: Ids of the measured processes. The time of the measured processes and of this process is not
                noise.
        """
        system_before, own_before = _system_seconds(), _process_seconds(processes)
        yield
        elapsed = {name: value - system_before[name] for name, value in _system_seconds().items()}
        idle = elapsed.get("idle", 0.0) + elapsed.get("iowait", 0.0)
        # Linux counts the time of virtual guests twice: as guest time and as user time.
        total = sum(elapsed.values()) - elapsed.get("guest", 0.0) - elapsed.get("guest_nice", 0.0)
        self._total_s += total
        self._stolen_s += elapsed.get("steal", 0.0)
        self._others_s += total - idle - elapsed.get("steal", 0.0) - (_process_seconds(processes) - own_before)
        if hasattr(os, "getloadavg"):
            self._loads.append(os.getloadavg()[0])

    def shares(self) -> dict[str, float]:
        """Returns the noise as shares of the processor time; empty before the first `watch`.

        Returns:
            ``steal_share`` is the share of processor time that the host took from this virtual machine.
            ``others_share`` is the share of processor time that other processes used. ``load_1m`` is the mean 1-minute
            load average, if the system reports it.
        """
        if not self._total_s:
            return {}
        shares = {"steal_share": self._stolen_s / self._total_s, "others_share": self._others_s / self._total_s}
        if self._loads:
            shares["load_1m"] = sum(self._loads) / len(self._loads)
        return {name: round(max(0.0, value), 4) for name, value in shares.items()}


def _system_seconds() -> dict[str, float]:
    import psutil

    return dict(psutil.cpu_times()._asdict())


def _process_seconds(processes: Sequence[int]) -> float:
    """Returns the user and system seconds of `processes` and of the current process; ended processes count as 0."""
    import psutil

    seconds = 0.0
    for pid in (*processes, os.getpid()):
        try:
            times: Any = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        seconds += times.user + times.system
    return seconds
