"""Helpers that both exporters of PyTorch share: example inputs, a model ready for export, and errors of PyTorch."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, first_line
from toolchain.system.quiet import hide_logs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

OUTPUT = "logits"


def example_inputs(names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns a batch of two rows with 16 tokens, by the name of the input; the last token of a row is padding."""
    import torch

    # A value of 1 is valid for every input: as a token id, as a mask value, and as a token type.
    examples = {name: torch.ones((2, 16), dtype=torch.int64) for name in names}
    # The example batch contains padding, so that a model does not leave its mask out of the graph.
    examples["attention_mask"][1, -1] = 0
    return examples


@contextlib.contextmanager
def prepare(model: PreTrainedModel, exporter: str, hint: str) -> Iterator[None]:
    """Prepares the model for an export while the context is open.

    The model computes attention by separate operators, and returns only its logits. PyTorch computes no gradients, and
    reports no warnings.

    Args:
        model: The model to export.
        exporter: Name of the exporter in an error.
        hint: Hint of an error.

    Raises:
        CheckpointError: The code in the context fails.
    """
    import torch

    with _eager_attention(model), _logits_only(model), warnings.catch_warnings(), hide_logs(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns about values that become constants; these values never change
        try:
            yield
        except (OSError, MemoryError):  # a full disk or memory is no fault of the model
            raise
        except Exception as error:  # the code of any model can fail while it is exported
            # The message of the dynamo exporter's own error is advice for developers; its cause states the problem.
            is_advice = isinstance(error, torch.onnx.OnnxExporterError) and error.__cause__ is not None
            cause = first_line(error.__cause__ if is_advice and error.__cause__ else error)
            raise CheckpointError(f"{exporter} cannot export {type(model).__name__} to ONNX: {cause}", hint) from error


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

    Without this context, the model would return an output object of the library transformers. The exporters would not
    accept such an object, or would give the graph several outputs.
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
