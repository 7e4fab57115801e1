"""Padding that moves no scale: a padded token computes what the first token of its sentence does.

Int8 activations with scales of run time are scaled by the range of all tokens, padded ones too: one token of padding
would round every answer anew. No attention looks at a padded token, so it may be anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.passes.attention import DOMAIN
from toolchain.passes.graph import adder, constant, takes_first_token

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context

MASK = "attention_mask"
FUSED = {"Attention", "MultiHeadAttention"}
MIXES = {"Attention", "MatMul", "Gemm", "Softmax"}  # what no token's embedding comes from


def padding(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Embeddings [batch, sequence, width] of padded tokens → those of token 0; counts the values replaced.

    Exact for token 0, on whichever side the padding is. Applies where that is what the classifier reads, attention is
    fused, which knows no more of a token's place than its embedding does, and the embeddings end in a
    LayerNormalization.
    """
    mask = next((value for value in model.graph.inputs if value.name == MASK), None)
    norm = next((node for node in model.graph if node.op_type == "LayerNormalization"), None)
    fused = any(node.op_type in FUSED and node.domain == DOMAIN for node in model.graph)
    first = any(takes_first_token(node) for node in model.graph)
    if mask is None or norm is None or not fused or not first or _mixed(norm):
        return model, 0
    _replace(model, norm, mask)
    return model, 1


def _mixed(node: ir.Node) -> bool:
    """Whether other tokens had a part in what it gives."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += each.predecessors()
    return any(each.op_type in MIXES for each in found)


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
