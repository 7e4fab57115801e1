"""How a long command reports: a line of text, or a bar that moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# (units done, units in all, the work under way)
Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]
Bar = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def no_bar(title: str) -> Iterator[Progress]:
    """Shows no progress."""
    yield lambda done, total, what: None
