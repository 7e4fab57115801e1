"""Types for the reports of a long command: events (one line of text each) and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# A function that is called with (number of finished parts, number of all parts, name of the current part).
Progress = Callable[[int, int, str], None]
# A function that is called with each event. An event is a line of text, or a value whose `str` is such a line.
Say = Callable[[object], None]
Bar = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def no_bar(title: str) -> Iterator[Progress]:
    """Shows no progress."""
    yield lambda count, total, activity: None
