"""Scores input files into parts with Ray Data: tasks read chunks, and a pool of actors scores and writes them.

Neither a text nor an answer passes through the driver. It receives only the record of each part.
"""

from __future__ import annotations

import functools
import json
import pickle
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from toolchain.data.chunks import Columns, open_reader
from toolchain.data.sources import InputFile
from toolchain.distributed import ray_data
from toolchain.distributed.remote import StoredFiles, load_stored_model
from toolchain.errors import ClusterError
from toolchain.predict.chunk_scoring import ChunkScorer, Job, Rest, read_rest
from toolchain.predict.output_folder import RUN, OutputFolder

if TYPE_CHECKING:
    import pyarrow

READ_TASKS = 2  # largest number of tasks for each node that read input files at the same time
# Largest number of times that Ray starts an actor again, or reads a file again, after a process died. The attempts for
# a chunk are not limited: when a node is lost, all calls of its actors fail at once, and would soon use up a limit.
RESTARTS = 10


def to_rest(fields: Mapping[str, Any]) -> Rest:
    """Returns a `Rest` from its fields as JSON represents them."""
    return Rest(**{**fields, "file": InputFile(**fields["file"])})


@dataclass
class PartWriter:
    """An actor that loads the model once, scores chunks and writes their parts.

    Attributes:
        files: The model's files in the object store.
        job: Output and settings.
        threads: Number of threads.
    """

    files: StoredFiles
    job: Job
    threads: int

    @functools.cached_property
    def _scorer(self) -> ChunkScorer:
        _require_output(self.job)
        return ChunkScorer(*load_stored_model(self.files, self.threads), self.job)

    def __call__(self, chunks: pyarrow.Table) -> pyarrow.Table:
        """Scores and writes chunks; returns the records of their parts as JSON in the column ``record``.

        Args:
            chunks: Table with the column ``chunk``: each row holds one pickled `PlacedChunk`, which a read task of this
                cluster wrote.
        """
        import pyarrow

        records = [
            json.dumps(asdict(self._scorer.score(pickle.loads(chunk.as_py()), self.job.most_errors)))
            for chunk in chunks["chunk"]
        ]
        return pyarrow.table({"record": pyarrow.array(records, pyarrow.string())})


def _require_output(job: Job) -> None:
    """Raises `ClusterError` if the machine does not see the output folder of the job."""
    folder = OutputFolder(job.output)
    if folder.local and not (folder.local / RUN).is_file():
        raise ClusterError(
            f"The node {platform.node()} does not see the output folder {job.output}.",
            "Choose a folder on a disk that all nodes share, or a URL such as s3://BUCKET/FOLDER/.",
        )


def _read_chunks(rest: Rest, job: Job) -> Iterator[pyarrow.Table]:
    import pyarrow

    with open_reader() as reader:
        for chunk in read_rest(reader, rest, job, job.columns, 0):
            yield pyarrow.table({"chunk": pyarrow.array([pickle.dumps(chunk)], pyarrow.large_binary())})


def _first_columns(file: InputFile, job: Job) -> Columns:
    """Returns the columns of the first input file."""
    with open_reader() as reader:
        reader.open(file, None, file.name, job.column, job.pair)
        return reader.columns


def score_parts(
    workers: tuple[int, int], nodes: int, model: StoredFiles, job: Job, rests: Sequence[Rest]
) -> Iterator[str]:
    """Scores input files and writes their parts; yields the record of each part as JSON.

    Tasks on this machine read local files, because other machines may not have these files. Tasks on any machine read
    files behind URLs. If an actor or a task dies, Ray repeats its work; a repeated part has the same content.

    Args:
        workers: Number of actors, and threads of each actor.
        nodes: Number of nodes.
        model: The model's files in the object store.
        job: Output and settings.
        rests: The input files.
    """
    import ray
    from ray.data import ActorPoolStrategy, read_datasource

    is_local = any(rest.file.url is None for rest in rests)
    this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()} if is_local else None
    if job.columns is None:
        task = ray.remote(_first_columns).options(num_cpus=0, label_selector=this_node, max_retries=RESTARTS)
        job = replace(job, columns=ray.get(task.remote(rests[0].file, job)))
    count, threads = workers
    ray_data.prepare()
    dataset = read_datasource(
        ray_data.source_of([functools.partial(_read_chunks, rest, job) for rest in rests]),
        override_num_blocks=len(rests),
        num_cpus=0,
        concurrency=READ_TASKS * (1 if is_local else nodes),
        label_selector=this_node,
        ray_remote_args={"max_retries": RESTARTS},
    )
    records = dataset.map_batches(
        PartWriter,
        fn_constructor_args=(model, job, threads),
        compute=ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=threads,
        max_restarts=RESTARTS,
    )
    yield from ray_data.values_of(records, "record")
