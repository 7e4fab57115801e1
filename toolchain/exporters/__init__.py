"""Exporters, which convert a PyTorch model in memory to one ONNX file.

``optimum`` uses the export configurations of optimum-onnx. ``torch`` traces any model with PyTorch's tracing exporter,
which PyTorch deprecates. ``dynamo`` uses PyTorch's newer exporter, which is built on ``torch.export``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.data.labels import TOKEN_HEAD
from toolchain.errors import CheckpointError, GraphError, SettingsError
from toolchain.models.architectures import UNEXPORTABLE
from toolchain.system import extras

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

# Maps each exporter to the packages that it needs in addition to those that the toolchain always needs. The toolchain
# needs PyTorch of some release; the exporter dynamo was tested with the release that its entry names.
EXPORTERS = {"optimum": ("optimum-onnx",), "torch": (), "dynamo": ("torch>=2.13", "onnxscript")}
LOWEST_OPSETS = {"dynamo": 18}  # Maps an exporter to the lowest opset that it writes, if it does not write opset 17.
INPUT_AXES = {0: "batch_size", 1: "sequence_length"}


def output_axes(model: PreTrainedModel) -> dict[int, str]:
    """Returns the dynamic axes of the logits; a token classifier gives logits for each token."""
    is_token_classifier = type(model).__name__.endswith(TOKEN_HEAD)
    return INPUT_AXES if is_token_classifier else {0: INPUT_AXES[0]}


def default_exporter() -> str:
    """Returns ``optimum`` if optimum-onnx is installed and fits the installed transformers, otherwise ``torch``."""
    return "torch" if unmet_requirement("optimum") else "optimum"


def unmet_requirement(exporter: str) -> str:
    """Returns the reason why an exporter of `EXPORTERS` is unavailable; empty if the exporter is available."""
    return next(filter(None, map(extras.unmet_requirement, EXPORTERS[exporter])), "")


def require_exporter(exporter: str, opset: int) -> None:
    """Checks that an exporter of `EXPORTERS` can work with the installed packages and can write the opset.

    Raises:
        SettingsError: A package is missing, or another release of it is needed, or the opset is too low.
    """
    if cause := unmet_requirement(exporter):
        hint = {
            "optimum": "Use --exporter torch, or install the set of packages with optimum: make install SET=optimum.",
            "dynamo": f"Use --exporter torch. {extras.install_hint('dynamo')}",
        }
        raise SettingsError(f"--exporter {exporter} is unavailable: {cause}.", hint.get(exporter, ""))
    if opset < LOWEST_OPSETS.get(exporter, opset):
        raise SettingsError(
            f"--exporter {exporter} cannot write opset {opset}.",
            f"Use --exporter torch, or --opset {LOWEST_OPSETS[exporter]} or higher.",
        )


def to_onnx(
    model: PreTrainedModel, target: Path, opset: int, names: Sequence[str], exporter: str | None = None
) -> None:
    """Exports a model to an ONNX file with standard operators, dynamic batch size and dynamic sequence length.

    Args:
        model: The model to export, in eval mode.
        target: Path of the ONNX file, in an empty folder.
        opset: Version of the ONNX operator set.
        names: Names of the graph's inputs.
        exporter: An exporter of `EXPORTERS`; None for `default_exporter`.

    Raises:
        SettingsError: The exporter is unavailable, or cannot write the opset.
        CheckpointError: The exporter, or every exporter, cannot export the architecture.
        GraphError: The model exceeds 2 GB, the limit of one ONNX file.
    """
    exporter = exporter or default_exporter()
    require_exporter(exporter, opset)
    if reason := UNEXPORTABLE.get(model.config.model_type):
        raise CheckpointError(
            reason.format(model=type(model).__name__),
            "Build variants of PyTorch (toolchain quantize --backend torch), or use a model of another architecture.",
        )
    write_onnx = importlib.import_module(f"toolchain.exporters.{exporter}_exporter").write_onnx
    write_onnx(model, target, opset, names)
    if extra_files := sorted(p.name for p in target.parent.iterdir() if p != target):
        raise GraphError(
            f"The model is too large for one ONNX file (2 GB): the exporter also wrote {', '.join(extra_files)}.",
            "Use a smaller model.",
        )
    _remove_zero_additions(target)


def _remove_zero_additions(path: Path) -> None:
    """Removes additions of zero from an ONNX file; `skipped_blocks.Absent` causes such additions in pruned models."""
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
