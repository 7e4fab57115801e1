"""Finds the features that a model file uses, and the oldest release of ONNX Runtime that runs the file correctly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends.ort import failures
from toolchain.errors import GraphError
from toolchain.ship.targets import ort_format
from toolchain.ship.targets.releases import (
    MICROSOFT,
    ORDER,
    STANDARD,
    Use,
    oldest_reading_release,
    oldest_supporting_release,
)
from toolchain.system.files import temporary_folder

if TYPE_CHECKING:
    import onnx

Shape = Sequence[int | str | None]  # A dimension is a number, a name, or None if it is unknown.
MASK_INDEX = {"Attention": 3, "QAttention": 5}  # Maps an operator to the index of its input ``mask_index``.
# Sizes for the free dimensions of a model's inputs, so that ONNX Runtime can infer every shape. The sizes are primes,
# because primes rarely equal a fixed size of the model, such as 1 or the number of heads.
SIZES = (11, 13, 17, 19, 23, 29)


@dataclass(frozen=True)
class Needs:
    """The requirements of a model file: the features and versions that ONNX Runtime must support.

    Attributes:
        uses: Features that the file uses.
        ir_version: IR version of an .onnx file; 0 for ORT format.
        opset: Opset of standard operators of an .onnx file; 0 for ORT format.
        ort_format: Version of the ORT format; 0 for an .onnx file.
    """

    uses: frozenset[Use]
    ir_version: int = 0
    opset: int = 0
    ort_format: int = 0

    def oldest_release(self) -> str | None:
        """Returns the first ONNX Runtime release that meets all requirements; None if no known release does."""
        reader = oldest_reading_release(self.ir_version, self.opset, self.ort_format)
        runner = oldest_supporting_release(self.uses)
        return max(reader, runner, key=ORDER.index) if reader and runner else None


def oldest_release(*needs: Needs) -> str | None:
    """Returns the first ONNX Runtime release that runs all model files on a CPU; None if no known release does.

    The returned release and all later releases compute padded batches correctly.
    """
    releases = [each.oldest_release() for each in needs]
    return None if None in releases else max((each for each in releases if each), key=ORDER.index, default=ORDER[0])


def read_needs(path: Path) -> Needs:
    """Returns the requirements of an .onnx file or of a file in ORT format.

    The installed ONNX Runtime infers the shapes of an .onnx file.

    Raises:
        GraphError: The installed ONNX Runtime cannot load the file.
    """
    if path.suffix == ".ort":
        content = path.read_bytes()
        return Needs(frozenset(_stored_uses(content)), ort_format=ort_format.version(path))
    import onnx

    model = onnx.load(path, load_external_data=False)
    opset = max((entry.version for entry in model.opset_import if entry.domain == STANDARD), default=0)
    return Needs(frozenset({*_graph_features(model), *_attention_kinds(path, model)}), model.ir_version, opset)


def _graph_features(model: onnx.ModelProto) -> Iterator[Use]:
    """Yields the operators of an .onnx file, with their attributes and their non-empty inputs."""
    import onnx_ir as ir

    for node in ir.from_proto(model).graph.all_nodes():
        inputs = [f"input {index}" for index, value in enumerate(node.inputs) if value is not None]
        yield from (Use(node.domain, node.op_type, trait) for trait in ("", *node.attributes, *inputs))


def _attention_kinds(path: Path, model: onnx.ModelProto) -> set[Use]:
    """Returns the kinds of attention in an .onnx file; reads all shapes from a temporary copy in ORT format."""
    free = [dim.dim_param for each in model.graph.input for dim in each.type.tensor_type.shape.dim if dim.dim_param]
    sizes = dict(zip(dict.fromkeys(free), SIZES, strict=False))
    with temporary_folder() as folder:
        saved = folder / "shapes.ort"
        try:
            ort_format.save_in_process(str(path), str(saved), "disable", sizes)
        except failures() as error:
            raise GraphError(f"ONNX Runtime cannot load the model {path}: {error}.", "Build it again.") from error
        return {use for use in _stored_uses(saved.read_bytes()) if use.attention_kind}


def _stored_uses(content: bytes) -> Iterator[Use]:
    """Yields the operators, attributes, inputs and kinds of attention of a file in ORT format.

    The function omits inputs that a node leaves empty. A file in ORT format stores every attribute of a node, even if
    its value is the default.
    """
    return _graph_uses(ort_format.read_root(content).Model().Graph())


def _graph_uses(graph: Any) -> Iterator[Use]:
    shapes = ort_format.shapes(graph)
    for node in (graph.Nodes(index) for index in range(graph.NodesLength())):
        domain, operator = node.Domain().decode(), node.OpType().decode()
        domain = STANDARD if domain == "ai.onnx" else domain
        attributes = {each.Name().decode(): each for each in map(node.Attributes, range(node.AttributesLength()))}
        inputs = [node.Inputs(index).decode() for index in range(node.InputsLength())]
        places = [f"input {index}" for index, name in enumerate(inputs) if name]
        yield from (Use(domain, operator, trait) for trait in ("", *attributes, *places))
        if domain == MICROSOFT:
            heads = attributes["num_heads"].I() if "num_heads" in attributes else 0
            input_shapes = {index: shapes.get(name, ()) for index, name in enumerate(inputs) if name}
            yield from (Use(domain, operator, kind) for kind in attention_kinds(operator, input_shapes, heads))
        for attribute in attributes.values():
            if attribute.G():
                yield from _graph_uses(attribute.G())


def attention_kinds(operator: str, shapes: Mapping[int, Shape], heads: int) -> Iterator[str]:
    """Yields the kinds of attention that a node uses, named as in the keys of `releases.ATTENTION_STATES`.

    Args:
        operator: Name of the operator.
        shapes: Shapes of the node's non-empty inputs, by input index; the shape is empty if the rank is unknown.
        heads: Number of heads.
    """
    if MASK_INDEX.get(operator, -1) in shapes:
        yield "mask_index"
    if operator != "MultiHeadAttention":
        return
    if 4 in shapes:
        queries, keys = (_token_count(shapes.get(place, ())) for place in (0, 1))
        longer = 1 in shapes and isinstance(queries, int) and queries != keys
        yield "key_padding_mask longer than the query" if longer else "key_padding_mask"
    if 5 in shapes:
        yield "attention_bias"
        bias, query = shapes[5], shapes.get(0, ())
        if len(bias) == 4 and bias[1] == 1 and heads > 1:
            yield "attention_bias of one head"
        if len(bias) == 4 and bias[0] == 1 and query[:1] != bias[:1]:
            yield "attention_bias of one sentence"


def _token_count(shape: Shape) -> int | str | None:
    """Returns the number of tokens in a shape, which is [batch, heads, tokens, size] or [batch, tokens, ...]."""
    place = 2 if len(shape) == 4 else 1
    return shape[place] if len(shape) > place else None
