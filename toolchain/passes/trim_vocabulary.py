"""Removes the rows of the word embedding table whose tokens the tokenizer no longer has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.errors import GraphError

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context

IDS = "input_ids"


def trim_vocabulary(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Reduces the word embedding table, of shape [tokens, width], to the rows `context.tokens`, in that order.

    Raises:
        GraphError: The embedding table has no row for a kept token, or nodes other than one look-up read the token ids
            or the embedding table. A second reader of the token ids or the embedding table would still expect the old
            token ids. Besides the look-up, only Shape nodes may read the token ids.
    """
    import onnx_ir as ir

    ids = next((value for value in model.graph.inputs if value.name == IDS), None)
    users = [node for node in ids.consumers() if node.op_type != "Shape"] if ids else []
    table = users[0].inputs[0] if len(users) == 1 and users[0].op_type == "Gather" else None
    tensor = table.const_value if table is not None else None
    if table is None or tensor is None or tensor.shape.rank() != 2 or len(table.consumers()) != 1:
        operators = ", ".join(sorted(node.op_type for node in users)) or "nothing"
        raise GraphError(
            "The vocabulary of this graph cannot be trimmed. Only the look-up of one table may read the token ids, but "
            f"these operators read them: {operators}.",
            "Run the command without --trim-vocab.",
        )
    array = tensor.numpy()
    if context.tokens[-1] >= len(array):
        raise GraphError(
            f"The tokenizer has token {context.tokens[-1]}, but the embedding table has only {len(array)} rows.",
            "Import a checkpoint with its own tokenizer.",
        )
    rows = array[list(context.tokens)]
    table.const_value, table.shape = ir.tensor(rows, name=table.name), ir.Shape(rows.shape)
    return model, 1
