"""Progress of a call: a bar in a notebook or on a terminal, and lines on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from toolchain.interface.calls import to_python_words
from toolchain.progress import Progress
from toolchain.system.escaping import escape_line


def ignore_event(event: object) -> None:
    """Shows no event."""


def print_event(event: object) -> None:
    """Prints an event as one line on standard error, above the bars."""
    from tqdm.auto import tqdm

    tqdm.write(to_python_words(escape_line(str(event))), file=sys.stderr)


@contextmanager
def show_bar(title: str) -> Iterator[Progress]:
    """Yields a callback that shows a bar: of widgets in a notebook, of text on a terminal, and none elsewhere.

    The bar disappears at the end, also after an error or an interrupt.
    """
    from tqdm.auto import tqdm

    bars: dict[int, Any] = {}

    def update(count: int, total: int, activity: str) -> None:
        # If the total number of parts changes, another kind of work has begun, which has its own bar.
        text = escape_line(f"{title}: {activity}")
        if total not in bars:
            close()
            bars[total] = tqdm(desc=text, total=total, leave=False, disable=False if _in_notebook() else None)
        bars[total].set_description(text, refresh=False)
        bars[total].update(count - bars[total].n)

    def close() -> None:
        for each in bars.values():
            each.close()
        bars.clear()

    try:
        yield update
    finally:
        close()


def _in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython else None
    return shell is not None and "IPKernelApp" in shell.config
