"""Names that distinguish the machines of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.compare.report.columns import machine_name
from toolchain.compare.rows import Row


class MachineNames:
    """The name of each row's machine; different machines have different names.

    The machine of a row is its processor or GPU. If rows of one processor or GPU were measured with several numbers of
    threads, the name also states the number of threads.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        threads: dict[Any, set[Any]] = {}
        for row in rows:
            threads.setdefault(_device(row), set()).add(row.run.run.get("threads"))
        self._several = {device for device, numbers in threads.items() if len(numbers) > 1}
        names: dict[Any, str] = {}
        for row in rows:
            names.setdefault(self._key(row), self._plain_name(row))
        self._names = _numbered(names)

    def name(self, row: Row) -> str:
        """Returns the name of the row's machine."""
        return self._names[self._key(row)]

    def _key(self, row: Row) -> Any:
        device = _device(row)
        return (*device, row.run.run.get("threads")) if device in self._several else device

    def _plain_name(self, row: Row) -> str:
        threads = row.run.run.get("threads") if _device(row) in self._several else None
        return ", ".join([machine_name(row), *([f"{threads} threads"] if threads else [])])


def _device(row: Row) -> tuple[Any, ...]:
    return (row.run.machine["id"], machine_name(row))


def _numbered(names: Mapping[Any, str]) -> dict[Any, str]:
    """Returns the names, in which each repeated name has a number."""
    used: dict[str, int] = {}
    numbered = {}
    for key, name in names.items():
        used[name] = used.get(name, 0) + 1
        numbered[key] = name if used[name] == 1 else f"{name} ({used[name]})"
    return numbered
