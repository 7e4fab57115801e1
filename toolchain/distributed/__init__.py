"""More than one machine, by Ray: this process's end of the line. `driver` is the process that talks to the cluster.

It is a process of its own because Ray's libraries end theirs where a cluster is lost, print to its standard output and
handle its signals.
"""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import toolchain
from toolchain.bench.process import Child
from toolchain.data.files import STDIN, Row, Texts
from toolchain.errors import ClusterError
from toolchain.predict import Model
from toolchain.progress import Say

CONNECT_TIMEOUT_S = 60.0
LOST_S = 15  # a cluster whose head does not answer for so long is lost
GO_ON = "Start the cluster again; of a run with --output the same command goes on where it was."


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: Ray's `id`, its `host` name, the CPUs and GPUs it gives; `machine` as `hardware` has
    it."""

    id: str
    host: str
    cpus: int
    gpus: int
    machine: dict[str, Any]


class _Driver(Child):
    end_s = 20.0  # a cluster of this machine's own is stopped in this time

    def __init__(self) -> None:
        variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": str(LOST_S)}
        super().__init__("toolchain.distributed.driver", variables)

    def _lost(self, what: str) -> ClusterError:
        return ClusterError(f"The cluster was lost. {what}", GO_ON)


class Cluster:
    """A Ray cluster that this process uses, by way of another."""

    def __init__(self, driver: Child, nodes: list[Node], say: Say) -> None:
        self._driver, self.nodes, self._say = driver, nodes, say

    def ask(self, do: str, **about: Any) -> dict[str, Any]:
        """The answer of a method of `driver.Driver`."""
        return self._driver.ask({"do": do, **about}, None)

    def scored(self, model: Model, texts: Texts, done: int, window: int) -> Iterator[list[Row]]:
        """`predicting.here`, on the cluster. Standard input is read to its end first: a window that is lost is read
        again."""
        with tempfile.TemporaryDirectory() as scratch:
            if texts.file == STDIN:
                kept = Path(scratch) / "texts"
                with kept.open("w", encoding="utf-8", newline="") as lines:
                    lines.writelines(f"{text}\n" for text in texts.read())
                texts = Texts(str(kept))
            asked = {**asdict(texts), "file": str(Path(texts.file).resolve())}
            begun = self.ask(
                "score", folder=str(model.folder), files=model.files, texts=asked, done=done, window=window
            )
            self._say(f"nodes: {len(self.nodes)}, workers: {begun['workers']}, threads of each: {begun['threads']}")
            while rows := self.ask("rows")["rows"]:
                yield rows


@contextmanager
def connected(address: str | None, say: Say) -> Iterator[Cluster]:
    """The cluster at `address` (``auto``: the one this machine is part of), or one of this machine's own that lasts as
    long as this does.

    Raises `ClusterError` where Ray is not installed, there is no such cluster, or one of its nodes has another release
    of the toolchain or another Python.
    """
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("Ray is not installed.", 'Install it with `pip install "toolchain[ray]"`.')
    driver = _Driver()
    try:
        mine = {"toolchain": toolchain.__version__, "Python": platform.python_version()}
        found = driver.ask({"address": address, "versions": mine}, CONNECT_TIMEOUT_S)
        yield Cluster(driver, [Node(**node) for node in found["nodes"]], say)
    finally:
        driver.close()
