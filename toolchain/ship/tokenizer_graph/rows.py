"""Tokens of several texts one after another → the arrays a model takes, padded to the longest."""

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
    """`ids` [tokens] of all texts, of which text i has those from `begins[i]` up to, without, `ends[i]` [texts]."""

    ids: ir.Value
    begins: ir.Value
    ends: ir.Value


@dataclass(frozen=True)
class Frame:
    """What is put around the tokens of a text, with what it is padded, to how many tokens it is cut off, these
    included; the width of a batch is a multiple of `multiple`."""

    before: Sequence[int]
    after: Sequence[int]
    pad_id: int
    max_length: int
    multiple: int = 1


def arrays(nodes: Nodes, tokens: Ragged, frame: Frame, names: Sequence[str]) -> dict[str, ir.Value]:
    """int64 [texts, width] by the names the model has for them."""
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
    place = nodes.add("Sub", position, nodes.numbers([before]))  # of a token within its text
    inside = nodes.add("And", nodes.add("GreaterOrEqual", place, nodes.numbers([0])), nodes.add("Less", place, counts))
    where = nodes.add("Add", nodes.add("Unsqueeze", tokens.begins, nodes.numbers([1])), place)
    # Whatever is no token of the text reads the padding that is put behind the last token of all.
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
