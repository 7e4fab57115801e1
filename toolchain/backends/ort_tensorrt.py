"""ONNX Runtime on TensorRT, which builds an engine from the whole graph for one GPU, in half precision."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends.graph_lengths import read_manifest
from toolchain.backends.ort import OrtSession
from toolchain.errors import ProviderError, ToolchainError

if TYPE_CHECKING:
    from toolchain.backends import Place

TUNED_LENGTH = 32  # TensorRT chooses the kernels that are fastest for one text with this number of tokens


class TensorrtSession(OrtSession):
    """A `Session` that runs on ONNX Runtime with TensorRT, in half precision.

    TensorRT builds its engine when the session loads the model, which takes a minute or more. The engine accepts at
    most `Place.batch_size` texts, and at most as many tokens as the model.

    Raises:
        ProviderError: TensorRT is not installed, or cannot build an engine of the whole graph.
        ArtifactError: The folder has no manifest, or the manifest cannot be read.
    """

    _start_hint = (
        "Install the release of TensorRT that this release of ONNX Runtime supports, or leave out --provider tensorrt."
    )

    def __init__(self, folder: Path, place: Place) -> None:
        manifest = read_manifest(folder)
        self._inputs = [spec.name for spec in manifest.inputs]
        self._max_length = manifest.max_length
        # pip installs TensorRT in a folder that the system's loader does not search. The import loads the libraries.
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt")
        super().__init__(folder, replace(place, allow_fallback=False))

    def _provider_options(self) -> dict[str, str]:
        shapes = {
            "min": (1, 1),
            "opt": (1, min(TUNED_LENGTH, self._max_length)),
            "max": (self._place.batch_size, self._max_length),
        }
        return {
            **super()._provider_options(),
            "trt_fp16_enable": "1",
            **{
                f"trt_profile_{bound}_shapes": ",".join(f"{name}:{rows}x{tokens}" for name in self._inputs)
                for bound, (rows, tokens) in shapes.items()
            },
        }

    def _load_error(self, path: Path, cause: str) -> ToolchainError:
        return ProviderError(
            f"TensorRT cannot build an engine of {path}: {cause}.", "Measure onnx-fp16 with --provider cuda."
        )

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `OrtSession`, and the precision of the engine."""
        return {**super().facts(), "precision": "fp16"}
