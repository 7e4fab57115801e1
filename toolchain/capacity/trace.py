"""Times of arrival from a file, which another program may have written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from toolchain.data.columnar import Header
from toolchain.data.tables import FORMATS, RowLines, Table, convert_read_errors, has_columns, open_text
from toolchain.errors import DataError

if TYPE_CHECKING:
    import numpy as np

FEWEST_ARRIVALS = 200  # with fewer arrivals, less than two queries are above the p99
MOST_ARRIVALS = 1_000_000
MOST_S = 1e11  # about 3000 years; a larger time has no room for microseconds
NAMES = ("arrival", "arrival_s", "time", "timestamp")  # columns that need no --trace-column


def read_trace(file: str, column: str | None = None) -> np.ndarray:
    """Returns the arrivals of a file in seconds after the first arrival.

    Args:
        file: Path of a file with one time in seconds per line, or of a file with columns.
        column: Name of the column; None for the only column, or for one of `NAMES`.

    Raises:
        DataError: The file cannot be read, has too few or too many arrivals, or has a time that is not a number or is
            earlier than the time before it.
    """
    import numpy as np

    times = list(_checked(file, _columns(file, column) if has_columns(file) else _lines(file, column)))
    if len(times) < FEWEST_ARRIVALS:
        raise DataError(
            f"{file} has {len(times)} arrivals, but the p99 of a trace needs at least {FEWEST_ARRIVALS}.",
            "Record a longer time, or use --qps without --trace.",
        )
    if times[0] == times[-1]:
        raise DataError(f"All arrivals in {file} have the same time.", "Record the times in seconds with fractions.")
    return np.array(times) - times[0]


def _checked(file: str, values: Iterator[Any]) -> Iterator[float]:
    """Yields the values as times; raises `DataError` for the first value that is not a time or goes back in time."""
    last = 0.0
    for number, value in enumerate(values, start=1):
        if number > MOST_ARRIVALS:
            raise DataError(
                f"{file} has more than {MOST_ARRIVALS:,} arrivals.", "Cut out the busiest time, such as one hour."
            )
        time = _number(value)
        if time is None or not 0 <= time <= MOST_S:
            raise DataError(
                f"{file}, arrival {number}: {str(value)[:80]!r} is not a time in seconds.",
                f"A time is a number from 0 to {MOST_S:g}, such as 12.25.",
            )
        if time < last:
            raise DataError(
                f"{file}, arrival {number}: {time:.15g} is earlier than the arrival before it.",
                "Sort the arrivals by time.",
            )
        last = time
        yield time


def _number(value: Any) -> float | None:
    """Returns a value of a file as a finite number; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _lines(file: str, column: str | None) -> Iterator[str]:
    if column is not None:
        raise DataError(
            f"{file} has plain lines, and so no column {column!r}.",
            f"Leave out --trace-column, or pass a file with columns ({', '.join(FORMATS)}).",
        )
    with convert_read_errors(file), open_text(file, "utf-8-sig", "\n") as stream:
        lines = RowLines(stream, file)
        for line in lines:
            lines.begin_row()
            if line.strip():
                yield line.strip()


def _columns(file: str, column: str | None) -> Iterator[Any]:
    def choose(header: Header) -> list[str]:
        names = [column] if column else list(header) if len(header) == 1 else NAMES
        chosen = [name for name in names if name in header]
        if len(chosen) != 1:
            shown = ", ".join(list(header)[:20])
            cause = f"{file} has no column {column!r}" if column else f"The column of the arrivals in {file} is unclear"
            raise DataError(f"{cause}.", f"Pass one of its columns as --trace-column: {shown}.")
        return chosen

    for (value,) in Table(file).read(choose):
        yield value
