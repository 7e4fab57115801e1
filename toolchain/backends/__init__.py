"""One `Session` for every runtime: the same batch in, the same logits out, under the same clock."""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


@dataclass(frozen=True)
class Place:
    """Where a session runs: on an execution `provider` (``cpu`` or ``cuda``), with so many `threads` on the host.

    `device_id` is the GPU's number as `nvidia-smi` counts. With `allow_fallback`, what has no kernel on the provider
    may run on the CPU; the session's facts say so then. Without `exact`, 8-bit products may saturate, where the
    processor does so by default.
    """

    provider: str = "cpu"
    threads: int = 1
    device_id: int = 0
    allow_fallback: bool = False
    exact: bool = True


class Session(Protocol):
    """A loaded model in one place.

    Built as ``Class(folder, place)``; raises `ProviderError` where the provider cannot serve, and never runs on another
    one than asked unless the place allows it. A device without room is a `DeviceMemoryError`, here and in `run`.
    """

    def __init__(self, folder: Path, place: Place) -> None: ...

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """int64 arrays [batch, sequence] on the host → float32 logits [batch, labels] on the host."""

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        """`run` without its copies, to be called again and again: the batch lies on the device, the logits stay there,
        and a call returns when they are computed."""

    def facts(self) -> dict[str, Any]:
        """The provider it really runs on, and what else a row should say about the session."""

    def close(self) -> None:
        """Frees the model."""


def session_class(path: str) -> type[Session]:
    """The class at ``module:name``."""
    module, name = path.split(":")
    found: type[Session] = getattr(importlib.import_module(module), name)
    return found


def open_session(folder: Path, runtime: str, place: Place) -> Session:
    """Loads the artifact in `folder`, or the ``.onnx`` or ``.ort`` file it names, by the runtime tag of its variant's
    name."""
    return session_class(BACKENDS[runtime].session)(folder, place)
