"""Rows by where they were measured: one panel of a plot, one part of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.compare.report.columns import host
from toolchain.compare.rows import Row

LONGEST = 40  # letters of a name in a plot


@dataclass(frozen=True)
class Panel:
    """Rows of one model on one machine, asked the same data with as many threads; `title` says which these are."""

    title: str
    rows: tuple[Row, ...]

    def label(self, row: Row) -> str:
        """The variant, and its provider where rows have several."""
        found = row.measurement
        return printable(found.cell if len({r.measurement.provider for r in self.rows}) > 1 else found.variant)


def panels(rows: Sequence[Row]) -> list[Panel]:
    """The rows in panels, in the order in which they first stand there."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        where = (row.measurement.model, row.run.machine["id"], row.run.data["sha256"], str(row.run.run.get("threads")))
        found.setdefault(where, []).append(row)
    return [Panel(_title(part), tuple(part)) for part in found.values()]


def _title(rows: Sequence[Row]) -> str:
    row = rows[0]
    gpus = [gpu["name"] for gpu in row.run.machine["gpu"]]
    on_gpu = any(row.measurement.provider == "cuda" for row in rows)
    threads = [f"{row.run.run['threads']} threads"] if "threads" in row.run.run else []
    where = ", ".join(filter(None, [host(row), *(gpus if on_gpu else []), *threads]))
    return printable(f"{row.measurement.model} on {where}; {row.run.data['name']}", 110)


def printable(text: str, longest: int = LONGEST) -> str:
    """The text as a plot can hold it: no control characters, which XML has no place for, and not too long."""
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return clean if len(clean) <= longest else f"{clean[: longest - 1]}…"
