"""Writes models for phones.

The module writes an .onnx file for an older ONNX Runtime, and the same model in ORT format. The module writes the
configuration of a reduced build of ONNX Runtime, and runs ONNX Runtime's checker for the accelerators of phones.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts.steps import Export
from toolchain.errors import ShippingError
from toolchain.ship.targets import ort_format
from toolchain.ship.targets.releases import (
    MICROSOFT,
    MICROSOFT_OPSET,
    RELEASES,
    STANDARD,
    Use,
    find_unsupported,
    oldest_reading_release,
)
from toolchain.ship.targets.uses import oldest_release, read_needs
from toolchain.system.files import temporary_folder
from toolchain.system.quiet import hide_logs

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

CONFIGURATIONS = {"required_operators.config": False, "required_operators_and_types.config": True}
# Tensor type → the IR version that introduced it (the versioning section of ONNX's specification).
IR_OF_TYPE = {
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), 9),
    **dict.fromkeys(("INT4", "UINT4"), 10),
    "FLOAT4E2M1": 11,
    "FLOAT8E8M0": 12,
    **dict.fromkeys(("INT2", "UINT2"), 13),
}
_COREML = {
    "CoreML, neural network": "coreml_supported_neuralnetwork_ops.md",
    "CoreML, ML program": "coreml_supported_mlprogram_ops.md",
}


def make(source: Path, target: Path, release: str, core: Path) -> dict[str, Any]:
    """Writes the model for an older ONNX Runtime twice: as an .onnx file, and beside it as a file in ORT format.

    Args:
        source: The .onnx file of the model.
        target: The .onnx file to write. The file in ORT format has the suffix ``.ort``.
        release: Release of ONNX Runtime that must run the .onnx file and the .ort file.
        core: The .onnx file of the model without a tokenizer, for the accelerator checker.

    Returns:
        The entries ``ort``, ``oldest_release`` and ``providers`` of bundle.json.

    Raises:
        ShippingError: The release cannot read the model, lacks an operator of the model, or computes an operator
            incorrectly.
    """
    import onnxruntime as ort

    lower(source, target, release)
    file = target.with_suffix(".ort")
    ort_format.save(target, file)
    needs = read_needs(target), read_needs(file)
    version = needs[1].ort_format
    if version > RELEASES[release].ort_format:
        raise ShippingError(
            f"ONNX Runtime {release} reads version {RELEASES[release].ort_format} of the ORT format, but the installed "
            f"ONNX Runtime writes version {version}.",
            f"Ship with --ort-mobile {oldest_reading_release(ort_format=version)} or newer.",
        )
    first = oldest_release(*needs)
    _check_uses(needs[0].uses | needs[1].uses, target.stem, release, first)
    return {
        "ort": {
            "file": file.name,
            "bytes": file.stat().st_size,
            "format": version,
            "optimization_level": ort_format.LEVEL,
            "saved_by": ort.__version__,
        },
        "oldest_release": first,
        "providers": providers(core),
    }


def _check_uses(uses: Collection[Use], name: str, release: str, first: str | None) -> None:
    """Raises `ShippingError` for operators that `release` lacks or computes incorrectly.

    Args:
        first: The oldest release of ONNX Runtime that runs the model correctly; None if no release does.
    """
    unsupported = find_unsupported(release, uses)
    missing = [use for use in unsupported if not use.attention_kind]
    faulty = [use for use in unsupported if use.attention_kind]
    hint = f"Ship a variant with standard operators of opset {Export.opset}, such as onnx-std."
    if first:
        hint += f" Or ship {name} with --ort-mobile {first} or newer."
    if missing:
        raise ShippingError(
            f"{name} uses {', '.join(map(str, missing))}, which ONNX Runtime {release} lacks.",
            hint,
        )
    if faulty:
        raise ShippingError(
            f"{name} uses {', '.join(map(str, faulty))}, but ONNX Runtime {release} refuses padded batches with such "
            "attention, or computes them incorrectly.",
            hint,
        )


def lower(source: Path, target: Path, release: str) -> None:
    """Copies the .onnx file and lowers its IR version and operator sets to the limits of `release`.

    If the release can read the original file, the copy has the same bytes.

    Raises:
        ShippingError: The release does not support a tensor type or an operator set of the model; or the onnx package
            cannot convert the model to the newest opset that the release reads.
    """
    import onnx
    import onnx_ir as ir

    limit = RELEASES[release]
    model = onnx.load(source)
    _check_types(ir.from_proto(model), target.stem, release)
    used = {STANDARD, *(node.domain for node in _nodes(model))}
    # ONNX Runtime refuses an operator set that is too new, even if no node uses the set.
    unused = [entry for entry in model.opset_import if entry.domain not in used]
    opset = {entry.domain: entry.version for entry in model.opset_import if entry.domain in used}
    if opset.get(MICROSOFT, MICROSOFT_OPSET) > MICROSOFT_OPSET:
        raise ShippingError(
            f"{target.stem} uses opset {opset[MICROSOFT]} of {MICROSOFT}, but ONNX Runtime {release} has opset "
            f"{MICROSOFT_OPSET}.",
            "Build it again.",
        )
    is_newer = opset.get(STANDARD, 0) > limit.opset
    if model.ir_version <= limit.ir_version and not is_newer and not unused:
        shutil.copyfile(source, target)
        return
    for entry in unused:
        model.opset_import.remove(entry)
    if is_newer:
        model = _convert_opset(model, limit.opset, target.stem, release)
    model.ir_version = min(model.ir_version, limit.ir_version)
    onnx.save(model, target)


def _check_types(model: ir.Model, name: str, release: str) -> None:
    limit = RELEASES[release].ir_version
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    unsupported = {tensor.dtype.name for tensor in tensors if tensor and IR_OF_TYPE.get(tensor.dtype.name, 0) > limit}
    if unsupported:
        version = max(IR_OF_TYPE[each] for each in unsupported)
        raise ShippingError(
            f"{name} holds tensors of type {', '.join(sorted(unsupported))}, which need IR version {version}. ONNX "
            f"Runtime {release} reads IR versions up to {limit}.",
            f"Ship {name} with --ort-mobile {oldest_reading_release(version)} or newer, or ship another variant such "
            "as onnx-int8.",
        )


def _convert_opset(model: onnx.ModelProto, opset: int, name: str, release: str) -> onnx.ModelProto:
    """Returns the model in a lower opset of standard operators.

    For many operators, the ONNX specification holds an ONNX function: a small graph of other operators that computes
    the same result. If the lower opset lacks an operator, the nodes of the operator's ONNX function replace the
    operator. If an operator has a different signature in the lower opset, the onnx package converts the operator. An
    operator whose signature does not change keeps its meaning in the lower opset.

    Raises:
        ShippingError: The lower opset lacks an operator that has no ONNX function; or the onnx package cannot convert
            an operator to the lower opset.
    """
    from onnx import checker, inliner, version_converter

    cause: Exception | None = None
    unconverted = _newer_operators(model, opset)
    try:
        if unconverted:
            names = [(STANDARD, operator) for operator in unconverted]
            model = inliner.inline_selected_functions(model, names, inline_schema_functions=True)
            unconverted = _newer_operators(model, opset)
        # For some operators, the only change in the lower opset is a smaller number of supported tensor types. The onnx
        # package cannot convert such an operator, and no conversion is needed. The loop therefore lowers the opset by
        # one at a time, and calls the onnx package only if the inputs, outputs or attributes of an operator change.
        for version in range(_opset(model).version - 1, opset - 1, -1) if not unconverted else ():
            if unconverted := _changed_operators(model, version):
                model = version_converter.convert_version(model, version)
                checker.check_model(model)  # some conversions keep attributes that the lower opset lacks
                unconverted = []
            else:
                _opset(model).version = version
    except (RuntimeError, checker.ValidationError) as error:  # C++ code of onnx raises RuntimeError and ValidationError
        cause = error
    if unconverted:
        raise ShippingError(
            f"{name} uses {', '.join(unconverted)} of a newer opset than {opset}, the newest opset that ONNX "
            f"Runtime {release} reads. The onnx package cannot convert the model to opset {opset}.",
            f"Export the model with `toolchain export --opset {min(opset, Export.opset)}`, or ship with a newer "
            "--ort-mobile.",
        ) from cause
    return model


def _opset(model: onnx.ModelProto) -> onnx.OperatorSetIdProto:
    """Returns the model's `opset_import` entry for the standard operators."""
    opset: onnx.OperatorSetIdProto = next(entry for entry in model.opset_import if entry.domain == STANDARD)
    return opset


def _nodes(model: onnx.ModelProto) -> Iterator[ir.Node]:
    """Yields all nodes of the graph and of its subgraphs, such as branches and loop bodies."""
    import onnx_ir as ir

    return iter(ir.from_proto(model).graph.all_nodes())


def _standard_operators(model: onnx.ModelProto) -> list[str]:
    return sorted({node.op_type for node in _nodes(model) if node.domain == STANDARD})


def _newer_operators(model: onnx.ModelProto, opset: int) -> list[str]:
    """Returns the standard operators of the model that `opset` lacks."""
    from onnx import defs

    return [operator for operator in _standard_operators(model) if not defs.has(operator, opset)]


def _changed_operators(model: onnx.ModelProto, opset: int) -> list[str]:
    """Returns the model's standard operators whose inputs, outputs or attributes change in `opset`.

    The function ignores changes in the types of inputs and outputs. If an operator supports fewer types in `opset`,
    ONNX Runtime reports a missing type when it loads the file.
    """
    from onnx import defs

    def signature(operator: str, version: int) -> Any:
        schema = defs.get_schema(operator, version, STANDARD)
        parameters = [[(value.name, value.option) for value in side] for side in (schema.inputs, schema.outputs)]
        attributes = {
            n: (a.type, a.required, a.default_value.SerializeToString()) for n, a in schema.attributes.items()
        }
        return parameters, attributes

    return [
        operator
        for operator in _standard_operators(model)
        if signature(operator, _opset(model).version) != signature(operator, opset)
    ]


def configure(models: Sequence[Path]) -> None:
    """Writes the configurations of a reduced build of ONNX Runtime beside the models.

    One configuration lists only the operators of the models. A second configuration lists the operators with the types
    of their inputs and outputs.

    Args:
        models: Files in ORT format, all in one folder.
    """
    from onnxruntime.tools.ort_format_model import create_config_from_models

    folder = models[0].parent
    for name, with_types in CONFIGURATIONS.items():
        with hide_logs():
            create_config_from_models(models, folder / name, with_types)
        lines = (folder / name).read_text(encoding="utf-8").replace(f"{folder}/", "")
        (folder / name).write_text(lines, encoding="utf-8")


def providers(path: Path) -> list[dict[str, Any]]:
    """Runs the accelerator checker of the installed ONNX Runtime on a model.

    The accelerator checker looks only at operators and shapes; it does not run the model. The accelerator checker does
    not cover XNNPACK, which runs on the CPU.

    Returns:
        Two entries for each accelerator: one with dynamic shapes and one with fixed shapes. Each entry counts all
        nodes, the nodes that the accelerator supports, and the partitions of the graph. Each entry says whether the
        accelerator is worth trying.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker as checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    with temporary_folder() as folder, hide_logs():
        basic = folder / path.name
        optimize_model(path, basic, use_external_initializers=True)
        model = ModelProtoWithShapeInfo(basic).model_with_shape_info
        entries = []
        for fixed in (False, True):
            parts = {"NNAPI": checker.check_nnapi_partitions(model, not fixed)} | {
                name: checker.check_coreml_partitions(model, not fixed, file) for name, file in _COREML.items()
            }
            entries += [
                {
                    "provider": name,
                    "fixed_shapes": fixed,
                    "nodes": part.num_nodes,
                    "taken": part.num_supported_nodes,
                    "partitions": part.num_partitions,
                    "worth_trying": part.suitability().name.lower(),
                }
                for name, part in parts.items()
            ]
    return entries
