"""The parent's handle of a child process that opens the graphs and the tokenizer of a bundle from elsewhere.

A graph of a few bytes can run for ever or fill the memory, and so can a tokenizer. The limits on the child process stop
both. `toolchain.ship.worker` runs in the child process.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data.files import Text
from toolchain.data.labels import Tokens
from toolchain.errors import ShippingError, ToolchainError, VerdictError
from toolchain.ship.bundle_record import BundleRecord
from toolchain.system import hardware
from toolchain.system.child import Child

if TYPE_CHECKING:
    import numpy as np

# The limits are several times what a bundle of the toolchain needs on a slow machine.
BASE_S = 60.0  # seconds for an answer of the child; each megabyte of the bundle adds one second
TOKENS_IN_BASE = 32 * 512  # a batch with more tokens has proportionally more seconds
MOST_BASES = 64  # a batch of 1,048,576 tokens; a bundle cannot demand more time
CHARACTERS_PER_S = 10_000  # each second of tokenising covers this number of characters
BASE_BYTES = 1 << 30  # memory of the child beyond its imports; each thread adds `THREAD_BYTES`
THREAD_BYTES = 32 << 20
COPIES = 8  # the child may hold this number of copies of the bundle's files
# The largest arrays of a transformer are four of float32 with the shape [rows, heads, tokens, tokens], for 16 heads.
BYTES_PER_TOKEN_PAIR = 4 * 4 * 16
GOLDEN_ROWS, SCORED_ROWS = 8, 32  # largest number of texts in a batch of `verify` and of `predict`
SHARE = 0.8  # largest share of the free memory
HINT = "Do not use this bundle; get it again from its source."


class BundleProcess(Child):
    """A new child process for one bundle; the code that creates it must call `close`.

    The memory limit holds on Linux. The time limit holds everywhere.

    Args:
        folder: Folder of the bundle.
        record: Record of the bundle.
        rows: Largest number of texts in a batch.
    """

    def __init__(self, folder: Path, record: BundleRecord, rows: int) -> None:
        self._folder = folder
        self._record = record
        self._answer_s = BASE_S + record.size_bytes / 1e6
        self._is_ready = False  # whether the child may have opened a file of the bundle
        super().__init__("toolchain.ship.worker", {})
        with self._closing_on_error():
            # The child answers before it opens a file of the bundle, so this needs no limit of time.
            self.ask({"folder": str(folder), "memory_bytes": memory_limit(record, rows)}, None)
            self._is_ready = True

    def compare(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the result of `checking.compare`, with its errors.

        Args:
            body: Content of bundle.json.

        Raises:
            VerdictError: The models or the tokenizer exceed a limit.
        """
        result: dict[str, Any] = self._call("compare", self._answer_s * len(self._record.models), body=body)
        return result

    def _call(self, method: str, seconds: float, **arguments: Any) -> Any:
        return self.ask({"do": method, "seconds": seconds, **arguments}, seconds)["result"]

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _make_timeout_error(self, timeout_s: float) -> ToolchainError:
        return VerdictError(
            f"{self._folder}: the models or the tokenizer need more than {timeout_s:.0f} s.",
            f"{HINT} If you trust the bundle, check it on a faster machine.",
        )

    def _make_error(self, cause: str) -> ToolchainError:
        problem = f"{self._folder}: the models or the tokenizer cannot be opened. {cause}"
        if not self._is_ready:  # Python cannot start the module, so the bundle is not the cause.
            return ShippingError(problem, "`toolchain doctor` lists the packages to install.")
        return VerdictError(problem, HINT)


class BundleModel(BundleProcess):
    """The first model of a checked bundle, with its tokenizer, in a child process.

    Args:
        folder: Folder of the bundle.
        record: Record of the bundle.
        threads: Number of threads within an operator.

    Raises:
        VerdictError: The model or the tokenizer cannot be opened, or exceeds a limit.
    """

    def __init__(self, folder: Path, record: BundleRecord, threads: int) -> None:
        super().__init__(folder, record, SCORED_ROWS)
        model = record.models[0]
        with self._closing_on_error():
            self._call(
                "open",
                self._answer_s,
                file=model.file,
                names=model.names,
                labels=len(record.labels),
                task=record.task_name,
                pad_id=record.pad_id,
                max_length=record.max_length,
                threads=threads,
            )

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Returns the token ids of each text or pair; see `Encoder.encode`."""
        characters = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
        seconds = self._answer_s + characters / CHARACTERS_PER_S
        rows = []
        for ids, types, spans in self._call("encode", seconds, texts=texts):
            rows.append(row := Tokens(ids))
            row.types, row.spans = types, spans
        return rows

    def logits(self, texts: Sequence[Text], rows: Sequence[Tokens]) -> np.ndarray:
        """Returns the logits of the texts as float32, of shape [texts, labels] or [texts, tokens, labels].

        Args:
            texts: The texts.
            rows: The result of `encode` for the texts.

        Raises:
            DataError: The graph contains the tokenizer, and an item of `texts` is a pair of texts.
            VerdictError: The model fails, returns logits of a wrong shape, or exceeds a limit.
        """
        import numpy as np

        tokens = len(rows) * max(map(len, rows))
        seconds = self._answer_s * min(max(1.0, tokens / TOKENS_IN_BASE), MOST_BASES)
        sent_texts = texts if self._record.models[0].takes_texts else []
        reply = self._call("logits", seconds, texts=sent_texts, rows=[[row, row.types] for row in rows])
        return np.frombuffer(base64.b64decode(reply["float32"]), np.float32).reshape(reply["shape"])


def memory_limit(record: BundleRecord, rows: int) -> int:
    """Returns the number of bytes that the child may allocate after its imports.

    Args:
        record: Record of the bundle.
        rows: Largest number of texts in a batch.
    """
    import psutil

    arrays = rows * record.max_length**2 * BYTES_PER_TOKEN_PAIR
    limit = BASE_BYTES + hardware.cores() * THREAD_BYTES + COPIES * record.size_bytes + arrays
    return min(limit, int(SHARE * psutil.virtual_memory().available))
