"""Progress on standard error: a bar on a terminal, and occasional plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from toolchain.cli.output import echo
from toolchain.system.escaping import escape_line

if TYPE_CHECKING:
    from rich.progress import TaskID


def say(event: object) -> None:
    """Prints a progress event, or any text, as one line on standard error."""
    echo(escape_line(str(event)), err=True)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields a callback that shows the number of finished parts, the total number of parts, and the current activity.

    Nothing is shown before the first call of the callback.
    """
    if not sys.stderr.isatty():
        yield _print_tenths(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as view:
        tasks: dict[int, TaskID] = {}

        def update(count: int, total: int, activity: str) -> None:
            # If the total number of parts changes, another kind of work has begun. A new task in the bar makes `rich`
            # estimate the remaining time without the speed of the earlier work.
            if total not in tasks:
                for task in tasks.values():
                    view.remove_task(task)
                tasks.clear()
                tasks[total] = view.add_task(title, total=total)
            view.update(tasks[total], completed=count, description=escape_line(f"{title}: {activity}"))

        yield update


def _print_tenths(title: str) -> Callable[[int, int, str], None]:
    """Returns a callback that prints a line for each new tenth of the work, and at most one line per second."""
    last_line = {"tenth": -1, "total": -1, "time": float("-inf")}

    def update(count: int, total: int, activity: str) -> None:
        tenth = 10 * count // max(total, 1)
        if (tenth, total) == (last_line["tenth"], last_line["total"]) or time.monotonic() - last_line["time"] < 1:
            return
        last_line.update(tenth=tenth, total=total, time=time.monotonic())
        say(f"{title}: {count}/{total}, {activity}")

    return update
