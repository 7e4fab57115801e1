"""The code that runs on the nodes of a cluster. The nodes need no file system shared with the driver."""

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
from toolchain.models.locations import Source
from toolchain.predict import LoadedModel, Model, load_folder_model, load_model, score_window
from toolchain.results.folder import ResultsFolder
from toolchain.results.result_file import ResultFile
from toolchain.system import hardware
from toolchain.system.files import temporary_folder

if TYPE_CHECKING:
    import pyarrow

# Files of a folder in Ray's object store: maps each path in the folder to a reference to the file's bytes.
StoredFiles = Mapping[str, Any]


def unpack(files: StoredFiles, folder: Path) -> None:
    """Writes the files from the object store into a folder on this machine."""
    import ray

    for name, reference in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content: Any = ray.get(reference)
        path.write_bytes(content)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Deletes the temporary folders of killed processes, yields a new temporary folder, and deletes it on exit."""
    import psutil

    prefix = f"{publishing.WORK}-{_process_space()}"
    for path in Path(tempfile.gettempdir()).iterdir():
        match = re.fullmatch(rf"{prefix}-([0-9]+)-\w+", path.name)
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)  # the system refuses to delete another user's folder
    with temporary_folder(f"{prefix}-{os.getpid()}-") as folder:
        yield folder


def _process_space() -> str:
    """Returns an id of this machine and container: two containers may share a disk and have equal process ids."""
    namespace = Path("/proc/self/ns/pid")
    number = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{platform.node()} {number}".encode()).hexdigest()[:8]


def load_stored_model(files: StoredFiles, threads: int) -> tuple[Model, LoadedModel]:
    """Loads a model from the object store with `threads` threads.

    The function writes the model's files to this machine, checks their digests, loads the model and deletes the files.
    """
    os.environ.update(process.environment(threads))
    with scratch() as folder:
        unpack(files, folder)
        model = load_folder_model(folder, lambda line: None)
        return model, load_model(model, threads)


@dataclass
class Scorer:
    """An actor that loads the model on its first call and scores windows, which are lists of consecutive texts.

    Attributes:
        files: The model's files in the object store.
        texts: Source of the texts. The actor needs `texts` only to choose the column names of the predictions. These
            column names depend on whether each row is one text or a pair of texts.
        threads: Number of threads.
    """

    files: StoredFiles
    texts: Texts
    threads: int

    @functools.cached_property
    def _loaded_model(self) -> tuple[Model, LoadedModel]:
        return load_stored_model(self.files, self.threads)

    def __call__(self, windows: pyarrow.Table) -> pyarrow.Table:
        """Scores windows, which are lists of consecutive texts, and returns the predictions for these texts.

        The columns ``texts`` and ``rows`` hold JSON strings, because JSON can represent every text.

        Args:
            windows: Table with the column ``texts``: each row holds one window, a list of consecutive texts.

        Returns:
            Table with the column ``rows``: each row holds the predictions for one row of `windows`.
        """
        import pyarrow

        model, opened = self._loaded_model
        rows = [
            json.dumps(score_window(opened, model, self.texts, json.loads(window.as_py())))
            for window in windows["texts"]
        ]
        return pyarrow.table({"rows": pyarrow.array(rows, pyarrow.large_string())})


def measure(plan: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], files: StoredFiles) -> ResultFile:
    """Runs the benchmark on this machine, with artifacts in a temporary folder.

    Args:
        plan: The benchmark plan, from `benching.Plan.message`, without ``folder`` and ``files``.
        cells: The cells of this node.
        files: Files of the artifacts in the object store.

    Returns:
        The result file.

    Raises:
        TamperedError: The files of an artifact do not match their digests.
        ToolchainError: The measurement fails.
    """
    with scratch() as folder:
        workspace = Workspace(folder / "exported", plan["model"], Source(**plan["source"]))
        unpack(files, workspace.path(""))
        local_cells = [_load_cell(workspace, cell) for cell in cells]
        protocol = Protocol(**{**plan["protocol"], "threads": plan["threads"] or hardware.cores()})
        request = run.Request((), (), protocol, results=ResultsFolder(folder / "results"))
        result, _ = run.measure_cells(
            workspace, request, local_cells, _to_data(plan["data"]), lambda line: None, lambda *_: None
        )
        return result


def _load_cell(workspace: Workspace, fields: Mapping[str, Any]) -> Cell:
    if not fields["artifact"]:
        return Cell(**{**fields, "artifact": None})
    artifact = workspace.load(fields["variant"])
    assert artifact is not None
    artifact.verify()
    return Cell(**{**fields, "artifact": artifact})


def _to_data(fields: Mapping[str, Any]) -> Data:
    texts = tuple(text if isinstance(text, str) else (text[0], text[1]) for text in fields["texts"])
    labels = LabelSet(tuple(fields["label_set"]["names"]), fields["label_set"]["task"])
    answers = (
        tuple(answer) if isinstance(answer, list) else answer for answer in fields["labels"]
    )  # JSON has no tuples
    return Data(fields["name"], texts, tuple(answers), labels)
