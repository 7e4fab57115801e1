"""PyTorch models that `torch.compile` turns into machine code when they answer their first batch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from toolchain.backends.pytorch import TorchSession
from toolchain.errors import ProviderError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

# On a CPU, `torch.compile` writes C++ code, which one of these programs compiles.
COMPILERS = ("g++", "c++", "clang++")


class CompiledSession(TorchSession):
    """A `Session` that runs on PyTorch's compiler, in its default mode and with dynamic shapes.

    The first batch takes up to a minute, because PyTorch compiles the model. A batch size or a number of tokens of 1
    needs code of its own, so the first batch of another such shape takes as long.

    Raises:
        ProviderError: This machine has no C++ compiler, or PyTorch cannot compile the model.
    """

    def _load(self, folder: Path) -> PreTrainedModel:
        import torch

        program = os.environ.get("CXX")
        if self._device.type == "cpu" and not any(map(shutil.which, [program] if program else COMPILERS)):
            raise ProviderError(
                "torch.compile needs a C++ compiler, and this machine has none.",
                "Install g++ (Debian: apt install g++).",
            )
        return cast("PreTrainedModel", torch.compile(super()._load(folder), dynamic=True))

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See `Session.run`."""
        with _translate_compiler_error():
            return super().run(batch)

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        """See `Session.resident`."""
        with _translate_compiler_error():
            super().run(batch)  # compiles the code for the shape of the batch
        return super().resident(batch)

    def facts(self) -> dict[str, Any]:
        """Returns the facts of `TorchSession`, and the settings of the compiler."""
        return {**super().facts(), "compiled": "dynamic shapes"}


@contextmanager
def _translate_compiler_error() -> Iterator[None]:
    """Converts the errors of PyTorch's compiler to `ProviderError`."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ProviderError(
            f"PyTorch cannot compile this model: {cause}", "Measure the variant without -compile, such as torch-fp32."
        ) from error
