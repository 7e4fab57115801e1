"""Export with PyTorch's tracing exporter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.exporters import INPUT_AXES, output_axes
from toolchain.exporters.preparation import OUTPUT, example_inputs, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_onnx(model: PreTrainedModel, target: Path, opset: int, names: Sequence[str]) -> None:
    """Traces the model with an example batch and writes the graph to `target`; see `exporters.to_onnx`."""
    import torch

    with prepare(model, "PyTorch", "Pass a model of another architecture."):
        torch.onnx.export(
            model,
            (),
            target,
            kwargs=example_inputs(names),
            input_names=list(names),
            output_names=[OUTPUT],
            dynamic_axes={**dict.fromkeys(names, INPUT_AXES), OUTPUT: output_axes(model)},
            opset_version=opset,
            do_constant_folding=True,
            dynamo=False,
        )
