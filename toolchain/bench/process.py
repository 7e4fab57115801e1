"""The parent's handle of the child process that measures a cell; `toolchain.bench.worker` runs in the child process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain.backends import Place
from toolchain.data.encoding import Encoder
from toolchain.data.files import Text
from toolchain.errors import BenchError
from toolchain.system.child import Child


class Worker(Child):
    """A new child process for one session; the method `load` loads the session.

    Args:
        session: Path of the session class as ``module:class``.
        folder: Folder of the artifact.
        place: Execution provider and options of the session.
        encoder: The `Encoder` of the cell.
        text: The text that `load` classifies.
        imports: Modules that the child imports before it loads the session.
        python: Path of the child's interpreter, which must be able to import the toolchain; None for the interpreter of
            this process.
    """

    def __init__(
        self,
        session: str,
        folder: Path,
        place: Place,
        encoder: Encoder,
        text: Text,
        imports: Sequence[str] = (),
        python: str | None = None,
    ) -> None:
        super().__init__("toolchain.bench.worker", environment(place.threads), python)
        tokenizer = {"folder": str(encoder.folder), "names": encoder.names, "max_length": encoder.max_length}
        self._load_message = {
            "session": session,
            "folder": str(folder),
            "place": asdict(place),
            "tokenizer": tokenizer,
            "text": text,
            "imports": list(imports),
        }

    def load(self, timeout_s: float) -> dict[str, Any]:
        """Loads the session and classifies one text.

        Args:
            timeout_s: Seconds to wait for the answer.

        Returns:
            The session's ``facts``, the ``memory`` in bytes after each stage of loading, ``load_us`` and
            ``cold_start_us``. ``load_us`` is the microseconds that the session takes to load. ``cold_start_us`` is
            the microseconds from the start of the process to the answer.
        """
        reply = self.ask(self._load_message, timeout_s)
        # A cold start does not include the time in which the child measures its memory.
        reply["cold_start_us"] = round((self._answered_at - self._started_at) * 1e6) - reply.pop("metering_us")
        return reply

    def _make_error(self, cause: str) -> BenchError:
        return BenchError(cause)


def environment(threads: int) -> dict[str, str]:
    """Returns the additional environment variables of a measured process.

    Args:
        threads: Number of threads of the numeric libraries.
    """
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # Network access would disturb the measurement.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # In PCI bus order, CUDA, NVML and nvidia-smi agree on each GPU's number.
    }
