"""Export with PyTorch's tracing exporter."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, first_line
from toolchain.exporters import INPUT_AXES, output_axes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUT = "logits"


def write_onnx(model: PreTrainedModel, target: Path, opset: int, names: Sequence[str]) -> None:
    """Traces the model with an example batch and writes the graph to `target`; see `exporters.to_onnx`."""
    import torch

    # A value of 1 is valid for every input: as a token id, as a mask value, and as a token type.
    examples = {name: torch.ones((2, 16), dtype=torch.int64) for name in names}
    # The example batch contains padding, so that a model does not leave its mask out of the trace.
    examples["attention_mask"][1, -1] = 0
    with _eager_attention(model), _logits_only(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns about values that become constants; these values never change
        try:
            torch.onnx.export(
                model,
                (),
                target,
                kwargs=examples,
                input_names=list(names),
                output_names=[OUTPUT],
                dynamic_axes={**dict.fromkeys(names, INPUT_AXES), OUTPUT: output_axes(model)},
                opset_version=opset,
                do_constant_folding=True,
                dynamo=False,
            )
        except (OSError, MemoryError):  # a full disk or memory is no fault of the model
            raise
        except Exception as error:  # the code of any model can fail while it is traced
            cause = first_line(error)
            raise CheckpointError(
                f"PyTorch cannot export {type(model).__name__} to ONNX: {cause}",
                "Pass a model of another architecture.",
            ) from error


@contextlib.contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """While the context is open, the model computes attention by separate operators, which the passes recognise."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@contextlib.contextmanager
def _logits_only(model: PreTrainedModel) -> Iterator[None]:
    """While the context is open, the model returns only the tensor of its logits.

    Without this context, the model would return an output object of the library transformers. Tracing does not accept
    such an object.
    """
    forward = model.forward

    @functools.wraps(forward)
    def logits(*arguments: Any, **inputs: Any) -> Any:
        return forward(*arguments, **inputs).logits

    model.forward = logits
    try:
        yield
    finally:
        del model.forward
