"""Reads and writes files in ORT format, ONNX Runtime's own model format.

If two models are equal, their files in ORT format have equal bytes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain import passes
from toolchain.backends.ort import add_extensions
from toolchain.build.onnx_metadata import set_properties
from toolchain.errors import ShippingError
from toolchain.passes.quantize_linear import headroom
from toolchain.passes.unsigned_weights import unsigned_weights
from toolchain.ship.targets.releases import EXTENSIONS
from toolchain.system.files import temporary_folder

# The level ``extended`` fuses nodes into operators of the CPU provider, in the same way on every processor. The
# optimisation level above ``extended`` chooses memory layouts for the processor of the machine that writes the .ort
# file.
LEVEL = "extended"


def save(source: Path, target: Path) -> None:
    """Optimises a model and saves it in ORT format; the saved model is exact on every processor.

    Products of signed int8 weights can saturate on x86 processors without VNNI. For .onnx files, a session option
    prevents saturation, but this session option does not affect a file in ORT format. If the products of the model can
    saturate, the function therefore stores unsigned int8 weights. Products of unsigned weights never saturate. ONNX
    Runtime writes into the file the domains of all operator libraries that the process has loaded, so a new process
    saves the model.

    Args:
        source: Path of the .onnx file to read.
        target: Path of the .ort file to write.

    Raises:
        ShippingError: ONNX Runtime cannot run the model on the CPU.
    """
    with temporary_folder() as scratch:
        model = passes.read(source)
        if (headroom(model) or 1) < 1:
            unsigned_weights(model)
            set_properties(model, {"session_options": "{}"})
            source = scratch / source.name
            passes.write(model, source)
        command = [sys.executable, "-P", "-m", __spec__.name, str(source), str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        error_lines = run.stderr.strip().splitlines() or ["ONNX Runtime printed no reason"]
        raise ShippingError(
            f"{source.name} cannot be saved in ORT format: {error_lines[-1]}.",
            "Ship a variant for the CPU such as onnx-int8.",
        )
    target.write_bytes(_sort_kernel_types(target.read_bytes()))


def save_in_process(source: str, target: str, level: str = LEVEL, sizes: Mapping[str, int] | None = None) -> None:
    """Saves an .onnx model in ORT format from this process; the bytes of the file differ between processes.

    Args:
        source: Path of the .onnx file to read.
        target: Path of the .ort file to write.
        level: Optimisation level of ONNX Runtime.
        sizes: Fixed size of each free dimension of the model's inputs, by the dimension's name.
    """
    import onnx
    import onnxruntime as ort
    from onnxruntime.tools.onnx_model_utils import get_optimization_level

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if EXTENSIONS in {entry.domain for entry in onnx.load(source, load_external_data=False).opset_import}:
        add_extensions(options)
    options.graph_optimization_level = get_optimization_level(level)
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    options.optimized_model_filepath = target
    options.add_session_config_entry("session.save_model_format", "ORT")
    # The option `session.qdqisint8allowed` keeps signed int8, which ARM multiplies directly. By default, ONNX Runtime
    # converts int8 to uint8 for x86.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _schema_classes() -> Any:
    """Returns the flatbuffer classes of ORT format; importing `ort_format_model` adds their folder to `sys.path`."""
    import onnxruntime.tools.ort_format_model  # noqa: F401
    from ort_flatbuffers_py import fbs

    return fbs


def read_root(content: bytes) -> Any:
    """Returns the root table of a file in ORT format, which is a flatbuffer."""
    return _schema_classes().InferenceSession.InferenceSession.GetRootAsInferenceSession(content, 0)


def _sort_kernel_types(content: bytes) -> bytes:
    """Returns the content of an .ort file with a sorted table of kernel types, so that equal models give equal bytes.

    ONNX Runtime writes the table of kernel types in the order of a hash table, whose seed differs in every process. A
    flatbuffer grows from its end to its start, and ONNX Runtime writes the table of kernel types last. In an .ort file,
    the model comes after the table of kernel types. The function copies the bytes of the model, which are equal in
    every process.
    """
    import flatbuffers

    session = read_root(content)
    model = session.Model()._tab
    vtable = model.Pos - int.from_bytes(content[model.Pos : model.Pos + 4], "little", signed=True)
    model_bytes = content[min(model.Pos, vtable) :]
    builder = flatbuffers.Builder(len(model_bytes))
    builder.Bytes[:] = model_bytes
    builder.head = type(builder.head)(0)
    builder.minalign = 8
    resolver = _write_resolver(builder, session.KernelTypeStrResolver())
    version = builder.CreateString(session.OrtVersion().decode())
    part = _schema_classes().InferenceSession
    part.Start(builder)
    part.AddOrtVersion(builder, version)
    part.AddModel(builder, len(content) - model.Pos)
    part.AddKernelTypeStrResolver(builder, resolver)
    builder.Finish(part.End(builder), file_identifier=content[4:8])
    return bytes(builder.Output())


def _write_resolver(builder: Any, table: Any) -> int:
    """Writes a sorted copy of the table of kernel types, which maps operators' type parameters to inputs and outputs.

    Returns:
        The offset of the sorted table of kernel types in the flatbuffer.
    """
    fbs = _schema_classes()
    operators = []
    for operator in _sort_entries(table.OpKernelTypeStrArgs, table.OpKernelTypeStrArgsLength(), lambda o: o.OpId()):
        types = []
        names = _sort_entries(
            operator.KernelTypeStrArgs, operator.KernelTypeStrArgsLength(), lambda n: n.KernelTypeStr()
        )
        for name in names:
            places = []
            for place in _sort_entries(name.Args, name.ArgsLength(), lambda p: (p.ArgType(), p.Index())):
                fbs.ArgTypeAndIndex.Start(builder)
                fbs.ArgTypeAndIndex.AddArgType(builder, place.ArgType())
                fbs.ArgTypeAndIndex.AddIndex(builder, place.Index())
                places.append(fbs.ArgTypeAndIndex.End(builder))
            name_offset, places_offset = builder.CreateString(name.KernelTypeStr().decode()), _vector(builder, places)
            fbs.KernelTypeStrArgsEntry.Start(builder)
            fbs.KernelTypeStrArgsEntry.AddKernelTypeStr(builder, name_offset)
            fbs.KernelTypeStrArgsEntry.AddArgs(builder, places_offset)
            types.append(fbs.KernelTypeStrArgsEntry.End(builder))
        id_offset, types_offset = builder.CreateString(operator.OpId().decode()), _vector(builder, types)
        fbs.OpIdKernelTypeStrArgsEntry.Start(builder)
        fbs.OpIdKernelTypeStrArgsEntry.AddOpId(builder, id_offset)
        fbs.OpIdKernelTypeStrArgsEntry.AddKernelTypeStrArgs(builder, types_offset)
        operators.append(fbs.OpIdKernelTypeStrArgsEntry.End(builder))
    table_offset = _vector(builder, operators)
    fbs.KernelTypeStrResolver.Start(builder)
    fbs.KernelTypeStrResolver.AddOpKernelTypeStrArgs(builder, table_offset)
    end: int = fbs.KernelTypeStrResolver.End(builder)
    return end


def _sort_entries(get: Any, length: int, key: Any) -> list[Any]:
    return sorted((get(index) for index in range(length)), key=key)


def _vector(builder: Any, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    end: int = builder.EndVector()
    return end


def shapes(graph: Any) -> dict[str, list[int | str | None]]:
    """Returns the dimensions of each value of the graph, by the value's name; omits values of unknown rank.

    A dimension is a number, a name, or None if it is unknown.
    """
    fbs = _schema_classes()
    dimensions_of = {}
    for value in (graph.NodeArgs(index) for index in range(graph.NodeArgsLength())):
        kind = value.Type()
        if kind is None or kind.ValueType() != fbs.TypeInfoValue.TypeInfoValue.tensor_type:
            continue
        tensor = fbs.TensorTypeAndShape.TensorTypeAndShape()
        tensor.Init(kind.Value().Bytes, kind.Value().Pos)
        if tensor.Shape() is not None:
            dimensions = map(tensor.Shape().Dim, range(tensor.Shape().DimLength()))
            dimensions_of[value.Name().decode()] = [_size(each.Value()) for each in dimensions]
    return dimensions_of


def _size(value: Any) -> int | str | None:
    kinds = _schema_classes().DimensionValueType.DimensionValueType
    if value is None or value.DimType() == kinds.UNKNOWN:
        return None
    return int(value.DimValue()) if value.DimType() == kinds.VALUE else str(value.DimParam().decode())


def version(path: Path) -> int:
    """Returns the version of the ORT format of a file."""
    return int(read_root(path.read_bytes()).OrtVersion())


if __name__ == "__main__":
    save_in_process(sys.argv[1], sys.argv[2])
