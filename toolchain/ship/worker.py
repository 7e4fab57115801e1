"""The child process that opens the graphs and the tokenizer of one bundle, with limits of time and memory.

`toolchain.ship.process` is the parent's handle.
"""

from __future__ import annotations

import base64
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends import Place, open_session
from toolchain.data.encoding import Encoder, open_tokenizer, pad
from toolchain.data.files import Text
from toolchain.data.labels import TOKENS, Tokens
from toolchain.errors import DataError, DeviceMemoryError, ProviderError, ToolchainError, VerdictError, first_line
from toolchain.ship import checking
from toolchain.ship.bundle_files.verify import LOGITS, TEXT
from toolchain.ship.process import HINT
from toolchain.system.panics import convert_panics
from toolchain.system.serving import limit_memory, serve

if TYPE_CHECKING:
    import numpy as np

# The parent kills a child that exceeds its time. If the parent no longer runs, the system ends the child this number of
# seconds later.
GRACE_S = 10.0
MESSAGE_CHARACTERS = 300  # longest quotation of a library's error
_MEMORY_ERROR = re.compile(r"bad.?alloc|failed to allocate|out of memory|cannot allocate|memory allocation", re.I)


class Worker:
    """A bundle, and the model that `open` opens; the public methods answer the parent's messages.

    Each public method takes the limit of its time in `seconds`.

    Args:
        folder: Folder of the bundle.
        memory_bytes: Number of bytes that this process may allocate, for error messages.
    """

    ready: Mapping[str, Any] = {}

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        self._folder, self._memory_bytes = folder, memory_bytes

    def compare(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Compares tokens and logits with the recorded ones; see `checking.compare`."""
        with self._limits(seconds):
            return {"result": checking.compare(self._folder, body)}

    def open(
        self,
        file: str,
        names: Sequence[str],
        labels: int,
        task: str,
        pad_id: int,
        max_length: int,
        threads: int,
        seconds: float,
    ) -> dict[str, Any]:
        """Opens the tokenizer and a model, and returns an empty answer.

        Args:
            file: Path of the model in the bundle.
            names: Names of the model's inputs.
            labels: Number of labels.
            task: Task of the model.
            pad_id: Token id for padding.
            max_length: Largest number of tokens of a text.
            threads: Number of threads within an operator.
        """
        from toolchain.ship.tokenizer_graph.session import TextSession  # `compare` needs none of its many imports

        with self._limits(seconds):
            self._takes_texts, self._labels = list(names) == [TEXT], labels
            tokenizer = open_tokenizer(self._folder / "tokenizer.json", max_length)
            self._encoder = Encoder(self._folder, tokenizer, tuple(names), pad_id, max_length, task)
            path = self._folder / file
            self._session: Any = (
                TextSession(path, threads) if self._takes_texts else open_session(path, "onnx", Place("cpu", threads))
            )
        return {"result": None}

    def encode(self, texts: list[Any], seconds: float) -> dict[str, Any]:
        """Returns token ids, token types and spans of each text or pair; see `Encoder.encode`."""
        with self._limits(seconds):
            rows = self._encoder.encode([text if isinstance(text, str) else tuple(text) for text in texts])
            return {"result": [[row, row.types, row.spans] for row in rows]}

    def logits(self, texts: list[Any], rows: list[Any], seconds: float) -> dict[str, Any]:
        """Returns the logits of the texts: their ``shape``, and their ``float32`` values as base64.

        Args:
            texts: The texts, if the graph contains the tokenizer.
            rows: Token ids and token types of each text.
        """
        import numpy as np

        with self._limits(seconds):
            logits = np.asarray(self._run(texts, rows), np.float32)
            ids_by_text = [ids for ids, _ in rows]
            is_tokens = self._encoder.task == TOKENS
            width = (max(map(len, ids_by_text)),) if is_tokens else ()
            if logits.shape != (len(rows), *width, self._labels):
                raise VerdictError(f"{self._folder}: the model returns logits of the shape {logits.shape}.", HINT)
            # A token classifier may return any logits for padding.
            used = [row[: len(ids)] for row, ids in zip(logits, ids_by_text, strict=True)] if is_tokens else [logits]
            if not all(np.isfinite(part).all() for part in used):
                raise VerdictError(f"{self._folder}: the model returns a logit that is not finite.", HINT)
            values = base64.b64encode(np.ascontiguousarray(logits).tobytes()).decode()
            return {"result": {"shape": logits.shape, "float32": values}}

    def _run(self, texts: Sequence[Text], rows: Sequence[Any]) -> np.ndarray:
        if self._takes_texts:
            if not all(isinstance(text, str) for text in texts):
                raise DataError(
                    "A bundle with the tokenizer in the graph takes single texts, not pairs.",
                    "Use the variant instead of the bundle, or ship a bundle without --with-tokenizer.",
                )
            logits: np.ndarray = self._session.run([str(text) for text in texts])[LOGITS]
            return logits
        tokens = []
        for ids, types in rows:
            tokens.append(row := Tokens(ids))
            row.types = types
        output: np.ndarray = self._session.run(pad(tokens, self._encoder.names, self._encoder.pad_id))
        return output

    @contextmanager
    def _limits(self, seconds: float) -> Iterator[None]:
        """Limits the time of this context, and converts every failure of the bundle to `VerdictError`."""
        _set_alarm(seconds + GRACE_S)
        try:
            with convert_panics():
                yield
        except (DataError, ProviderError):
            raise
        except Exception as error:  # onnxruntime and tokenizers raise exceptions of many classes
            if _is_memory_error(error):
                raise VerdictError(
                    f"{self._folder}: the models or the tokenizer need more than {self._memory_bytes / 1e6:.0f} MB.",
                    HINT,
                ) from error
            if isinstance(error, VerdictError):
                raise
            cause = error.cause if isinstance(error, ToolchainError) else first_line(error)
            quotation = cause[:MESSAGE_CHARACTERS].rstrip(".")
            raise VerdictError(f"{self._folder} cannot be used: {quotation}.", HINT) from error
        finally:
            _set_alarm(0)


def start(first: Mapping[str, Any]) -> Worker:
    """Limits the memory of this process, and returns the object that answers the parent's messages.

    Args:
        first: The first message: the ``folder`` of the bundle, and the limit ``memory_bytes``.
    """
    # The limit covers the bundle and not the imports, whose memory depends on the machine.
    import numpy  # noqa: F401
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    limit_memory(first["memory_bytes"])
    return Worker(Path(first["folder"]), first["memory_bytes"])


def _set_alarm(seconds: float) -> None:
    """Makes the system end this process after `seconds`; 0 cancels that."""
    if hasattr(signal, "setitimer"):  # Windows lacks the function
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _is_memory_error(error: BaseException | None) -> bool:
    """Returns whether a lack of memory caused the error."""
    while error is not None:
        if isinstance(error, MemoryError | DeviceMemoryError) or _MEMORY_ERROR.search(str(error)):
            return True
        error = error.__cause__
    return False


if __name__ == "__main__":
    serve(start)
