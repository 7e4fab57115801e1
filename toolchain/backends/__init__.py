"""One `Session` interface for all runtimes: all sessions take the same batches and return logits in the same format."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolchain.errors import ProviderError
from toolchain.results.providers import CUDA_GRAPHS, TENSORRT
from toolchain.results.session_settings import DEFAULT, SessionSettings
from toolchain.system.files import temporary_folder

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from toolchain.backends.ort import OrtSession


@dataclass(frozen=True)
class Backend:
    """The session classes of a runtime.

    Attributes:
        session: Path of the class for ``cpu`` and ``cuda`` as ``module:class``.
        imports: Modules that a benchmark imports before it opens the session, to measure the memory of the modules and
            of the session separately.
        python: Path of the interpreter that runs the session in a benchmark; None for the interpreter of the toolchain.
            A runtime whose packages do not fit those of the toolchain can have an environment of its own, which must
            also be able to import the toolchain.
        further_sessions: Paths of the classes for further execution providers, by provider.
    """

    session: str
    imports: tuple[str, ...]
    python: str | None = None
    further_sessions: Mapping[str, str] = field(default_factory=dict)

    def session_on(self, provider: str) -> str:
        """Returns the path of the session class for an execution provider.

        Raises:
            ProviderError: The runtime does not run on the provider.
        """
        if provider in ("cpu", "cuda"):
            return self.session
        if provider not in self.further_sessions:
            raise ProviderError(
                f"This runtime does not run on {provider}.", "Use the provider cuda, or another variant."
            )
        return self.further_sessions[provider]


_TORCH = ("torch", "transformers.models.auto.modeling_auto")
# Maps the runtime tag of a variant's name, such as `onnx` in `onnx-int8`, to its backend. The path of a session class
# is a string, so that its module is imported only when needed.
BACKENDS = {
    "torch": Backend("toolchain.backends.pytorch:TorchSession", _TORCH),
    "torch-compile": Backend(
        "toolchain.backends.compiled:CompiledSession",
        (*_TORCH, "torch._dynamo"),
        further_sessions={CUDA_GRAPHS: "toolchain.backends.compiled:CompiledGraphSession"},
    ),
    "bnb": Backend(
        "toolchain.backends.bnb:BnbSession", ("torch", "transformers.models.auto.modeling_auto", "bitsandbytes")
    ),
    "torchao": Backend("toolchain.backends.compiled:TorchaoSession", (*_TORCH, "torch._dynamo", "torchao")),
    "onnx": Backend(
        "toolchain.backends.ort:OrtSession",
        ("onnxruntime",),
        further_sessions={
            CUDA_GRAPHS: "toolchain.backends.ort_graphs:OrtGraphSession",
            TENSORRT: "toolchain.backends.ort_tensorrt:TensorrtSession",
        },
    ),
}


@dataclass(frozen=True)
class Place:
    """The execution provider and the options of a session.

    Attributes:
        provider: ``cpu``, ``cuda``, ``cuda-graphs`` for CUDA with CUDA graphs, or ``tensorrt``.
        threads: Number of CPU threads.
        device_id: Number of the GPU in the order of `nvidia-smi`.
        allow_fallback: Whether operators without a kernel on the provider may run on the CPU; the session's facts then
            count such operators.
        exact: If true, 8-bit products are exact on every processor. If false, 8-bit products may saturate on x86
            processors without VNNI.
        settings: Settings of a session of ONNX Runtime; other runtimes ignore them.
        batch_size: Maximum number of texts in a batch; only a session on TensorRT needs this number.
    """

    provider: str = "cpu"
    threads: int = 1
    device_id: int = 0
    allow_fallback: bool = False
    exact: bool = True
    settings: SessionSettings = DEFAULT
    batch_size: int = 1

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Place:
        """Returns the place with these fields, which `dataclasses.asdict` returned for it in another process."""
        return cls(**{**fields, "settings": SessionSettings(**fields["settings"])})


class Session(Protocol):
    """A model that is loaded on one execution provider; create it as ``Class(folder, place)``.

    A session runs only on the provider of `place`, unless `place` allows a fallback.

    Raises:
        ProviderError: The provider is unavailable.
        DeviceMemoryError: The device has too little memory to create the session or to run a batch.
    """

    def __init__(self, folder: Path, place: Place) -> None: ...

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the logits of one batch.

        Args:
            batch: Maps each input name to an int64 array of shape [batch, sequence] on the host.

        Returns:
            A float32 array of shape [batch, labels] on the host, or [batch, sequence, labels] for token classification.
        """

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        """Copies the batch to the device and returns a function that runs the model on it without further copies.

        The returned function may be called repeatedly. Each call of the returned function waits for the computation and
        leaves the logits on the device.
        """

    def facts(self) -> dict[str, Any]:
        """Returns the provider that the session actually uses, and other facts for the cell's row in a comparison."""

    def close(self) -> None:
        """Releases the model."""


def session_class(path: str) -> type[Session]:
    """Imports and returns the session class at the path ``module:name``."""
    module, name = path.split(":")
    session_type: type[Session] = getattr(importlib.import_module(module), name)
    return session_type


def open_session(folder: Path, runtime: str, place: Place) -> Session:
    """Loads a model and returns its session.

    Args:
        folder: Folder of the artifact, or path of a ``.onnx`` or ``.ort`` file.
        runtime: Runtime tag of the variant's name, a key of `BACKENDS`.
        place: Provider and options of the session.

    Raises:
        ProviderError: The provider is unavailable.
        DeviceMemoryError: The device has too little memory.
    """
    return session_class(BACKENDS[runtime].session_on(place.provider))(folder, place)


@contextmanager
def open_graph(graph: ir.Model, threads: int) -> Iterator[OrtSession]:
    """Opens a session of a graph in memory on the CPU; closes the session when the block ends."""
    from toolchain import passes
    from toolchain.backends.ort import OrtSession

    with temporary_folder() as folder:
        passes.write(graph, folder / "model.onnx")
        session = OrtSession(folder, Place("cpu", threads))
        try:
            yield session
        finally:
            session.close()
