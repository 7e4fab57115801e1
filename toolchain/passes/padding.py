"""Gives padding tokens the embedding of their row's first token, so that padding on the right changes no int8 scale.

A row of a batch is one sentence with its padding. With padding on the right, the first token of the row is the first
token of the sentence. An int8 scale that is computed at run time comes from the range of all tokens, padding included.
Without this pass, one padding token could change a scale, and thereby the rounding of every output. The new embeddings
do not change the other tokens, because the attention mask hides padding tokens from the other tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from toolchain.passes.attention import DOMAIN
from toolchain.passes.graph import MASK, adder, constant, reads_table, takes_first_token

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context

IDS = "input_ids"
SHAPE = "Shape"
FUSED = {"Attention", "MultiHeadAttention"}
ROTARY = {"Cos", "Sin"}  # ModernBERT and EuroBERT rotate queries and keys by angles that depend on the position.
# Operators that may combine several tokens; none of them may precede the LayerNormalization of the embeddings.
MIXES = {"Attention", "MatMul", "Gemm", "Einsum", "Softmax"}


def padding(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Replaces the embedding of each padding token; counts 1 if the pass applies.

    The new embedding is that of token 0, which is the first token of the same row.

    The embeddings have the shape [batch, sequence, width]. The rewrite does not change the values of token 0, with
    padding on either side. The pass applies if the classifier reads token 0 or gives logits for each token, every
    attention is masked, and the embeddings end in a LayerNormalization.

    The pass does not apply if attention uses relative positions (DeBERTa, MPNet) or rotates queries and keys
    (ModernBERT). With such attention, the result for a token depends on the token's position, not only on its
    embedding. A padding token with the embedding of token 0 would therefore not get the same results as token 0.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    ids, mask = inputs.get(IDS), inputs.get(MASK)
    norm = next((n for n in model.graph if n.op_type == "LayerNormalization" and ids in _collect_ancestors(n)[1]), None)
    shape = model.graph.outputs[0].shape
    labels_tokens = shape is not None and len(shape) == 3  # no app reads what a token classifier gives for padding
    reads_first_token = labels_tokens or any(takes_first_token(node) for node in model.graph)
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
    """Returns True if attention nodes exist, all of them read the mask, and none of them uses token positions.

    For each attention node, the function searches the preceding nodes for the mask and for relative positions. The
    search stops at operators that may combine several tokens (the set `MIXES`), and at the LayerNormalization of the
    layer's input. The search must not reach the embeddings. In graphs of transformers 5, the embeddings contain a
    GatherElements node that looks up token types. If the search reached the embeddings, the function would mistake that
    node for a look-up of relative positions.
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
    """Returns whether the result of `node` may depend on several tokens.

    The linear layer of word embeddings of low rank computes each token alone.
    """
    return any(
        ancestor.op_type in MIXES and not _is_embedding_linear(ancestor) for ancestor in _collect_ancestors(node)[0]
    )


def _is_embedding_linear(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type == "MatMul" and reads_table(node) else None
    return weight is not None and weight.const_value is not None and weight.const_value.shape.rank() == 2


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
