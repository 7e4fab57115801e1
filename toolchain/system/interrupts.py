"""Recognises the user's interrupt (Ctrl-C) where a C library replaces `KeyboardInterrupt` by its own error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def record_interrupts() -> Iterator[list[int]]:
    """Yields a list to which each interrupt adds its signal number.

    During an import or a callback, C libraries convert KeyboardInterrupt to errors of other classes. If the list of
    signal numbers is not empty, an unexpected error comes from the user's interrupt and is not a bug.
    """
    signal_numbers: list[int] = []

    def record_interrupt(number: int, frame: FrameType | None) -> None:
        signal_numbers.append(number)
        signal.default_int_handler(number, frame)

    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        # Only the main thread receives interrupts. Or the process ignores interrupts, or another handler already
        # handles them. This function does not change that behaviour, so the list of signal numbers stays empty.
        yield signal_numbers
        return
    signal.signal(signal.SIGINT, record_interrupt)
    try:
        yield signal_numbers
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
