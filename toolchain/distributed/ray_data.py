"""What all predictions with Ray Data share: its settings, a source of blocks, and the values that come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset, Datasource

Reader = Callable[[], "Iterator[pyarrow.Table]"]


def prepare() -> None:
    """Sets the options of Ray Data in this process."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = 1  # A block size limit of one byte keeps Ray from merging blocks.


def source_of(readers: Sequence[Reader]) -> Datasource:
    """Returns a data source with one read task for each reader; each table that a reader yields is one block."""
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    class Source(Datasource):
        """A Ray data source that does not know its size."""

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(reader, metadata) for reader in readers]

    return Source()


def values_of(dataset: Dataset, column: str) -> Iterator[Any]:
    """Runs the tasks of the data set, and yields the values of a column as soon as Ray has them."""
    batch: Any
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch[column].to_pylist()
