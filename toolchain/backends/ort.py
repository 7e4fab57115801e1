"""ONNX Runtime under its default options: what an app that loads the file will see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import GraphError, ProviderError

if TYPE_CHECKING:
    import numpy as np

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SILENT = 3  # errors only: what ONNX Runtime warns of is checked here and raised


class OrtSession:
    """A `Session` on ONNX Runtime."""

    def __init__(self, folder: Path, provider: str, threads: int) -> None:
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        wanted = PROVIDERS[provider]
        if wanted not in ort.get_available_providers():
            raise ProviderError(
                f"This ONNX Runtime {ort.__version__} has no {wanted}.",
                "Install the extra `gpu` in place of `cpu` (never both: they share one import folder).",
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _SILENT
        path = folder / "model.onnx"
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[wanted])
        except (
            state.InvalidProtobuf,
            state.InvalidGraph,
            state.NoSuchFile,
            state.Fail,
            state.InvalidArgument,
        ) as error:
            raise GraphError(f"{path} is no model ONNX Runtime can load: {error}.", "Build it again.") from error
        except state.NotImplemented as error:
            raise GraphError(
                f"ONNX Runtime has no kernel for an operator of {path}: {error}.", "Build it again."
            ) from error
        # A provider that cannot start is dropped with a log line, and the session runs on the CPU: never let that pass.
        if self._session.get_providers()[0] != wanted:
            got = ", ".join(self._session.get_providers())
            raise ProviderError(
                f"ONNX Runtime was asked for {wanted} and fell back to {got}.",
                "Install the CUDA and cuDNN it was built for, or leave --provider cuda out.",
            )
        self._threads = threads

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See `Session.run`."""
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        try:
            logits: np.ndarray = self._session.run(None, batch)[0]
        except (state.RuntimeException, state.InvalidArgument, state.Fail) as error:
            shape = " × ".join(map(str, batch["input_ids"].shape))
            raise GraphError(f"The graph fails on a batch of {shape} tokens: {error}.", "Build it again.") from error
        return logits

    def facts(self) -> dict[str, Any]:
        """Provider in use and threads."""
        return {"provider": self._session.get_providers()[0], "threads": self._threads}

    def close(self) -> None:
        """See `Session.close`."""
        del self._session
