"""Computes the last attention for the first token only, because the classifier reads no other token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.passes.attention import DOMAIN, ROLES, multi_head, widths
from toolchain.passes.graph import adder, array_of, constant, replace_nodes, takes_first_token

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context


def first_query(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Rewrites each fused Attention whose readers use token 0 only; counts the rewritten Attention nodes.

    The new nodes compute the query of token 0, the keys and values of all tokens, and a MultiHeadAttention with the
    mask of the replaced Attention. The rewrite is exact, because a token's attention output depends on no other token's
    query. Run the pass `first-token` before this pass, because `first-token` moves the Gather of token 0 up to the
    attention. Attentions that share their weight with other layers stay unchanged, because the rewrite would store that
    weight twice.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == DOMAIN]:
        weight, result = node.inputs[1], node.outputs[0]
        readers = result.consumers()
        reads_first_only = (
            readers and not result.is_graph_output() and all(takes_first_token(reader) for reader in readers)
        )
        if reads_first_only and weight is not None and len(weight.consumers()) == 1:
            _keep_first_query(model, node)
            count += 1
    return model, count


def _keep_first_query(model: ir.Model, node: ir.Node) -> None:
    import numpy as np
    import onnx_ir as ir

    data, weight, bias, _ = node.inputs[:4]
    array, name = array_of(weight), node.name or "Attention"
    query, key, value = widths(node)
    new_nodes: list[ir.Node] = []
    add = adder(name, new_nodes)

    def linear(values: ir.Value | None, columns: slice, suffix: str) -> ir.Value:
        weight = constant(model, f"{name}_{suffix}", array[:, columns])
        product = add("MatMul", [values, weight], suffix)
        if bias is None:
            return product
        return add(
            "Add", [product, constant(model, f"{name}_{suffix}_bias", array_of(bias)[columns])], f"{suffix}_biased"
        )

    first_token = add(
        "Gather", [data, constant(model, f"{name}_first", np.array([0], np.int64))], "first_token", axis=1
    )
    one_query = linear(first_token, slice(0, query), ROLES[0])
    keys_and_values = linear(data, slice(query, None), "_".join(ROLES[1:]))
    sizes = constant(model, f"{name}_split", np.array([key, value], np.int64))
    split = ir.node("Split", [keys_and_values, sizes], {"axis": -1}, num_outputs=2, name=f"{name}/split")
    for part, role in zip(split.outputs, ROLES[1:], strict=True):
        part.name = f"{name}/{role}"
    heads = multi_head(model, node, [one_query, *split.outputs], one_query=True)
    replace_nodes(model, node, node, [*new_nodes, split, heads], heads.outputs[0])
