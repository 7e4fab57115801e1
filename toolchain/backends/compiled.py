"""PyTorch models that `torch.compile` turns into machine code when they answer their first batch."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from toolchain.backends.graph_lengths import (
    example_text,
    find_length,
    graph_lengths,
    pad_text,
    read_manifest,
    remove_padding,
)
from toolchain.backends.pytorch import TorchSession
from toolchain.errors import ArtifactError, ProviderError, first_line
from toolchain.system import hardware

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from toolchain.backends import Place

# The program that compiles the C++ code of `torch.compile` on a CPU, unless the variable CXX names another program.
COMPILER = "clang++" if sys.platform == "darwin" else "g++"
# PyTorch compiles a function only a few times in a process. After that, PyTorch would run the function uncompiled.
# One setting of PyTorch makes PyTorch raise an error instead. `STRICT` lists the newer and the older name of this
# setting, and `LIMIT_ERRORS` lists the newer and the older name of this error. Older releases of PyTorch know
# only the older names.
STRICT = ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")
LIMIT_ERRORS = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")
# Calls after which PyTorch replays a graph: the first call only warms up, and the second call records the graph.
RECORDING_RUNS = 3


class CompiledSession(TorchSession):
    """A `Session` that runs on PyTorch's compiler, in its default mode and with dynamic shapes.

    The first batch takes up to a minute, because PyTorch compiles the model. A batch has one sentence or several
    sentences, and the padded sentences of a batch have one token or several tokens. PyTorch compiles separate code for
    each of these four kinds of batch, so the first batch of each kind takes up to a minute.

    Attributes:
        options: Settings of PyTorch's compiler that differ from its default mode, for this model only.

    Raises:
        ProviderError: This machine has no C++ compiler, or PyTorch cannot compile the model.
    """

    options: Mapping[str, bool] = {}

    def _load(self, folder: Path) -> PreTrainedModel:
        import torch
        import torch._dynamo

        compiler = os.environ.get("CXX") or COMPILER
        if self._device.type == "cpu" and not shutil.which(compiler):
            raise ProviderError(
                f"torch.compile needs a C++ compiler, and this machine has no {compiler}.",
                "Install g++ (Debian: apt install g++), or set CXX to your compiler.",
            )
        for setting in STRICT:
            if hasattr(torch._dynamo.config, setting):
                setattr(torch._dynamo.config, setting, True)
        return self._compile(super()._load(folder))

    def _compile(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns the model that compiles itself in its first call."""
        return compile_model(model, self.options)

    def _call(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with _translate_compiler_error():
            return super()._call(inputs)

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        """See `Session.resident`."""
        self.run(batch)  # compiles the code for the shape of the batch
        return super().resident(batch)

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `TorchSession`, and the settings of the compiler."""
        return {**super().facts(), "compiled": "dynamic shapes"}

    def close(self) -> None:
        """Releases the model and the compiled code of this process.

        Otherwise, further sessions of this process would reach PyTorch's limit of compilations.
        """
        import torch

        super().close()
        torch._dynamo.reset()


class CompiledGraphSession(CompiledSession):
    """A `Session` that runs on PyTorch's compiler and replays CUDA graphs, as its mode ``reduce-overhead`` does.

    The session compiles the model and records all graphs when it loads the model, so loading takes up to a minute. A
    batch of several texts has no graph, and its code is compiled in the first such batch.

    Raises:
        ProviderError: PyTorch finds no GPU, cannot compile the model, or cannot record the graphs.
        ArtifactError: The folder has no manifest, or the manifest cannot be read.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        super().__init__(folder, place)
        manifest = read_manifest(folder)
        self._lengths = graph_lengths(manifest.max_length)
        names = [spec.name for spec in manifest.inputs]
        for length in reversed(self._lengths):
            self._record(example_text(names, length))

    def _record(self, text: dict[str, np.ndarray]) -> None:
        """Records the graph of one length.

        If PyTorch cannot record a part of the model, PyTorch runs this part without a graph, logs one line, and counts
        the part.
        """
        from torch._dynamo.utils import counters

        hint = "Use the variant without CUDA graphs, with --provider cuda."
        skips_before = counters["inductor"]["cudagraph_skips"]
        try:
            for _ in range(RECORDING_RUNS):
                self.run(text)
        except ArtifactError as error:
            raise ProviderError(f"PyTorch cannot record CUDA graphs of this model: {error.cause}", hint) from error
        if counters["inductor"]["cudagraph_skips"] > skips_before:
            raise ProviderError("PyTorch records no CUDA graphs of a part of this model.", hint)

    def _compile(self, model: PreTrainedModel) -> PreTrainedModel:
        self._graph_model = compile_model(model, {**self.options, "triton.cudagraphs": True})
        return super()._compile(model)

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See `Session.run`."""
        return remove_padding(super().run(batch), batch["input_ids"].shape[1])

    def _to_device(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        length = find_length(batch, self._lengths)
        return super()._to_device(batch if length is None else pad_text(batch, length))

    def _call(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        rows, tokens = inputs["input_ids"].shape
        if rows > 1 or tokens not in self._lengths:
            return super()._call(inputs)
        with _translate_compiler_error():
            logits: torch.Tensor = self._graph_model(**inputs).logits
        return logits

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `TorchSession`, the settings of the compiler, and the lengths with a graph."""
        return {**super().facts(), "compiled": "dynamic shapes, CUDA graphs", "graph_lengths": list(self._lengths)}

    def close(self) -> None:
        """See `CompiledSession.close`."""
        del self._graph_model
        super().close()


class TorchaoSession(CompiledSession):
    """A `Session` that compiles a model of torchao, with weights that PyTorch prepares once (*freezing*).

    Freezing computes once what depends on the weights only. Without freezing, the compiled code computes this part
    again for each batch.

    Raises:
        ProviderError: The place requires exact 8-bit products, and on this processor torchao's products may overflow.
    """

    options: Mapping[str, bool] = {"freezing": True}

    def __init__(self, folder: Path, place: Place) -> None:
        if place.exact and not hardware.exact_int8():
            raise ProviderError(
                "torchao's int8 sums may overflow on this processor, which has no VNNI.",
                "Use onnx-int8 instead, which is exact on every processor.",
            )
        super().__init__(folder, place)

    def _load(self, folder: Path) -> PreTrainedModel:
        # The warning concerns PyTorch's cache of compiled code, which a user of the command cannot change.
        warnings.filterwarnings("ignore", message="Int8Tensor does not implement _stable_hash_for_caching")
        return super()._load(folder)

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `TorchSession`, and the settings of the compiler."""
        return {**super().facts(), "compiled": "dynamic shapes, frozen weights"}


def compile_model(model: PreTrainedModel, options: Mapping[str, bool]) -> PreTrainedModel:
    """Returns the model that compiles itself for dynamic shapes in its first call, with settings of the compiler."""
    import torch

    return cast("PreTrainedModel", torch.compile(model, dynamic=True, options=dict(options) or None))


@contextmanager
def _translate_compiler_error() -> Iterator[None]:
    """Converts the errors of PyTorch's compiler to `ProviderError`."""
    from torch._dynamo import exc

    limits = tuple(kind for name in LIMIT_ERRORS if (kind := getattr(exc, name, None)))
    try:
        yield
    except (exc.TorchDynamoException, *limits) as error:
        cause = first_line(error)
        raise ProviderError(
            f"PyTorch cannot compile this model: {cause}",
            "Measure a variant that is not compiled, such as torch-fp32 or torch-int8.",
        ) from error
