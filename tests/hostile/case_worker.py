"""The child process that runs the cases of `fuzz`: if a library crashes or never ends, only one case is lost."""

import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hostile.harness import run_case
from hostile.kinds import KINDS

from toolchain.system.serving import serve

# A foreign model can state sizes for which the machine has no memory; the attack must not end other processes.
MEMORY_BYTES = 24 << 30


class Worker:
    """Answers the messages of `fuzz`.

    Args:
        scratch: Folder with one folder for each kind: its folder ``valid`` has the valid files.
    """

    ready: Mapping[str, Any] = {}

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._kinds = {kind.name: kind for kind in KINDS}

    def prepare(self, kind: str) -> dict[str, Any]:
        """Writes the valid files of a kind."""
        folder = self._scratch / kind / "valid"
        folder.mkdir(parents=True)
        self._kinds[kind].prepare(folder)
        return {}

    def run(self, kind: str, seed: str, parts: Sequence[int] | None) -> dict[str, Any]:
        """Runs one case and returns its ``outcome``; see `run_case`."""
        folder = self._scratch / kind
        return {"outcome": run_case(self._kinds[kind], folder / "valid", folder / "case", seed, parts)}


def start(first: Mapping[str, Any]) -> Worker:
    """Limits the memory of this process, and returns the object that answers the messages."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    return Worker(Path(first["scratch"]))


if __name__ == "__main__":
    serve(start)
