"""A session of ONNX Runtime with onnxruntime-extensions, for graphs that take texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.backends.ort import add_extensions, failures, session_options
from toolchain.errors import GraphError

if TYPE_CHECKING:
    import numpy as np


class TextSession:
    """A session on the CPU for an ``.onnx`` file whose only input is a tensor of texts.

    Raises:
        ProviderError: onnxruntime-extensions is not installed.
        GraphError: ONNX Runtime cannot load the file.
    """

    def __init__(self, file: Path, threads: int) -> None:
        import onnxruntime as ort

        options = session_options(threads)
        add_extensions(options)
        try:
            self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except failures() as error:
            raise GraphError(f"ONNX Runtime cannot load the model {file}: {error}.", "Build it again.") from error
        self._input = self._session.get_inputs()[0].name

    def run(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Runs the graph on texts and returns every output by its name.

        Raises:
            GraphError: ONNX Runtime fails on the texts.
        """
        import numpy as np

        names = [output.name for output in self._session.get_outputs()]
        try:
            outputs = self._session.run(names, {self._input: np.array(texts, dtype=object)})
        except failures() as error:
            raise GraphError(f"The graph fails on {len(texts)} texts: {error}.", "Build it again.") from error
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        """Releases the model."""
        del self._session
