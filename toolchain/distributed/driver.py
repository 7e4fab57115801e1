"""The process that talks to the cluster, told by JSON lines what to do; see `toolchain.bench.worker.serve`."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.bench.worker import serve
from toolchain.data.files import Texts
from toolchain.distributed import GO_ON, remote
from toolchain.distributed.remote import Scorer, Stored
from toolchain.errors import ClusterError, ToolchainError
from toolchain.predict import windows
from toolchain.system import hardware

REACH_TIMEOUT_S = 5.0
LOOK_TIMEOUT_S = 60.0
MOST_THREADS = 4  # of a worker: more of them are better used by another one


class Driver:
    """A connection to a cluster; `ready` tells of its nodes."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        with _in_words():
            _connect(message["address"])
            nodes = [node for node in _nodes(message["versions"]) if node["cpus"]]
        if not nodes:
            raise ClusterError("The cluster gives no CPU.", "Add a node that does: `ray start --address ADDR`.")
        self._nodes = nodes
        self._rows: Iterator[str] = iter(())
        self._measuring: dict[Any, str] = {}
        self.ready = {"nodes": nodes}

    def score(
        self, folder: str, files: Sequence[str], texts: Mapping[str, Any], done: int, window: int
    ) -> dict[str, Any]:
        """Begins to score so many texts at a time, after so many that are done, with the model whose `files` lie in
        `folder`."""
        workers = self._workers()
        with _in_words():
            self._rows = _rows(workers, stored(Path(folder), files), Texts(**texts), done, window)
        return dict(zip(("workers", "threads"), workers, strict=True))

    def _workers(self) -> tuple[int, int]:
        """How many, and the threads of each: every worker the same, so as many as the smallest node has CPUs for."""
        cpus = [node["cpus"] for node in self._nodes]
        threads = min(MOST_THREADS, *cpus)
        return sum(count // threads for count in cpus), threads

    def rows(self) -> dict[str, Any]:
        """The rows of the next window; none at the end."""
        with _in_words():
            return {"rows": json.loads(next(self._rows, "[]"))}

    def bench(
        self, order: Mapping[str, Any], shares: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    ) -> dict[str, Any]:
        """Begins to measure on every node its cells, as soon as all of the node is free."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = {node["id"]: node for node in self._nodes}
        about = {name: value for name, value in order.items() if name not in ("folder", "files")}
        with _in_words():
            files = stored(Path(order["folder"]), order["files"])
            for name, cells in shares:
                # The node's processors and GPUs, all of them: nothing else of Ray's runs there meanwhile.
                task = ray.remote(max_retries=0, max_calls=1)(remote.measure).options(
                    num_cpus=nodes[name]["cpus"],
                    num_gpus=nodes[name]["gpus"],
                    scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False),
                )
                self._measuring[task.remote(about, cells, files)] = name
        return {}

    def measured(self, folder: str) -> dict[str, Any]:
        """The next node that is done and the result file that is written to `folder`, or why there is none."""
        import ray

        with _in_words():
            done, _ = ray.wait(list(self._measuring))
        node = self._measuring.pop(done[0])
        path = Path(folder) / f"{node}.json"
        try:
            with _in_words():
                ray.get(done[0]).write(path)
        except ToolchainError as error:
            return {"node": node, "cause": error.cause, "mend": error.mend}
        return {"node": node, "file": str(path)}


def stored(folder: Path, files: Sequence[str]) -> Stored:
    """Puts the files into the cluster's object store."""
    import ray

    return {name: ray.put((folder / name).read_bytes()) for name in files}


def _rows(workers: tuple[int, int], model: Stored, texts: Texts, done: int, window: int) -> Iterator[str]:
    """The rows of every window as JSON, in order, a few windows held at a time.

    Read in order by a task on this machine, which alone need have the file; scored by a pool of actors. Ray does again
    what is lost with one of either, and goes on with the actors that are left.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, Datasource, read_datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    class Windows(Datasource):
        """One block of one row a window."""

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(lambda: _blocks(texts, done, window), about)]

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = 1  # byte: blocks are not joined to larger ones
    count, threads = workers
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    read = read_datasource(Windows(), override_num_blocks=1, num_cpus=0, label_selector=here)
    scores = read.map_batches(
        Scorer,
        fn_constructor_args=(model, texts, threads),
        compute=ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=threads,
    )
    for batch in scores.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch["rows"].to_pylist()


def _blocks(texts: Texts, done: int, window: int) -> Iterator[Any]:
    import pyarrow

    for taken in windows(texts, done, window):
        yield pyarrow.table({"texts": pyarrow.array([json.dumps(taken)], pyarrow.large_string())})


def _connect(address: str | None) -> None:
    """To the cluster at `address`, or one that is started for this process and ends with it."""
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        ray.init(address="local", num_cpus=hardware.cores(), include_dashboard=False, **quiet)
    else:
        _reach(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, OSError) as error:
            raise _no_cluster(address, str(error)) from error
        except RuntimeError as error:
            what = " ".join(str(error).split())
            raise ClusterError(f"The cluster at {address} is not for this one: {what}", "Use its versions.") from error
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _reach(address: str) -> None:
    """Raises `ClusterError` for an address nobody listens at, which Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not (host and port.isdigit()):
        raise ClusterError(
            f"{address!r} is no address of a cluster's head.",
            "Run the command on a node of the cluster, with `auto` or the HOST:PORT that `ray start --head` printed.",
        )
    try:
        socket.create_connection((host, int(port)), REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, why: str) -> ClusterError:
    said = " ".join(why.split())
    return ClusterError(
        f"There is no cluster at {address}: {said}",
        "`ray start --head` starts one and prints its address; without --address this machine alone is used.",
    )


def _nodes(mine: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every node that lives; `ClusterError` for one whose toolchain or Python is another than `mine`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look() -> dict[str, Any]:
        import platform

        try:
            from toolchain import __version__
            from toolchain.system import hardware

            release, machine = __version__, hardware.machine()
        except ImportError as error:
            release, machine = f"missing ({error})", {}
        return {"toolchain": release, "Python": platform.python_version(), "machine": machine}

    alive = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0)(look)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in alive
    ]
    found = []
    for node, reference in zip(alive, asked, strict=True):
        host = node["NodeManagerHostname"]
        try:
            its = ray.get(reference, timeout=LOOK_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"The node {host} does not answer.", "Mend it, or take it out of the cluster."
            ) from error
        for name, version in mine.items():
            if its[name] != version:
                raise ClusterError(
                    f"On the node {host} {name} is {its[name]}, here it is {version}.", "Install the same there."
                )
        cpus, gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
        found.append({"id": node["NodeID"], "host": host, "cpus": cpus, "gpus": gpus, "machine": its["machine"]})
    return found


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """What was raised on another machine as what it is, and what Ray raises as a `ClusterError`."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            # Ray's own error poses as the one it carries.
            if isinstance(cause, ToolchainError) and not isinstance(cause, RayTaskError):
                raise cause from None
            cause = cause.cause if isinstance(cause, RayTaskError) else cause.__cause__
        if not isinstance(error, RayError):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ClusterError(f"The cluster was lost. {said[-1]}", GO_ON) from error


def main() -> None:
    """Serves until nothing more is asked or it is interrupted, then leaves the cluster."""
    with contextlib.suppress(KeyboardInterrupt):
        serve(Driver)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import ray

    ray.shutdown()


if __name__ == "__main__":
    main()
