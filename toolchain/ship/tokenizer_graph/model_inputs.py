"""Adds the nodes that convert the concatenated tokens of several texts to a model's padded inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.data.encoding import TOKEN_TYPES
from toolchain.ship.tokenizer_graph.nodes import Nodes

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Ragged:
    """The concatenated tokens of several texts.

    Attributes:
        ids: Concatenated token ids of all texts, int64 of shape [tokens].
        begins: Index in `ids` of each text's first token, int64 of shape [texts].
        ends: Index in `ids` after each text's last token, int64 of shape [texts].
    """

    ids: ir.Value
    begins: ir.Value
    ends: ir.Value


@dataclass(frozen=True)
class Frame:
    """The special tokens, padding and truncation of a text.

    Attributes:
        prefix: Ids of the special tokens before the text.
        suffix: Ids of the special tokens after the text.
        pad_id: Token id for padding.
        max_length: Largest number of tokens of a text, including the special tokens.
        multiple: The graph rounds the width of a batch up to a multiple of this number, at most to `max_length`.
    """

    prefix: Sequence[int]
    suffix: Sequence[int]
    pad_id: int
    max_length: int
    multiple: int = 1


def add_model_inputs(nodes: Nodes, tokens: Ragged, frame: Frame, names: Sequence[str]) -> dict[str, ir.Value]:
    """Adds the nodes that compute the model's inputs from the tokens of several texts.

    Args:
        nodes: Nodes of a graph, which the function extends.
        tokens: Tokens of all texts.
        frame: Special tokens, padding and truncation of each text.
        names: Names of the model's inputs.

    Returns:
        The model's inputs by name, each int64 of shape [texts, width].
    """
    special_count = len(frame.prefix) + len(frame.suffix)
    limit = nodes.numbers([frame.max_length - special_count])
    counts = nodes.add("Min", nodes.add("Sub", tokens.ends, tokens.begins), limit)
    width = nodes.add("Add", nodes.add("ReduceMax", counts, keepdims=0), nodes.numbers(special_count))
    if frame.multiple > 1:
        step = nodes.numbers(frame.multiple)
        rounded = nodes.add("Add", width, nodes.numbers(frame.multiple - 1))
        width = nodes.add("Mul", nodes.add("Div", rounded, step), step)
        width = nodes.add("Min", width, nodes.numbers(frame.max_length))
    counts = nodes.add("Unsqueeze", counts, nodes.numbers([1]))
    position = nodes.add("Range", nodes.numbers(0), width, nodes.numbers(1))
    # Token index in the text for each position of the batch; special tokens before the text have negative indices.
    index = nodes.add("Sub", position, nodes.numbers([len(frame.prefix)]))
    is_text = nodes.add("And", nodes.add("GreaterOrEqual", index, nodes.numbers([0])), nodes.add("Less", index, counts))
    source = nodes.add("Add", nodes.add("Unsqueeze", tokens.begins, nodes.numbers([1])), index)
    # The graph appends one padding token to the concatenated tokens; positions outside a text select this token.
    count = nodes.add("Shape", tokens.ids)
    padded = nodes.add("Concat", tokens.ids, nodes.numbers([frame.pad_id]), axis=0)
    ids = nodes.add("Gather", padded, nodes.add("Where", is_text, source, count))
    for offset, token in enumerate(frame.prefix):
        ids = nodes.add("Where", nodes.add("Equal", position, nodes.numbers([offset])), nodes.numbers([token]), ids)
    for offset, token in enumerate(frame.suffix):
        is_special = nodes.add("Equal", index, nodes.add("Add", counts, nodes.numbers([offset])))
        ids = nodes.add("Where", is_special, nodes.numbers([token]), ids)
    is_token = nodes.add("Less", index, nodes.add("Add", counts, nodes.numbers([len(frame.suffix)])))
    mask = nodes.add("Cast", is_token, to=7)  # INT64
    inputs = {"input_ids": ids, "attention_mask": mask}
    if TOKEN_TYPES in names:
        inputs[TOKEN_TYPES] = nodes.zeros_like(ids)
    return {name: inputs[name] for name in names}
