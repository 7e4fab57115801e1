"""The driver process, which talks to the Ray cluster and receives requests through `toolchain.system.serving.serve`."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.data.files import Texts
from toolchain.distributed import RESUME_HINT, parts, ray_data, remote
from toolchain.distributed.remote import Scorer, StoredFiles
from toolchain.errors import ClusterError, ToolchainError
from toolchain.predict import split_windows
from toolchain.predict.chunk_scoring import Job
from toolchain.system import hardware
from toolchain.system.serving import serve

REACH_TIMEOUT_S = 5.0
LOOK_TIMEOUT_S = 60.0
MOST_THREADS = 4  # Maximum number of threads per worker: more workers are faster than more threads per worker.


class Driver:
    """A connection to a Ray cluster; each public method answers one kind of request.

    The attribute `ready` is the driver's first answer, and lists the nodes with CPUs.
    """

    def __init__(self, message: Mapping[str, Any]) -> None:
        with _translate_errors():
            _connect(message["address"])
            nodes = [node for node in _live_nodes(message["versions"]) if node["cpus"]]
        if not nodes:
            raise ClusterError(
                "The cluster offers no CPU.", "To add a node with CPUs, run `ray start --address ADDR` on it."
            )
        self._nodes = nodes
        self._rows: Iterator[str] = iter(())
        self._records: Iterator[str] = iter(())
        self._measuring: dict[Any, str] = {}
        self.ready = {"nodes": nodes}

    def score(
        self, folder: str, files: Sequence[str], texts: Mapping[str, Any], done: int, window: int
    ) -> dict[str, Any]:
        """Starts to score texts; the method `rows` returns the predictions.

        Args:
            folder: Folder of the model.
            files: Paths of the model's files, relative to `folder`.
            texts: Source of the texts: a file and the names of its text columns, as the fields of a `Texts` object.
            done: Number of texts to skip.
            window: Largest number of texts whose predictions one call of `rows` returns; see `split_windows`.

        Returns:
            The number of ``workers`` and the ``threads`` of each worker.
        """
        workers = self._count_workers()
        with _translate_errors():
            self._rows = _score_windows(workers, store_files(Path(folder), files), Texts(**texts), done, window)
        return dict(zip(("workers", "threads"), workers, strict=True))

    def score_parts(
        self, folder: str, files: Sequence[str], job: Mapping[str, Any], rests: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Starts to score input files and to write their parts; the method `record` returns the records of the parts.

        Args:
            folder: Folder of the model.
            files: Paths of the model's files, relative to `folder`.
            job: Output and settings, as the fields of a `Job` object.
            rests: The input files, as the fields of `Rest` objects.

        Returns:
            The number of ``workers`` and the ``threads`` of each worker.
        """
        workers = self._count_workers()
        with _translate_errors():
            stored_files = store_files(Path(folder), files)
            inputs = [parts.to_rest(rest) for rest in rests]
            self._records = parts.score_parts(workers, len(self._nodes), stored_files, Job(**job), inputs)
        return dict(zip(("workers", "threads"), workers, strict=True))

    def record(self) -> dict[str, Any]:
        """Returns the ``record`` of the next finished part; None after the last one."""
        with _translate_errors():
            return {"record": json.loads(next(self._records, "null"))}

    def _count_workers(self) -> tuple[int, int]:
        """Returns the number of workers and of threads per worker; the smallest node has enough CPUs for one worker."""
        cpus = [node["cpus"] for node in self._nodes]
        threads = min(MOST_THREADS, *cpus)
        return sum(count // threads for count in cpus), threads

    def rows(self) -> dict[str, Any]:
        """Returns the predictions for the next window of texts as ``rows``, which is empty after the last window."""
        with _translate_errors():
            return {"rows": json.loads(next(self._rows, "[]"))}

    def bench(
        self, plan: Mapping[str, Any], shares: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    ) -> dict[str, Any]:
        """Starts the benchmark on every node; each node starts when all its CPUs and GPUs are free.

        Args:
            plan: The benchmark plan, from `benching.Plan.message`.
            shares: Pairs of a node's id and the cells of this node.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = {node["id"]: node for node in self._nodes}
        plan_fields = {name: value for name, value in plan.items() if name not in ("folder", "files")}
        with _translate_errors():
            files = store_files(Path(plan["folder"]), plan["files"])
            for name, cells in shares:
                # The task reserves all CPUs and GPUs of the node, so no other Ray task disturbs the measurement.
                task = ray.remote(max_retries=0, max_calls=1)(remote.measure).options(
                    num_cpus=nodes[name]["cpus"],
                    num_gpus=nodes[name]["gpus"],
                    scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False),
                )
                self._measuring[task.remote(plan_fields, cells, files)] = name
        return {}

    def next_result(self, folder: str) -> dict[str, Any]:
        """Waits until a node finishes, and writes its result file to `folder`.

        Returns:
            The id of the ``node``, and the path of the result ``file``. If the node failed, the answer holds the
            error's ``cause`` and ``hint`` instead of the ``file``.
        """
        import ray

        with _translate_errors():
            done, _ = ray.wait(list(self._measuring))
        node = self._measuring.pop(done[0])
        path = Path(folder) / f"{node}.json"
        try:
            with _translate_errors():
                ray.get(done[0]).write(path)
        except ToolchainError as error:
            return {"node": node, "cause": error.cause, "hint": error.hint}
        return {"node": node, "file": str(path)}


def store_files(folder: Path, files: Sequence[str]) -> StoredFiles:
    """Copies the files into the cluster's object store and returns their references by path."""
    import ray

    return {name: ray.put((folder / name).read_bytes()) for name in files}


def _score_windows(workers: tuple[int, int], model: StoredFiles, texts: Texts, done: int, window: int) -> Iterator[str]:
    """Yields the predictions of each window as JSON, in order, and keeps only a few windows in memory.

    A task on this machine reads the texts, so only this machine needs the file with the texts. A pool of Ray actors
    scores the texts. If an actor or the task that reads the texts dies, Ray repeats the lost work and continues with
    the remaining actors.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, read_datasource

    ray_data.prepare()
    DataContext.get_current().execution_options.preserve_order = True
    count, threads = workers
    this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    source = ray_data.source_of([lambda: _read_windows(texts, done, window)])
    dataset = read_datasource(source, override_num_blocks=1, num_cpus=0, label_selector=this_node)
    scores = dataset.map_batches(
        Scorer,
        fn_constructor_args=(model, texts, threads),
        compute=ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=threads,
    )
    yield from ray_data.values_of(scores, "rows")


def _read_windows(texts: Texts, done: int, window: int) -> Iterator[Any]:
    import pyarrow

    for window_texts in split_windows(texts, done, window):
        yield pyarrow.table({"texts": pyarrow.array([json.dumps(window_texts)], pyarrow.large_string())})


def _connect(address: str | None) -> None:
    """Connects to the cluster at `address`; if `address` is None, starts a cluster that ends with this process."""
    import ray

    log_options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        ray.init(address="local", num_cpus=hardware.cores(), include_dashboard=False, **log_options)
    else:
        _require_reachable(address)
        try:
            ray.init(address=address, **log_options)
        except (ConnectionError, ValueError, OSError) as error:
            raise _unreachable_error(address, str(error)) from error
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ClusterError(
                f"The cluster at {address} refuses this version of Ray or Python: {reason}",
                "Install the cluster's versions of Ray and Python.",
            ) from error
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _require_reachable(address: str) -> None:
    """Raises `ClusterError` if `address` accepts no connections, because Ray would retry the address for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not (host and port.isdigit()):
        raise ClusterError(
            f"{address!r} is not the address of a cluster's head.",
            "Run the command on a node of the cluster, with `auto` or the HOST:PORT that `ray start --head` printed.",
        )
    try:
        socket.create_connection((host, int(port)), REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable_error(address, str(error)) from error


def _unreachable_error(address: str, message: str) -> ClusterError:
    reason = " ".join(message.split())
    return ClusterError(
        f"There is no cluster at {address}: {reason}",
        "`ray start --head` starts a cluster and prints its address. Without --address, Ray uses only this machine.",
    )


def _live_nodes(versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns all live nodes.

    Args:
        versions: Versions of the toolchain and of Python on this machine, by name.

    Raises:
        ClusterError: A node has another version of the toolchain or of Python than this machine, or does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def describe_machine() -> dict[str, Any]:
        import platform

        try:
            from toolchain import __version__
            from toolchain.system import hardware

            release, machine = __version__, dict[str, Any](hardware.machine())
        except ImportError as error:
            release, machine = f"missing ({error})", {}
        return {"toolchain": release, "Python": platform.python_version(), "machine": machine}

    alive = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0)(describe_machine)
    references = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in alive
    ]
    nodes = []
    for node, reference in zip(alive, references, strict=True):
        host = node["NodeManagerHostname"]
        try:
            facts = ray.get(reference, timeout=LOOK_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"The node {host} does not answer.", "Repair the node, or remove it from the cluster."
            ) from error
        for name, version in versions.items():
            if facts[name] != version:
                raise ClusterError(
                    f"The node {host} has {name} {facts[name]}, but this machine has {version}.",
                    f"Install {name} {version} on the node.",
                )
        cpus, gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
        nodes.append({"id": node["NodeID"], "host": host, "cpus": cpus, "gpus": gpus, "machine": facts["machine"]})
    return nodes


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    """Re-raises a `ToolchainError` of another machine unchanged, and Ray's own errors as `ClusterError`."""
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            # A RayTaskError is also an instance of the class of the error that it wraps.
            if isinstance(cause, ToolchainError) and not isinstance(cause, RayTaskError):
                raise cause from None
            if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
                raise ClusterError(
                    "A machine of the cluster has no space left for Ray's object store.",
                    "Free disk space there, or start its node with a larger --object-store-memory. Then run the same "
                    "command again.",
                ) from error
            cause = cause.cause if isinstance(cause, RayTaskError) else cause.__cause__
        if not isinstance(error, RayError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ClusterError(f"The cluster was lost. {lines[-1]}", RESUME_HINT) from error


def main() -> None:
    """Serves requests until standard input ends or an interrupt arrives, then disconnects from the cluster."""
    with contextlib.suppress(KeyboardInterrupt):
        serve(Driver)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import ray

    ray.shutdown()


if __name__ == "__main__":
    main()
