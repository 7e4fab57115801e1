"""Conversion of panics to exceptions. A panic is the crash of a library in Rust, such as tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PanicError(Exception):
    """A library in Rust crashed."""


@contextmanager
def convert_panics() -> Iterator[None]:
    """Converts a panic in this context to `PanicError`.

    PyO3 raises a panic as ``pyo3_runtime.PanicException``. This class is no subclass of `Exception`, and no module
    exports it. An interrupt and the end of the process are no panics and pass through.

    Raises:
        PanicError: The library crashed.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise PanicError(f"the library crashed: {error}") from error
