"""Conversion of a PyTorch model in memory to one ONNX file, with optimum's export configuration."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, GraphError

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel


AXES = {0: "batch_size", 1: "sequence_length"}


def to_onnx(model: PreTrainedModel, target: Path, opset: int, names: Sequence[str]) -> None:
    """Exports a model to an ONNX file with dynamic batch size and sequence length.

    Args:
        model: The model to export.
        target: Path of the ONNX file, in an empty folder.
        opset: Version of the ONNX operator set.
        names: Names of the graph's inputs.

    Raises:
        CheckpointError: optimum cannot export the architecture.
        GraphError: The model exceeds 2 GB, the limit of one ONNX file.
    """
    from optimum.exporters.onnx.convert import export
    from optimum.exporters.tasks import TasksManager

    with warnings.catch_warnings():
        # Tracing warns about Python values that become constants, but these values never change.
        warnings.simplefilter("ignore")
        logging.getLogger("optimum").setLevel(logging.ERROR)
        try:
            constructor = TasksManager.get_exporter_config_constructor(
                "onnx", model, task="text-classification", library_name="transformers"
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"optimum cannot export {type(model).__name__} to ONNX: {error}.",
                "Use a model of another architecture.",
            ) from error
        export(model, _with_inputs(constructor(model.config), names), target, opset=opset, do_constant_folding=True)
    if extra_files := sorted(p.name for p in target.parent.iterdir() if p != target):
        raise GraphError(
            f"The model is too large for one ONNX file (2 GB): the exporter also wrote {', '.join(extra_files)}.",
            "Use a smaller model.",
        )
    _remove_zero_additions(target)


def _remove_zero_additions(path: Path) -> None:
    """Removes from an ONNX file the additions of zero that `skipped_blocks.Absent` of a pruned model causes."""
    import onnx_ir as ir

    model = ir.load(path)
    count = 0
    for node in list(model.graph):
        if node.op_type != "Add" or None in node.inputs:
            continue
        terms = [value for value in node.inputs if value is not None and not _is_scalar_zero(value)]
        if len(terms) == 1:
            node.outputs[0].replace_all_uses_with(terms[0])
            model.graph.remove(node, safe=True)
            count += 1
    if count:
        ir.save(model, path)


def _is_scalar_zero(value: ir.Value) -> bool:
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.shape.rank() == 0 and not tensor.numpy().any()


def _with_inputs(config: Any, names: Sequence[str]) -> Any:
    """Sets the inputs of the export configuration to `names`, because optimum always adds token_type_ids for BERT."""
    kind = type(config)
    config.__class__ = type(kind.__name__, (kind,), {"inputs": property(lambda self: dict.fromkeys(names, AXES))})
    return config
