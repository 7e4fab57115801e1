"""The classifier reads the first token only: the last attention asks for that token alone, of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.passes.attention import DOMAIN, ROLES, multi_head, widths
from toolchain.passes.graph import adder, constant, replace, stored, takes_first_token

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context


def first_query(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """A fused Attention of whose result only token 0 is read → the query of that token, key and value of all, and
    MultiHeadAttention under the same mask; counts the attentions.

    Exact: what a token gathers is decided by its own query. The pass `first-token` is what brings the reading of one
    token up to the attention. Weights that other layers share stay as they are: they would be stored twice.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == DOMAIN]:
        weight, result = node.inputs[1], node.outputs[0]
        readers = result.consumers()
        one = readers and not result.is_graph_output() and all(takes_first_token(reader) for reader in readers)
        if one and weight is not None and len(weight.consumers()) == 1:
            _narrow(model, node)
            count += 1
    return model, count


def _narrow(model: ir.Model, node: ir.Node) -> None:
    import numpy as np
    import onnx_ir as ir

    data, weight, bias, _ = node.inputs[:4]
    array, name = stored(weight), node.name or "Attention"
    query, key, value = widths(node)
    new: list[ir.Node] = []
    add = adder(name, new)

    def linear(values: ir.Value | None, part: slice, what: str) -> ir.Value:
        weight = constant(model, f"{name}_{what}", array[:, part])
        product = add("MatMul", [values, weight], what)
        if bias is None:
            return product
        return add("Add", [product, constant(model, f"{name}_{what}_bias", stored(bias)[part])], f"{what}_biased")

    first = add("Gather", [data, constant(model, f"{name}_first", np.array([0], np.int64))], "first_token", axis=1)
    asked = linear(first, slice(0, query), ROLES[0])
    answered = linear(data, slice(query, None), "_".join(ROLES[1:]))
    sizes = constant(model, f"{name}_split", np.array([key, value], np.int64))
    split = ir.node("Split", [answered, sizes], {"axis": -1}, num_outputs=2, name=f"{name}/split")
    for part, role in zip(split.outputs, ROLES[1:], strict=True):
        part.name = f"{name}/{role}"
    heads = multi_head(model, node, [asked, *split.outputs], one_query=True)
    replace(model, node, node, [*new, split, heads], heads.outputs[0])
