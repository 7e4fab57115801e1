"""One `Session` for every runtime: the same batch in, the same logits out, under the same clock."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Backend:
    """Where a runtime's session is, as ``module:class``, and what it imports when opened: a memory figure tells these
    imports from the model."""

    session: str
    imports: tuple[str, ...]


_TORCH = ("torch", "transformers.models.auto.modeling_auto")
# By the runtime tag of a variant's name; imported when needed.
BACKENDS = {
    "torch": Backend("toolchain.backends.pytorch:TorchSession", _TORCH),
    "bnb": Backend(
        "toolchain.backends.bnb:BnbSession", ("torch", "transformers.models.auto.modeling_auto", "bitsandbytes")
    ),
    "onnx": Backend("toolchain.backends.ort:OrtSession", ("onnxruntime",)),
}


class Session(Protocol):
    """A loaded model on one execution provider.

    Built as ``Class(folder, provider, threads)``; raises `ProviderError` where the provider cannot serve, and never
    runs on another one than asked.
    """

    def __init__(self, folder: Path, provider: str, threads: int) -> None: ...

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """int64 arrays [batch, sequence] on the host → float32 logits [batch, labels] on the host."""

    def facts(self) -> dict[str, Any]:
        """The provider it really runs on, and what else a row should say about the session."""

    def close(self) -> None:
        """Frees the model."""


def session_class(path: str) -> type[Session]:
    """The class at ``module:name``."""
    module, name = path.split(":")
    found: type[Session] = getattr(importlib.import_module(module), name)
    return found


def open_session(folder: Path, runtime: str, provider: str, threads: int) -> Session:
    """Loads the artifact in `folder` for `provider` (``cpu`` or ``cuda``) with that many threads."""
    return session_class(BACKENDS[runtime].session)(folder, provider, threads)
