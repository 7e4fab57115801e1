"""A context manager that hides log messages of libraries about conditions that the toolchain checks itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hide_logs() -> Iterator[None]:
    """Disables log messages up to level WARNING inside the `with` block."""
    old_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(old_level)
