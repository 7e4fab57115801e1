"""The code that runs on the nodes of a cluster. It needs no file system shared with the driver."""

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
from toolchain.results.folder import ResultsFolder
from toolchain.results.measurements import ResultFile
from toolchain.system import hardware

if TYPE_CHECKING:
    import pyarrow

# The files of a folder in the object store: path in the folder → reference to the file's bytes.
Stored = Mapping[str, Any]


def unpack(stored: Stored, folder: Path) -> None:
    """Writes the files from the object store into a folder on this machine."""
    import ray

    for name, reference in stored.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content: Any = ray.get(reference)
        path.write_bytes(content)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yields a temporary folder and deletes it on exit; first deletes the folders that killed processes left."""
    import psutil

    ours = f"{publishing.WORK}-{_process_space()}"
    for left in Path(tempfile.gettempdir()).iterdir():
        found = re.fullmatch(rf"{ours}-([0-9]+)-\w+", left.name)
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)  # the system refuses to delete another user's folder
    with tempfile.TemporaryDirectory(prefix=f"{ours}-{os.getpid()}-") as folder:
        yield Path(folder)


def _process_space() -> str:
    """Returns an id of this machine and container: process ids are unique only inside one, but a disk may be shared."""
    namespace = Path("/proc/self/ns/pid")
    number = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{platform.node()} {number}".encode()).hexdigest()[:8]


@dataclass
class Scorer:
    """An actor that loads the model once and scores windows of texts.

    On the first call, it writes the model's files to this machine, checks their digests, loads the model and deletes
    the files.

    Attributes:
        stored: The model's files in the object store.
        texts: Source of the texts, for the column names.
        threads: Number of threads.
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
        """Returns the rows of each window.

        Windows and rows are JSON, because JSON can represent every text.

        Args:
            windows: Table with the column ``texts``: one window in each row.

        Returns:
            Table with the column ``rows``, one row for each window.
        """
        import pyarrow

        model, opened = self._loaded
        rows = [json.dumps(scored(opened, model, self.texts, json.loads(w.as_py()))) for w in windows["texts"]]
        return pyarrow.table({"rows": pyarrow.array(rows, pyarrow.large_string())})


def measure(order: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], files: Stored) -> ResultFile:
    """Runs the benchmark on this machine, with artifacts in a temporary folder.

    Args:
        order: The plan, from `benching.Plan.message`, without ``folder`` and ``files``.
        cells: The cells of this node.
        files: Files of the artifacts in the object store.

    Returns:
        The result file.

    Raises:
        TamperedError: The files of an artifact do not match their digests.
        ToolchainError: The measurement fails.
    """
    with scratch() as folder:
        workspace = Workspace(folder / "exported", order["model"], Source(**order["source"]))
        unpack(files, workspace.path(""))
        here = [_cell(workspace, cell) for cell in cells]
        protocol = Protocol(**{**order["protocol"], "threads": order["threads"] or hardware.cores()})
        request = run.Request((), (), protocol, results=ResultsFolder(folder / "results"))
        result, _ = run.measured(workspace, request, here, _data(order["data"]), lambda line: None, lambda *_: None)
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
