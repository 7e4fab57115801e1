"""Rows grouped by model, machine, data and threads; each group is one panel of a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.compare.report.columns import host_name
from toolchain.compare.rows import Row
from toolchain.results.providers import is_on_gpu

LONGEST = 40  # maximum number of characters of a name in a plot


@dataclass(frozen=True)
class Panel:
    """The rows of one model, machine, data set and number of threads.

    Attributes:
        title: Heading that names model, hardware, threads and data.
        rows: The rows.
    """

    title: str
    rows: tuple[Row, ...]

    def label(self, row: Row) -> str:
        """Returns the name of the row's variant, or of its cell if the panel has several providers."""
        measurement = row.measurement
        return printable(
            measurement.cell if len({r.measurement.provider for r in self.rows}) > 1 else measurement.variant
        )


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Returns the rows grouped in panels, in the order of each panel's first row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.measurement.model, row.run.machine["id"], row.run.data["sha256"], str(row.run.run.get("threads")))
        groups.setdefault(key, []).append(row)
    return [Panel(_title(part), tuple(part)) for part in groups.values()]


def _title(rows: Sequence[Row]) -> str:
    row = rows[0]
    gpus = [gpu["name"] for gpu in row.run.machine["gpu"]]
    on_gpu = any(is_on_gpu(row.measurement.provider) for row in rows)
    threads = [f"{row.run.run['threads']} threads"] if "threads" in row.run.run else []
    hardware = ", ".join(filter(None, [host_name(row), *(gpus if on_gpu else []), *threads]))
    return printable(f"{row.measurement.model} on {hardware}; {row.run.data['name']}", 110)


def printable(text: str, longest: int = LONGEST) -> str:
    """Replaces unprintable characters, because XML forbids many of them, and cuts the text to a maximum length.

    Args:
        text: The text.
        longest: Maximum number of characters; a text that is cut ends with an ellipsis.
    """
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return clean if len(clean) <= longest else f"{clean[: longest - 1]}…"
