"""What a file has, and so which releases of ONNX Runtime read it, run it, and answer padded batches of it right."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends.ort import failures
from toolchain.errors import GraphError
from toolchain.ship.targets import ort_format
from toolchain.ship.targets.releases import MICROSOFT, ORDER, STANDARD, Use, oldest, oldest_reading

if TYPE_CHECKING:
    import onnx

Shape = Sequence[int | str | None]  # a dimension is a number, a name, or not known
MASK_INDEX = {"Attention": 3, "QAttention": 5}  # its place among the inputs
# The free dimensions of a file's inputs are given these sizes, so that ONNX Runtime can infer every shape. A prime is
# no other size by chance: not one, and no number of heads.
SIZES = (11, 13, 17, 19, 23, 29)


@dataclass(frozen=True)
class Needs:
    """What a file needs: an .onnx file has an IR version and an opset, one in ORT format the version of that."""

    uses: frozenset[Use]
    ir_version: int = 0
    opset: int = 0
    ort_format: int = 0

    def oldest(self) -> str | None:
        """The first release that meets all of them; None where none does."""
        reading = oldest_reading(self.ir_version, self.opset, self.ort_format)
        having = oldest(self.uses)
        return max(reading, having, key=ORDER.index) if reading and having else None


def oldest_release(*needs: Needs) -> str | None:
    """The first release of ONNX Runtime that reads and runs all of the files on a CPU, and from which on every release
    answers padded batches of them right; None where none is known to."""
    found = [each.oldest() for each in needs]
    return None if None in found else max((each for each in found if each), key=ORDER.index, default=ORDER[0])


def read_needs(path: Path) -> Needs:
    """What an .onnx file, or one in ORT format, needs. Its shapes are inferred by the ONNX Runtime installed here.

    Raises:
        GraphError: ONNX Runtime cannot load the file here.
    """
    if path.suffix == ".ort":
        content = path.read_bytes()
        return Needs(frozenset(_stored_uses(content)), ort_format=ort_format.version(path))
    import onnx

    model = onnx.load(path, load_external_data=False)
    opset = max((entry.version for entry in model.opset_import if entry.domain == STANDARD), default=0)
    return Needs(frozenset({*_uses(model), *_attentions(path, model)}), model.ir_version, opset)


def _uses(model: onnx.ModelProto) -> Iterator[Use]:
    """Operators, attributes and inputs that are given."""
    import onnx_ir as ir

    for node in ir.from_proto(model).graph.all_nodes():
        given = [f"input {index}" for index, value in enumerate(node.inputs) if value is not None]
        yield from (Use(node.domain, node.op_type, what) for what in ("", *node.attributes, *given))


def _attentions(path: Path, model: onnx.ModelProto) -> set[Use]:
    """Kinds of attention in an .onnx file, which need not say the shape of each value: a file in ORT format does."""
    free = [dim.dim_param for each in model.graph.input for dim in each.type.tensor_type.shape.dim if dim.dim_param]
    sizes = dict(zip(dict.fromkeys(free), SIZES, strict=False))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "shapes.ort"
        try:
            ort_format.save_here(str(path), str(saved), "disable", sizes)
        except failures() as error:
            raise GraphError(f"{path} is no model ONNX Runtime can load: {error}.", "Build it again.") from error
        return {use for use in _stored_uses(saved.read_bytes()) if use.question}


def _stored_uses(content: bytes) -> Iterator[Use]:
    """Operators, attributes, inputs that are given and kinds of attention of a file in ORT format; attributes that were
    left to their default stand in it as well."""
    return _graph_uses(ort_format.read_root(content).Model().Graph())


def _graph_uses(graph: Any) -> Iterator[Use]:
    shapes = ort_format.shapes(graph)
    for node in (graph.Nodes(index) for index in range(graph.NodesLength())):
        domain, operator = node.Domain().decode(), node.OpType().decode()
        domain = STANDARD if domain == "ai.onnx" else domain
        attributes = {each.Name().decode(): each for each in map(node.Attributes, range(node.AttributesLength()))}
        inputs = [node.Inputs(index).decode() for index in range(node.InputsLength())]
        given = [f"input {index}" for index, name in enumerate(inputs) if name]
        yield from (Use(domain, operator, what) for what in ("", *attributes, *given))
        if domain == MICROSOFT:
            heads = attributes["num_heads"].I() if "num_heads" in attributes else 0
            its_shapes = {index: shapes.get(name, ()) for index, name in enumerate(inputs) if name}
            yield from (Use(domain, operator, kind) for kind in attention_kinds(operator, its_shapes, heads))
        for attribute in attributes.values():
            if attribute.G():
                yield from _graph_uses(attribute.G())


def attention_kinds(operator: str, shapes: Mapping[int, Shape], heads: int) -> Iterator[str]:
    """The kinds of attention that `releases.ANSWERS` tells apart.

    Args:
        shapes: of the inputs that are given, by their place; empty where the rank is not known.
    """
    if MASK_INDEX.get(operator, -1) in shapes:
        yield "mask_index"
    if operator != "MultiHeadAttention":
        return
    if 4 in shapes:
        queries, keys = (_tokens(shapes.get(place, ())) for place in (0, 1))
        longer = 1 in shapes and isinstance(queries, int) and queries != keys
        yield "key_padding_mask longer than the query" if longer else "key_padding_mask"
    if 5 in shapes:
        yield "attention_bias"
        bias, query = shapes[5], shapes.get(0, ())
        if len(bias) == 4 and bias[1] == 1 and heads > 1:
            yield "attention_bias of one head"
        if len(bias) == 4 and bias[0] == 1 and query[:1] != bias[:1]:
            yield "attention_bias of one sentence"


def _tokens(shape: Shape) -> int | str | None:
    """[batch, tokens, width], [batch, tokens, heads, 3, size] and the like, or [batch, heads, tokens, size]."""
    place = 2 if len(shape) == 4 else 1
    return shape[place] if len(shape) > place else None
