"""Computes the token-wise part of the last layer for the first token only: the classifier reads no other token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.passes.graph import takes_first_token

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context

# Operators that compute each token from that token alone, and accept any number of leading axes.
TOKEN_WISE = {"Add", "Sub", "Sum", "MatMul", "LayerNormalization", "Gelu", "FastGelu", "Relu", "Tanh"}
# Operators that may produce the input of the token-wise nodes; their output is [batch, sequence, width].
BOUNDARY = {"Attention", "MultiHeadAttention", "LayerNormalization"}


def first_token(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Moves the `Gather` of token 0 up through token-wise nodes to the last attention; counts the token-wise nodes.

    The rewrite is exact, because each token-wise node computes token 0 from token 0 alone. The pass rewrites a
    token-wise node only if every reader of its output is the Gather of token 0 or another rewritten node. A rewritten
    node may read only weights and the outputs of other rewritten nodes and of `BOUNDARY` operators.
    """
    count = 0
    for gather in [node for node in model.graph if takes_first_token(node)]:
        region = _movable_nodes(model, gather)
        starts = {v: v.producer() for node in region for v in node.inputs if v is not None and not v.is_initializer()}
        starts = {value: node for value, node in starts.items() if node not in region}
        if not region or any(node is None or node.op_type not in BOUNDARY for node in starts.values()):
            continue
        _move_gather(model, gather, region, list(starts))
        count += len(region)
    return model, count


def _movable_nodes(model: ir.Model, gather: ir.Node) -> list[ir.Node]:
    """Returns the nodes that need to compute only the first token; the node nearest to `gather` comes first.

    `gather` is the node that selects the first token. The function searches backwards from `gather` for token-wise
    nodes, which compute each token from that token alone. The function accepts a token-wise node if only `gather` and
    already accepted nodes read the node's output. The function accepts no node that computes an output of the graph.
    """
    region = [gather]
    for node in reversed(list(model.graph)):
        readers = {reader for out in node.outputs for reader in out.consumers()}
        is_output = any(out.is_graph_output() for out in node.outputs)
        if (
            readers
            and readers <= set(region)
            and not is_output
            and node.op_type in TOKEN_WISE
            and _uses_last_axis_only(node)
        ):
            region.append(node)
    return region[1:]


def _uses_last_axis_only(node: ir.Node) -> bool:
    if node.op_type == "LayerNormalization":
        return node.attributes.get_int("axis", -1) == -1
    ranks = [v.const_value.shape.rank() if v and v.is_initializer() and v.const_value else None for v in node.inputs]
    if node.op_type == "MatMul":
        return ranks == [None, 2]
    return all(rank is None or rank <= 1 for rank in ranks)


def _move_gather(model: ir.Model, gather: ir.Node, region: list[ir.Node], starts: list[ir.Value]) -> None:
    import onnx_ir as ir

    for start in starts:
        moved_gather = ir.node("Gather", [start, gather.inputs[1]], {"axis": 1}, name=f"{start.name}/first_token")
        moved_gather.outputs[0].name = f"{start.name}/first_token"
        producer = start.producer()
        assert producer is not None  # the caller checked that a `BOUNDARY` operator produces `start`
        model.graph.insert_after(producer, moved_gather)
        for node in region:
            for index, value in enumerate(node.inputs):
                if value is start:
                    node.replace_input_with(index, moved_gather.outputs[0])
    for node in region:
        for out in node.outputs:
            out.shape = None
    data = gather.inputs[0]
    assert data is not None  # every Gather has a data input
    gather.outputs[0].replace_all_uses_with(data, replace_graph_outputs=True)
    model.graph.remove(gather, safe=True)
