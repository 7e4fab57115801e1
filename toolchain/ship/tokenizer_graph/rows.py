"""The nodes that convert the concatenated tokens of several texts to a model's inputs, padded to the longest text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.data.inputs import TOKEN_TYPES
from toolchain.ship.tokenizer_graph.nodes import Nodes

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Ragged:
    """The tokens of several texts.

    Attributes:
        ids: Concatenated token ids of all texts, int64 [tokens].
        begins: Index of each text's first token, int64 [texts].
        ends: Index after each text's last token, int64 [texts].
    """

    ids: ir.Value
    begins: ir.Value
    ends: ir.Value


@dataclass(frozen=True)
class Frame:
    """The special tokens, padding and truncation of a text.

    Attributes:
        before: Special tokens before the text.
        after: Special tokens after the text.
        pad_id: Token id for padding.
        max_length: Largest number of tokens of a text, with the special tokens.
        multiple: The width of a batch is a multiple of this number, or `max_length`.
    """

    before: Sequence[int]
    after: Sequence[int]
    pad_id: int
    max_length: int
    multiple: int = 1


def arrays(nodes: Nodes, tokens: Ragged, frame: Frame, names: Sequence[str]) -> dict[str, ir.Value]:
    """Adds the nodes that compute the model's inputs.

    Args:
        nodes: Nodes to extend.
        tokens: Tokens of all texts.
        frame: Special tokens, padding and truncation.
        names: Names of the model's inputs.

    Returns:
        The inputs by name, each int64 [texts, width].
    """
    before, around = len(frame.before), len(frame.before) + len(frame.after)
    room = nodes.numbers([frame.max_length - around])
    counts = nodes.add("Min", nodes.add("Sub", tokens.ends, tokens.begins), room)
    widest = nodes.add("Add", nodes.add("ReduceMax", counts, keepdims=0), nodes.numbers(around))
    if frame.multiple > 1:
        step = nodes.numbers(frame.multiple)
        up = nodes.add("Add", widest, nodes.numbers(frame.multiple - 1))
        widest = nodes.add("Mul", nodes.add("Div", up, step), step)
        widest = nodes.add("Min", widest, nodes.numbers(frame.max_length))
    counts = nodes.add("Unsqueeze", counts, nodes.numbers([1]))
    position = nodes.add("Range", nodes.numbers(0), widest, nodes.numbers(1))
    place = nodes.add("Sub", position, nodes.numbers([before]))  # index of a token in its text
    inside = nodes.add("And", nodes.add("GreaterOrEqual", place, nodes.numbers([0])), nodes.add("Less", place, counts))
    where = nodes.add("Add", nodes.add("Unsqueeze", tokens.begins, nodes.numbers([1])), place)
    # Positions outside the text read the padding token, which is appended to the tokens of all texts.
    count = nodes.add("Shape", tokens.ids)
    padded = nodes.add("Concat", tokens.ids, nodes.numbers([frame.pad_id]), axis=0)
    found = nodes.add("Gather", padded, nodes.add("Where", inside, where, count))
    for index, token in enumerate(frame.before):
        found = nodes.add("Where", nodes.add("Equal", position, nodes.numbers([index])), nodes.numbers([token]), found)
    for index, token in enumerate(frame.after):
        here = nodes.add("Equal", place, nodes.add("Add", counts, nodes.numbers([index])))
        found = nodes.add("Where", here, nodes.numbers([token]), found)
    used = nodes.add("Less", place, nodes.add("Add", counts, nodes.numbers([len(frame.after)])))
    mask = nodes.add("Cast", used, to=7)  # INT64
    made = {"input_ids": found, "attention_mask": mask}
    if TOKEN_TYPES in names:
        made[TOKEN_TYPES] = nodes.zeros_like(found)
    return {name: made[name] for name in names}
