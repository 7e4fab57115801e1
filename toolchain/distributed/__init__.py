"""Runs work on a cluster of machines with Ray. This module starts a child process, `driver`, that talks to the cluster.

Ray runs in a child process, because Ray's libraries print to standard output, handle signals, and end their process if
the cluster is lost.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import toolchain
from toolchain.data.files import STDIN, Texts
from toolchain.data.writing import Row
from toolchain.errors import ClusterError
from toolchain.predict import Model
from toolchain.predict.chunk_scoring import Job, Rest
from toolchain.predict.output_folder import PartRecord
from toolchain.progress import Say
from toolchain.system.child import Child
from toolchain.system.extras import install_hint
from toolchain.system.files import temporary_folder
from toolchain.system.hardware import Machine

CONNECT_TIMEOUT_S = 60.0
LOST_AFTER_S = 15  # The cluster is lost if its head does not answer for this number of seconds.
RESUME_HINT = "Start the cluster again, and repeat the command. With --output, the command continues where it stopped."


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's id of the node.
        host: Host name.
        cpus: Number of CPUs that the node offers to Ray.
        gpus: Number of GPUs that the node offers to Ray.
        machine: Description of the hardware; see `hardware.machine`.
    """

    id: str
    host: str
    cpus: int
    gpus: int
    machine: Machine


class _Driver(Child):
    end_s = 20.0  # The driver may need this number of seconds to stop a cluster that it started.

    def __init__(self) -> None:
        variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": str(LOST_AFTER_S)}
        super().__init__("toolchain.distributed.driver", variables)

    def _make_error(self, cause: str) -> ClusterError:
        return ClusterError(f"The cluster was lost. {cause}", RESUME_HINT)


class Cluster:
    """A connection to a Ray cluster through the driver process."""

    def __init__(self, driver: Child, nodes: list[Node], say: Say) -> None:
        self._driver, self.nodes, self._say = driver, nodes, say

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Calls a method of `driver.Driver` and returns its answer.

        Args:
            method: Name of a method of `driver.Driver`.
            **arguments: Arguments for the called method of `driver.Driver`.
        """
        return self._driver.ask({"do": method, **arguments}, None)

    def score(self, model: Model, texts: Texts, done: int, window: int) -> Iterator[list[Row]]:
        """Scores texts on the cluster; yields the predictions of each window; implements `predict.Engine`.

        The method first copies texts from standard input to a file, because Ray reads texts again if their predictions
        are lost.
        """
        with temporary_folder() as scratch:
            if texts.file == STDIN:
                text_file = scratch / "texts"
                with text_file.open("w", encoding="utf-8", newline="") as lines:
                    lines.writelines(f"{text}\n" for text in texts.read())
                texts = Texts(str(text_file))
            text_fields = {**asdict(texts), "file": str(Path(texts.file).resolve())}
            reply = self.ask(
                "score", folder=str(model.folder), files=model.files, texts=text_fields, done=done, window=window
            )
            self._say(f"nodes: {len(self.nodes)}, workers: {reply['workers']}, threads per worker: {reply['threads']}")
            while rows := self.ask("rows")["rows"]:
                yield rows

    def score_parts(self, model: Model, job: Job, rests: Sequence[Rest]) -> Iterator[PartRecord]:
        """Scores input files on the cluster, and yields the record of each part; implements `parts.PartsEngine`."""
        reply = self.ask(
            "score_parts",
            folder=str(model.folder),
            files=model.files,
            job=asdict(job),
            rests=[asdict(rest) for rest in rests],
        )
        self._say(f"nodes: {len(self.nodes)}, workers: {reply['workers']}, threads per worker: {reply['threads']}")
        while record := self.ask("record")["record"]:
            yield PartRecord(**record)


@contextmanager
def connect(address: str | None, say: Say) -> Iterator[Cluster]:
    """Yields a connection to a cluster, and closes it on exit.

    Args:
        address: ``HOST:PORT`` of the cluster's head, or ``auto`` for the cluster of this machine. If `address` is None,
            the function starts a cluster on this machine and stops it on exit.

    Raises:
        ClusterError: Ray is not installed, the cluster does not answer or offers no CPU, or a node has another version
            of Python or the toolchain.
    """
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("Ray is not installed.", install_hint("ray"))
    driver = _Driver()
    try:
        versions = {"toolchain": toolchain.__version__, "Python": platform.python_version()}
        reply = driver.ask({"address": address, "versions": versions}, CONNECT_TIMEOUT_S)
        yield Cluster(driver, [Node(**node) for node in reply["nodes"]], say)
    finally:
        driver.close()
