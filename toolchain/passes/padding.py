"""Padding that moves no scale: a padded token computes what the first token of its sentence does.

Int8 activations with scales of run time are scaled by the range of all tokens, padded ones too: one token of padding
would round every answer anew. No attention looks at a padded token, so it may be anything.
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
RELATIVE = "GatherElements"  # scores by how far apart two tokens are
MIXES = {"Attention", "MatMul", "Gemm", "Einsum", "Softmax"}  # what no token's embedding comes from


def padding(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Embeddings [batch, sequence, width] of padded tokens → those of token 0; counts the values replaced.

    Exact for token 0, on whichever side the padding is. Applies where that is what the classifier reads, every
    attention is masked, and the embeddings end in a LayerNormalization; not where attention knows more of a token's
    place than its embedding does (DeBERTa's), since a padded token would not stay what the first is.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    ids, mask = inputs.get(IDS), inputs.get(MASK)
    norm = next((n for n in model.graph if n.op_type == "LayerNormalization" and ids in _above(n)[1]), None)
    first = any(takes_first_token(node) for node in model.graph)
    if mask is None or norm is None or not first or not _masked(model, mask) or _mixed(norm):
        return model, 0
    _replace(model, norm, mask)
    return model, 1


def _above(node: ir.Node, stop: Collection[str] = ()) -> tuple[set[ir.Node], set[ir.Value]]:
    """The nodes whose results, not shapes alone, have a part in what `node` reads, none from an operator in `stop`
    upwards, and the values that these and `node` read."""
    nodes: set[ir.Node] = set()
    values: set[ir.Value] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        values.update(value for value in each.inputs if value is not None)
        for before in each.predecessors():
            if before not in nodes and before.op_type not in (SHAPE, *stop):
                nodes.add(before)
                waiting.append(before)
    return nodes, values


def _masked(model: ir.Model, mask: ir.Value) -> bool:
    """Whether there is attention, and all of it is told of the mask and nothing else of tokens, without a product
    between."""
    attentions = [n for n in model.graph if n.op_type == "Softmax" or (n.op_type in FUSED and n.domain == DOMAIN)]
    told = [_above(node, MIXES) for node in attentions]
    return bool(told) and all(mask in vs and RELATIVE not in {n.op_type for n in nodes} for nodes, vs in told)


def _mixed(node: ir.Node) -> bool:
    """Whether other tokens had a part in what it gives."""
    return any(each.op_type in MIXES for each in _above(node)[0])


def _replace(model: ir.Model, norm: ir.Node, mask: ir.Value) -> None:
    import numpy as np

    embeddings = norm.outputs[0]
    new: list[ir.Node] = []
    add = adder("padding", new)
    zero, one, last = (
        constant(model, f"padding_{n}", np.array(v, np.int64)) for n, v in (("zero", 0), ("one", 1), ("last", [-1]))
    )
    tokens = add("Gather", [add("Shape", [mask], "shape"), one], "tokens")
    places = add("Mul", [mask, add("Range", [zero, tokens, one], "places")], "first_or_own")
    rows = add("GatherND", [embeddings, add("Unsqueeze", [places, last], "rows")], "embeddings", batch_dims=1)
    rows.type, rows.shape = embeddings.type, embeddings.shape
    model.graph.insert_after(norm, new)
    embeddings.replace_all_uses_with(rows)
    new[-1].replace_input_with(0, embeddings)
