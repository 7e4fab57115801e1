"""Progress on standard error: a bar on a terminal, and occasional plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID


def say(event: object) -> None:
    """Prints an event as one line."""
    print(event, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields a callback that shows the units done, the units in all, and the current work.

    It shows nothing before its first call.
    """
    if not sys.stderr.isatty():
        yield _plain(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shown = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(
        *shown, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as view:
        tasks: dict[int, TaskID] = {}

        def update(done: int, total: int, what: str) -> None:
            # Another total means another kind of work. A new task estimates its remaining time from the start.
            if total not in tasks:
                for old in tasks.values():
                    view.remove_task(old)
                tasks.clear()
                tasks[total] = view.add_task(title, total=total)
            view.update(tasks[total], completed=done, description=f"{title}: {what}")

        yield update


def _plain(title: str) -> Callable[[int, int, str], None]:
    """Returns a callback that prints a line for each new tenth of the work, and at most one line per second."""
    last = {"tenth": -1, "total": -1, "said": float("-inf")}

    def update(done: int, total: int, what: str) -> None:
        tenth = 10 * done // max(total, 1)
        if (tenth, total) == (last["tenth"], last["total"]) or time.monotonic() - last["said"] < 1:
            return
        last.update(tenth=tenth, total=total, said=time.monotonic())
        say(f"{title}: {done}/{total}, {what}")

    return update
