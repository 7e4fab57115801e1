"""The share of the processors that the operating system grants a container, or another group of processes.

Linux calls such a group a control group. Version 2 of control groups states the quota in ``cpu.max``, version 1 in
``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``; see https://docs.kernel.org/admin-guide/cgroup-v2.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota() -> float | None:
    """Returns the number of CPUs whose time this process may use, such as 1.5; None without a limit."""
    return min(filter(None, map(_quota_of, _groups())), default=None)


def _groups() -> Iterator[Path]:
    """Yields the folder of this process's group and of every group around it.

    In a container, the folder of its group may be `ROOT` itself, whatever the record of this process says.
    """
    yield from (ROOT, ROOT / "cpu")
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = ROOT / "cpu" if controllers else ROOT
        folder = base / path.strip("/")
        while folder != base and base in folder.parents:
            yield folder
            folder = folder.parent


def _quota_of(group: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
        except (OSError, ValueError):  # the group has no such file, or no limit: "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
