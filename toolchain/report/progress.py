"""Progress on standard error: a bar on a terminal, a plain line a round elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callback for (done, total, what is being done now)."""
    if not sys.stderr.isatty():
        yield _plain()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shown = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(
        *shown, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as view:
        task = view.add_task(title, total=None)

        def update(done: int, total: int, what: str) -> None:
            view.update(task, completed=done, total=total, description=f"{title}: {what}")

        yield update


def _plain() -> Callable[[int, int, str], None]:
    last = [(-1, -1)]

    def update(done: int, total: int, what: str) -> None:
        if last[0] != (done, total):
            last[0] = (done, total)
            say(f"{done + 1}/{total}: {what}" if what.startswith("loading") else f"round {done + 1}/{total}")

    return update
