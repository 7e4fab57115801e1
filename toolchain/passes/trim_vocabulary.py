"""Removes the rows of the word embedding table whose tokens the tokenizer no longer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolchain.errors import GraphError
from toolchain.passes.graph import array_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context

IDS = "input_ids"


def trim_vocabulary(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Reduces the word embedding table to the rows whose indices are in `context.tokens`, in that order.

    Raises:
        GraphError: The embedding table has no row for a kept token, or `word_table` raises it.
    """
    import onnx_ir as ir

    table = word_table(model)
    array = array_of(table)
    if context.tokens[-1] >= len(array):
        raise GraphError(
            f"The tokenizer has token {context.tokens[-1]}, but the embedding table has only {len(array)} rows.",
            "Import a checkpoint with its own tokenizer.",
        )
    rows = array[list(context.tokens)]
    table.const_value, table.shape = ir.tensor(rows, name=table.name), ir.Shape(rows.shape)
    return model, 1


def word_table(model: ir.Model) -> ir.Value:
    """Returns the word embedding table of a graph that can be trimmed.

    The embedding table has the shape [tokens, width]. Only one Gather, the embedding look-up, may read the embedding
    table. Only the embedding look-up and Shape nodes may read the token ids. A second look-up would still use the old
    token ids.

    Raises:
        GraphError: The graph does not store the table as a matrix, or a node that the pass does not support reads the
            token ids or the embedding table.
    """
    ids = next((value for value in model.graph.inputs if value.name == IDS), None)
    users = [node for node in ids.consumers() if node.op_type != "Shape"] if ids else []
    table = users[0].inputs[0] if len(users) == 1 and users[0].op_type == "Gather" else None
    hint = "Run the command without --trim-vocab."
    if table is None:
        raise GraphError(
            "The vocabulary of this graph cannot be trimmed. Only the look-up in the embedding table may read the "
            f"token ids, but these operators read the token ids: {_operators(users)}.",
            hint,
        )
    tensor = table.const_value
    if tensor is None or tensor.shape.rank() != 2:
        raise GraphError(
            "The vocabulary of this graph cannot be trimmed, because the graph does not store the embedding table as a "
            "matrix.",
            hint,
        )
    if len(table.consumers()) != 1:
        raise GraphError(
            "The vocabulary of this graph cannot be trimmed, because several operators read the embedding table: "
            f"{_operators(table.consumers())}.",
            hint,
        )
    return table


def _operators(nodes: Sequence[ir.Node]) -> str:
    return ", ".join(sorted(node.op_type for node in nodes)) or "none"
