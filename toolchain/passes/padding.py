"""Padding that changes no scale: every padding token gets the embedding of its sentence's first token.

Int8 scales computed at run time come from the range of all tokens, padding included. Without this pass, one padding
token could change the rounding of every output. Attention masks padding, so the embedding of a padding token may have
any value.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from toolchain.passes.attention import DOMAIN
from toolchain.passes.graph import adder, constant, takes_first_token

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context

IDS, MASK = "input_ids", "attention_mask"
SHAPE = "Shape"
FUSED = {"Attention", "MultiHeadAttention"}
ROTARY = {"Cos", "Sin"}  # ModernBERT and EuroBERT rotate queries and keys by angles that depend on the position.
# Operators that may combine several tokens; none of them may precede the LayerNormalization of the embeddings.
MIXES = {"Attention", "MatMul", "Gemm", "Einsum", "Softmax"}


def padding(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Replaces the embeddings of padding tokens by the embedding of token 0; counts 1 if the pass applies.

    The embeddings have the shape [batch, sequence, width]. The rewrite is exact for token 0, with padding on either
    side. The pass applies if the classifier reads token 0, every attention is masked, and the embeddings end in a
    LayerNormalization.

    The pass does not apply if attention uses relative positions (DeBERTa, MPNet) or rotates queries and keys
    (ModernBERT). In such models, a padding token would not compute the same values as token 0.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    ids, mask = inputs.get(IDS), inputs.get(MASK)
    norm = next((n for n in model.graph if n.op_type == "LayerNormalization" and ids in _collect_ancestors(n)[1]), None)
    reads_first_token = any(takes_first_token(node) for node in model.graph)
    if (
        mask is None
        or norm is None
        or not reads_first_token
        or not _masks_every_attention(model, mask)
        or _may_mix_tokens(norm)
    ):
        return model, 0
    _replace_embeddings(model, norm, mask)
    return model, 1


def _collect_ancestors(node: ir.Node, stop: Collection[str] = ()) -> tuple[set[ir.Node], set[ir.Value]]:
    """Returns the nodes before `node`, and the values that these nodes and `node` read.

    The search stops at operators in `stop` and at Shape, whose result depends on no token. The returned nodes include
    neither `node` nor the nodes at which the search stops.
    """
    nodes: set[ir.Node] = set()
    values: set[ir.Value] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        values.update(value for value in current.inputs if value is not None)
        for predecessor in current.predecessors():
            if predecessor not in nodes and predecessor.op_type not in (SHAPE, *stop):
                nodes.add(predecessor)
                stack.append(predecessor)
    return nodes, values


def _masks_every_attention(model: ir.Model, mask: ir.Value) -> bool:
    """Returns whether the graph has attention, and every attention node takes the mask and no positions.

    The search from each attention node for the mask and relative positions stops at operators in `MIXES` and at the
    LayerNormalization of the layer's input. A search that continued into the embeddings would mistake the token type
    look-up of transformers 5, a GatherElements, for relative positions.
    """
    attentions = [n for n in model.graph if n.op_type == "Softmax" or (n.op_type in FUSED and n.domain == DOMAIN)]
    ancestors = [_collect_ancestors(node, {*MIXES, "LayerNormalization"}) for node in attentions]
    rotates = any(node.op_type in ROTARY for node in model.graph)
    return (
        bool(ancestors)
        and not rotates
        and all(mask in values and not any(map(_looks_up_distances, nodes)) for nodes, values in ancestors)
    )


def _looks_up_distances(node: ir.Node) -> bool:
    """Returns whether a node before a Softmax looks up values by the distance of two tokens.

    DeBERTa looks up attention scores with GatherElements, and MPNet looks up biases in a stored table.
    """
    table = node.inputs[0] if node.op_type == "Gather" else None
    stores_numbers = table is not None and table.const_value is not None and table.const_value.dtype.is_floating_point()
    return node.op_type == "GatherElements" or stores_numbers


def _may_mix_tokens(node: ir.Node) -> bool:
    """Returns whether the result of `node` may depend on several tokens."""
    return any(ancestor.op_type in MIXES for ancestor in _collect_ancestors(node)[0])


def _replace_embeddings(model: ir.Model, norm: ir.Node, mask: ir.Value) -> None:
    import numpy as np

    embeddings = norm.outputs[0]
    new_nodes: list[ir.Node] = []
    add = adder("padding", new_nodes)
    zero, one, last = (
        constant(model, f"padding_{n}", np.array(v, np.int64)) for n, v in (("zero", 0), ("one", 1), ("last", [-1]))
    )
    tokens = add("Gather", [add("Shape", [mask], "shape"), one], "tokens")
    positions = add("Mul", [mask, add("Range", [zero, tokens, one], "places")], "first_or_own")
    rows = add("GatherND", [embeddings, add("Unsqueeze", [positions, last], "rows")], "embeddings", batch_dims=1)
    rows.type, rows.shape = embeddings.type, embeddings.shape
    model.graph.insert_after(norm, new_nodes)
    embeddings.replace_all_uses_with(rows)
    new_nodes[-1].replace_input_with(0, embeddings)
