"""Types for the reports of a long command: events (one line of text each) and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# Called with (finished units, all units, name of the current work).
Progress = Callable[[int, int, str], None]
# Called with each event. An event is a line of text, or a value whose `str` is such a line.
Say = Callable[[object], None]
Bar = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def no_bar(title: str) -> Iterator[Progress]:
    """Shows no progress."""
    yield lambda count, total, activity: None
