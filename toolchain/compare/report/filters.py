"""The filters of the HTML report: the properties by which a reader can hide rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolchain.compare.report.machines import MachineNames
from toolchain.compare.rows import Row


@dataclass(frozen=True)
class Filter:
    """A property of rows with the values that a reader can hide.

    Attributes:
        name: Name of the property.
        values: The values, in the order of the rows.
        indices: Index of each row's value in `values`.
    """

    name: str
    values: list[str]
    indices: list[int]


def filters(rows: Sequence[Row]) -> list[Filter]:
    """Returns the filters whose property has several values.

    Args:
        rows: The rows with figures.
    """
    machines = MachineNames(rows)
    properties: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row.measurement.model,
        "machine": machines.name,
        "data": lambda row: str(row.run.data["name"]),
        "provider": lambda row: row.measurement.provider,
        "runtime": lambda row: row.measurement.variant.split("-")[0],
        "threads": lambda row: str(row.run.run.get("threads", "unknown")),
        "batch size": lambda row: str(row.run.run.get("batch_size", "unknown")),
        "figures": lambda row: "published" if row.measurement.status == "reported" else "measured",
    }
    found = []
    for name, value_of in properties.items():
        values = [value_of(row) for row in rows]
        distinct = list(dict.fromkeys(values))
        if len(distinct) > 1:
            found.append(Filter(name, distinct, [distinct.index(value) for value in values]))
    return found
