"""ONNX Runtime on CUDA with CUDA graphs: a graph for each of a few lengths, for one text at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends.graph_lengths import (
    example_text,
    find_length,
    graph_lengths,
    pad_text,
    read_manifest,
    remove_padding,
)
from toolchain.backends.ort import OrtSession, check_memory, describe, failures, translate_errors
from toolchain.errors import ProviderError, ToolchainError

if TYPE_CHECKING:
    import numpy as np

    from toolchain.backends import Place

# The option of a run that names its graph, and the value with which ONNX Runtime neither records nor replays a graph.
GRAPH_ID, NO_GRAPH = "gpu_graph_id", -1
CONTROL_FLOW = {"If", "Loop", "Scan"}


class OrtGraphSession(OrtSession):
    """A `Session` that runs on ONNX Runtime and replays CUDA graphs.

    The session records all graphs when it loads the model. Graphs and runs without a graph share memory, so the session
    runs one batch at a time. ONNX Runtime keeps graphs separately for each thread: in another thread, the first text of
    each length takes longer.

    Raises:
        ProviderError: ONNX Runtime cannot record the model's graphs, for example because the model branches.
        ArtifactError: The folder has no manifest, or the manifest cannot be read.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        # A graph holds no operators that run on the CPU, so a fallback is impossible. Only operators that compute
        # shapes may run on the CPU during the recording, because the shapes of a graph never change.
        super().__init__(folder, replace(place, allow_fallback=False))
        self._lock = threading.Lock()
        self._run_options = _make_run_options(NO_GRAPH)
        manifest = read_manifest(folder)
        self._lengths = graph_lengths(manifest.max_length)
        names = [spec.name for spec in manifest.inputs]
        # An allocation outside a run raises RuntimeError.
        errors: tuple[type[Exception], ...] = (*failures(), RuntimeError)
        try:
            # The longest text comes first, because later graphs reuse its memory.
            self._graphs = {length: self._record(names, length) for length in reversed(self._lengths)}
        except errors as error:
            check_memory(error)
            raise self._load_error(folder / "model.onnx", describe(error)) from error

    def _provider_options(self) -> dict[str, str]:
        return {**super()._provider_options(), "enable_cuda_graph": "1"}

    def _load_error(self, path: Path, cause: str) -> ToolchainError:
        from toolchain import passes

        if operators := sorted({node.op_type for node in passes.read(path).graph.all_nodes()} & CONTROL_FLOW):
            return ProviderError(
                f"A CUDA graph cannot branch, and {path} has the operator {' and '.join(operators)}.",
                "Use the variant without exits.",
            )
        return ProviderError(
            f"ONNX Runtime cannot record CUDA graphs of {path}: {cause}.",
            "Use the variant without CUDA graphs, with --provider cuda.",
        )

    def _record(self, names: Sequence[str], length: int) -> _Graph:
        """Records the graph of one length."""
        import onnxruntime as ort

        example = example_text(names, length)
        logits = super().run(example)  # a run without a graph gives the shape and the type of the logits
        device = "cuda", self._place.device_id
        inputs = {name: ort.OrtValue.ortvalue_from_numpy(array, *device) for name, array in example.items()}
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(self._output, ort.OrtValue.ortvalue_from_numpy(logits, *device))
        graph = _Graph(length, inputs, binding, _make_run_options(length))
        self._replay(graph)  # ONNX Runtime records a graph in the first run with its number
        return graph

    def _replay(self, graph: _Graph) -> None:
        """Computes the logits of the graph's inputs, and waits for the GPU."""
        self._session.run_with_iobinding(graph.binding, graph.options)

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See `Session.run`."""
        with self._lock:
            length = find_length(batch, self._lengths)
            if length is None:
                return super().run(batch)
            graph = self._graphs[length]
            with translate_errors(batch):
                graph.fill(batch)
                self._replay(graph)
                return remove_padding(graph.binding.copy_outputs_to_cpu()[0], batch["input_ids"].shape[1])

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        """See `Session.resident`; the next text with the same graph replaces the batch on the device."""
        length = find_length(batch, self._lengths)
        compute: Callable[[], object]
        with self._lock:
            if length is None:
                compute = super().resident(batch)
            else:
                self._graphs[length].fill(batch)
                compute = functools.partial(self._replay, self._graphs[length])

        def run_model() -> None:
            with self._lock:
                compute()

        return run_model

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `OrtSession`, and the lengths with a graph."""
        return {**super().facts(), "graph_lengths": list(self._lengths)}

    def close(self) -> None:
        """See `Session.close`."""
        self._graphs.clear()
        super().close()


@dataclass(frozen=True)
class _Graph:
    """The CUDA graph of one length.

    Attributes:
        length: Number of tokens.
        inputs: The inputs by name, in the memory of the GPU.
        binding: Binds the inputs, and memory of the GPU for the logits, to the session.
        options: Options of a run with this graph.
    """

    length: int
    inputs: Mapping[str, Any]
    binding: Any
    options: Any

    def fill(self, batch: Mapping[str, np.ndarray]) -> None:
        """Copies a batch of one text to the inputs, padded to the length of the graph."""
        for name, array in pad_text(batch, self.length).items():
            self.inputs[name].update_inplace(array)


def _make_run_options(number: int) -> Any:
    """Returns options of a run with the graph of this number, or without a graph if the number is `NO_GRAPH`."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(number))
    return options
