"""The base class of the sessions of other tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class EngineSession:
    """A `Session` that runs on the CPU, so that inputs and logits are always in the device's memory.

    A subclass sets `_facts` and defines `run`.
    """

    _facts: dict[str, Any]

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        raise NotImplementedError

    def resident(self, batch: dict[str, Any]) -> Callable[[], object]:
        """See `Session.resident`."""
        return lambda: self.run(batch)

    def facts(self) -> dict[str, Any]:
        """Returns the session's provider, number of threads and precision."""
        return self._facts

    def close(self) -> None:
        """See `Session.close`."""
        vars(self).clear()
