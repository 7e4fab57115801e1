"""Passes, which rewrite ONNX graphs; `rewrite` applies them by name, in order.

A pass takes the model and a `Context`, and returns the rewritten model and the number of rewrites. A pass may change
its input model in place or build a new model. A pass that finds nothing to rewrite returns the unchanged model and the
number 0. If a pass cannot rewrite a graph correctly, it leaves the graph unchanged or raises `GraphError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts.manifest import TensorSpec
from toolchain.errors import GraphError, first_line
from toolchain.passes.attention import build_qattention
from toolchain.passes.exits import ExitHead, exits
from toolchain.passes.first_query import first_query
from toolchain.passes.first_token import first_token
from toolchain.passes.fuse import fuse
from toolchain.passes.half import half
from toolchain.passes.int8 import LARGEST_OF_7_BITS, run_time_codes
from toolchain.passes.padding import padding
from toolchain.passes.quantize_blocks import build_int4_product, look_up_int4_rows
from toolchain.passes.quantize_embedding import look_up_int8_rows, quantize_embedding
from toolchain.passes.quantize_linear import build_fused_product, build_standard_product, headroom, quantize_linear
from toolchain.passes.quantize_static import Activation, quantize_static, smooth
from toolchain.passes.quantize_static import build_fused_static_product as fused_static
from toolchain.passes.quantize_static import build_standard_static_product as standard_static
from toolchain.passes.residual_sum import residual_sum
from toolchain.passes.split_attention import split_attention
from toolchain.passes.trim_vocabulary import trim_vocabulary

if TYPE_CHECKING:
    import onnx_ir as ir

MS_DOMAIN = "com.microsoft"
LOOK_UPS = ("Gather", "GatherBlockQuantized")


@dataclass(frozen=True)
class Context:
    """Facts about the model that the passes need and cannot always read from the graph.

    Attributes:
        heads: Number of attention heads of a layer, which ONNX Runtime's fusions cannot always find in the graph.
        width: Width of the encoder, which ONNX Runtime's fusions cannot always find in the graph.
        keep: Names of the linear layers that stay fp32, as `quantize_linear.layers_of` returns them.
        activations: Maps the name of each linear layer's input to the fixed quantisation of that input. Calibration
            chose the quantisation: a scale, a zero point, and, with SmoothQuant, one factor for each channel.
        tokens: Token ids that stay in a trimmed vocabulary, ascending.
        exits: The heads of the exits, by ascending layer.
    """

    heads: int
    width: int
    keep: frozenset[str] = frozenset()
    activations: Mapping[str, Activation] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    exits: tuple[ExitHead, ...] = ()


Pass = Callable[["ir.Model", Context], "tuple[ir.Model, int]"]

PASSES: dict[str, Pass] = {
    "fuse": fuse,
    "fuse-cuda": partial(fuse, disabled_fusions=()),  # CUDA has fast kernels for every fused operator
    "half": half,
    "residual-sum": residual_sum,
    "first-token": first_token,
    "first-query": first_query,
    "split-attention": split_attention,
    "trim-vocabulary": trim_vocabulary,
    "padding": padding,
    "quantize-linear": partial(
        quantize_linear, product=build_fused_product, attend=partial(build_qattention, codes=run_time_codes)
    ),
    "quantize-linear-portable": partial(
        quantize_linear,
        product=partial(build_fused_product, largest=LARGEST_OF_7_BITS),
        attend=partial(build_qattention, codes=run_time_codes, largest=LARGEST_OF_7_BITS),
    ),
    "quantize-linear-std": partial(quantize_linear, product=build_standard_product),
    "quantize-linear-std-portable": partial(
        quantize_linear, product=partial(build_standard_product, largest=LARGEST_OF_7_BITS)
    ),
    "smooth": smooth,
    "quantize-linear-static": partial(quantize_static, product=fused_static),
    "quantize-linear-std-static": partial(quantize_static, product=standard_static),
    # The operator of 4-bit products gives each token scales of its own.
    "quantize-linear-int4": partial(quantize_linear, product=build_int4_product, shares_scale=False),
    "quantize-embedding": partial(quantize_embedding, look_up=look_up_int8_rows),
    "quantize-embedding-int4": partial(quantize_embedding, look_up=look_up_int4_rows),
    "exits": exits,
    "quantize-embedding-int4-webgpu": partial(quantize_embedding, look_up=partial(look_up_int4_rows, webgpu=True)),
}


def rewrite(model: ir.Model, names: Sequence[str], context: Context) -> tuple[ir.Model, dict[str, int]]:
    """Applies the named passes in order, then removes unused nodes and opsets.

    Returns:
        The rewritten model, and a dictionary that maps the name of each pass to its number of rewrites.
    """
    from onnx_ir.passes import common

    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    counts = {}
    for name in names:
        model, counts[name] = PASSES[name](model, context)
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault(MS_DOMAIN, 1)  # passes may have added operators of the domain com.microsoft
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)  # layers that share weights produce nodes with equal names
    return model, counts


def _unalias(model: ir.Model) -> None:
    """Replaces every Identity of a weight by the weight.

    The exporter stores equal weights once and replaces each duplicate by an Identity node. Passes would not recognise
    an Identity as a stored weight.
    """
    for node in [node for node in model.graph if node.op_type == "Identity"]:
        weight, alias = node.inputs[0], node.outputs[0]
        if weight is not None and weight.is_initializer() and not alias.is_graph_output():
            alias.replace_all_uses_with(weight)
            model.graph.remove(node, safe=True)


def read(path: Path) -> ir.Model:
    """Loads and checks a single-file ONNX model.

    Raises:
        GraphError: The file is missing, is no valid ONNX model, or has no nodes.
    """
    import onnx
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(str(path), load_external_data=False)
        if not proto.graph.node:
            raise ValueError("the graph has no nodes")
        onnx.checker.check_model(proto)
        model = ir.from_proto(proto)
    except (DecodeError, onnx.checker.ValidationError, ir.serde.SerdeError, ValueError, OSError) as error:
        raise GraphError(f"{path} is not a valid ONNX model: {error}.", "Build the variant again.") from error
    _unalias(model)
    return model


def write(model: ir.Model, path: Path) -> None:
    """Saves the model and its tensors in one file.

    Raises:
        GraphError: A text in the model, such as the name of its producer, is no UTF-8.
    """
    import onnx_ir as ir

    try:
        ir.save(model, path)
    except ir.serde.SerdeError as error:
        raise GraphError(
            f"The graph cannot be written: {first_line(error)[:200]}", "Build the variant again."
        ) from error


def specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Returns the inputs or outputs of a graph as a manifest stores them."""
    import onnx_ir as ir

    tensor_specs = []
    for value in values:
        is_text = value.dtype == ir.DataType.STRING  # numpy's name for the type of strings is "object"
        kind = "string" if is_text else value.dtype.numpy().name if value.dtype else ""
        shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ())
        tensor_specs.append(TensorSpec(value.name or "", kind, shape))
    return tuple(tensor_specs)


def facts(model: ir.Model) -> dict[str, Any]:
    """Returns facts about the graph for a manifest.

    Returns:
        Bytes of the weights by dtype and by part (embeddings, encoder, head), opset versions, IR version, and operator
        counts. The entry `int8_headroom` says how far the int8 products stay below saturation. If `int8_headroom` is 1
        or more, no int8 product can saturate. The entry `int8_headroom` is absent if the graph has no int8 product.
    """
    nodes = [inner for node in model.graph for inner in (node, *_nested_nodes(node))]
    position = {node: index for index, node in enumerate(nodes)}
    last_norm = max((i for i, n in enumerate(nodes) if n.op_type == "LayerNormalization"), default=-1)
    by_part, by_dtype = {"embeddings": 0, "encoder": 0, "head": 0}, Counter[str]()
    for value in (weight for graph in model.graphs() for weight in graph.initializers.values()):
        tensor = value.const_value
        users = value.consumers()
        if tensor is None or not users:
            continue
        if any(node.op_type in LOOK_UPS for node in users) and tensor.shape.rank() == 2:
            part = "embeddings"
        else:
            part = "head" if min(position[node] for node in users) > last_norm else "encoder"
        by_part[part] += tensor.nbytes
        by_dtype[tensor.dtype.numpy().name] += tensor.nbytes
    return {
        "bytes_by_dtype": dict(sorted(by_dtype.items())),
        "bytes_by_part": by_part,
        "opset": dict(sorted(model.opset_imports.items())),
        "ir_version": model.ir_version,
        "operators": dict(sorted(Counter(node.op_type for node in position).items())),
        **({} if (margin := headroom(model)) is None else {"int8_headroom": margin}),
    }


def _nested_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """Yields the nodes in the branches of an If and the bodies of loops."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
