"""What runs on the machines of a cluster. Nothing here needs a file system that they share with the driver."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts import publishing
from toolchain.bench import process, run
from toolchain.bench.cells import Cell
from toolchain.bench.scenarios import Protocol
from toolchain.build.workspace import Workspace
from toolchain.data.files import Texts
from toolchain.data.inputs import Data
from toolchain.data.labels import LabelSet
from toolchain.models.checkpoints import Source
from toolchain.predict import Model, Opened, lying_in, scored
from toolchain.results.measurements import ResultFile
from toolchain.system import hardware

if TYPE_CHECKING:
    import pyarrow

# A folder's files in the object store: path within it → reference to its bytes.
Stored = Mapping[str, Any]


def unpack(stored: Stored, folder: Path) -> None:
    """Writes the files into a folder of this machine."""
    import ray

    for name, reference in stored.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content: Any = ray.get(reference)
        path.write_bytes(content)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder on this machine that goes with its use; those of processes that were killed go first."""
    import psutil

    ours = f"{publishing.WORK}-{_process_space()}"
    for left in Path(tempfile.gettempdir()).iterdir():
        found = re.fullmatch(rf"{ours}-([0-9]+)-\w+", left.name)
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)  # another user's cannot be deleted
    with tempfile.TemporaryDirectory(prefix=f"{ours}-{os.getpid()}-") as folder:
        yield Path(folder)


def _process_space() -> str:
    """Where a process id means one process: machines and containers that share a disk each count their own."""
    namespace = Path("/proc/self/ns/pid")
    number = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{platform.node()} {number}".encode()).hexdigest()[:8]


@dataclass
class Scorer:
    """An actor that loads the model once, with so many `threads`, and scores windows of the `texts`.

    The model's files lie on this machine only while it is loaded, and are checked by their digests before.
    """

    stored: Stored
    texts: Texts
    threads: int

    @functools.cached_property
    def _loaded(self) -> tuple[Model, Opened]:
        os.environ.update(process.environment(self.threads))
        with scratch() as folder:
            unpack(self.stored, folder)
            model = lying_in(folder, lambda line: None)
            return model, Opened(model, self.threads)

    def __call__(self, windows: pyarrow.Table) -> pyarrow.Table:
        """One row a window, texts in, rows out, as JSON: any text has a place in it."""
        import pyarrow

        model, opened = self._loaded
        rows = [json.dumps(scored(opened, model, self.texts, json.loads(w.as_py()))) for w in windows["texts"]]
        return pyarrow.table({"rows": pyarrow.array(rows, pyarrow.large_string())})


def measure(order: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], files: Stored) -> ResultFile:
    """One benchmark run on this machine, of what `benching.Plan.message` says; its artifacts lie here until it ends and
    are checked by their digests before.

    Raises `TamperedError` where one is not what it was, and what the measurement raises.
    """
    with scratch() as folder, contextlib.chdir(folder):
        workspace = Workspace(Path("exported"), order["model"], Source(**order["source"]))
        unpack(files, workspace.path(""))
        here = [_cell(workspace, cell) for cell in cells]
        protocol = Protocol(**{**order["protocol"], "threads": order["threads"] or hardware.cores()})
        result, _ = run.measured(
            workspace, run.Request((), (), protocol), here, _data(order["data"]), lambda line: None, lambda *_: None
        )
        return result


def _cell(workspace: Workspace, told: Mapping[str, Any]) -> Cell:
    if not told["artifact"]:
        return Cell(**{**told, "artifact": None})
    artifact = workspace.load(told["variant"])
    assert artifact is not None
    artifact.verify()
    return Cell(**{**told, "artifact": artifact})


def _data(told: Mapping[str, Any]) -> Data:
    texts = tuple(text if isinstance(text, str) else (text[0], text[1]) for text in told["texts"])
    labels = LabelSet(tuple(told["label_set"]["names"]), told["label_set"]["multi"])
    return Data(told["name"], texts, tuple(told["labels"]), labels)
