"""Adds BERT's tokenizer to a graph: nodes that map characters, split texts into words, and split words into pieces.

BERT's tokenizer uses the algorithm WordPiece (Schuster and Nakajima 2012). Two operators of onnxruntime-extensions
differ from the checkpoint's tokenizer. The operator `BertTokenizer` takes only one text and treats accents differently
from the checkpoint's tokenizer, so the graph does not use it. The operator `WordpieceTokenizer` keeps the known pieces
before an unknown piece of a word; other nodes of the graph drop these pieces. The graph maps characters with a table,
which the module `characters` computes with the checkpoint's tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.errors import ShippingError
from toolchain.ship.targets.releases import EXTENSIONS, ML
from toolchain.ship.tokenizer_graph.characters import (
    DELETED,
    SHIP_WITHOUT_HINT,
    changes,
    group_by_kind,
    runs,
    surround_with_spaces,
)
from toolchain.ship.tokenizer_graph.model_inputs import Ragged
from toolchain.ship.tokenizer_graph.nodes import Nodes

if TYPE_CHECKING:
    import onnx_ir as ir

# The graph inserts control characters into texts as marks. The text's own control characters are not needed, because
# the checkpoint's tokenizer deletes all control characters of a text.
NUL, DROPPED, ROW_END = "\x00", "\x01", "\x02"
MARKS = [chr(point) for point in (*range(3, 9), 11, 12, *range(14, 32))]
# If the tokenizer changes more than `LONG_RUN` consecutive Unicode characters in the same way, the graph replaces them
# with a regular expression. For so many characters, a regular expression is faster than one table entry per character.
LONG_RUN = 64


def word_pieces(nodes: Nodes, texts: ir.Value, tokenizer: Any) -> Ragged:
    """Adds the nodes that split texts into tokens; these nodes add no special tokens.

    Args:
        nodes: Nodes of a graph, which the function extends.
        texts: The texts to split, a string tensor of shape [texts].
        tokenizer: The checkpoint's tokenizer.

    Raises:
        ShippingError: An ONNX graph cannot express the tokenizer's normaliser or its added tokens.
    """
    definition = tokenizer.to_str()
    model, changed = json.loads(definition)["model"], changes(definition)
    marks = _choose_marks(tokenizer, changed)
    words = _add_word_split(nodes, texts, changed, marks)
    vocabulary = {**model["vocab"], **{mark: model["vocab"][token] for token, mark in marks.items()}}
    ids = _longest_pieces(nodes, words, model, vocabulary)
    ends = nodes.add("Squeeze", nodes.add("NonZero", nodes.add("Equal", ids, nodes.numbers([-1]))), nodes.numbers([0]))
    next_ends = nodes.add("Add", ends, nodes.numbers([1]))
    next_begins = nodes.add("Slice", next_ends, nodes.numbers([0]), nodes.numbers([-1]))
    return Ragged(ids, nodes.add("Concat", nodes.numbers([0]), next_begins, axis=0), ends)


def _choose_marks(tokenizer: Any, changed: Mapping[str, str]) -> dict[str, str]:
    """Returns a control character for each added token, the longest token first.

    Before normalisation, the graph replaces each added token of a text with the token's control character.

    Raises:
        ShippingError: The tokenizer keeps control characters, or an ONNX graph cannot express its added tokens.
    """
    kept_characters = [mark for mark in (NUL, DROPPED, ROW_END, *MARKS) if changed.get(mark) != DELETED]
    if kept_characters:
        raise ShippingError(
            f"The tokenizer keeps control characters such as {kept_characters[0]!r}, which the graph needs as marks.",
            SHIP_WITHOUT_HINT,
        )
    tokens = sorted(tokenizer.get_added_tokens_decoder().values(), key=lambda token: -len(token.content))
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    for token in tokens:
        if token.lstrip or token.rstrip or token.single_word or token.normalized or token.content not in vocabulary:
            raise ShippingError(
                f"The tokenizer finds its added token {token.content!r} by rules that the graph cannot express.",
                SHIP_WITHOUT_HINT,
            )
    if len(tokens) > len(MARKS):
        raise ShippingError(
            f"The tokenizer has {len(tokens)} added tokens, but a graph supports at most {len(MARKS)}.",
            SHIP_WITHOUT_HINT,
        )
    return dict(zip((token.content for token in tokens), MARKS, strict=False))


def _add_word_split(nodes: Nodes, texts: ir.Value, changed: Mapping[str, str], marks: Mapping[str, str]) -> ir.Value:
    """Adds the nodes that split texts into words; returns a string tensor with `ROW_END` after each text's words."""
    # The operators of onnxruntime-extensions read a text only up to a NUL character, so a standard operator first
    # splits each text at its NUL characters.
    parts = nodes.add_with_outputs("StringSplit", 2, texts, delimiter=NUL)[0]
    texts = nodes.add("StringJoin", parts, nodes.texts(DROPPED), nodes.numbers([1]), domain=EXTENSIONS)
    texts = nodes.replace(texts, _character_class([ROW_END, *MARKS]), DROPPED)
    for token, mark in marks.items():
        texts = nodes.replace(texts, re.escape(token), mark)
    table = dict(changed)
    kinds = group_by_kind(changed)
    for kind, replacement in (("deleted", ""), ("space", " "), ("words", r" \1 ")):
        long = [run for run in runs(kinds[kind]) if run[1] - run[0] >= LONG_RUN]
        # The map in `_add_character_map` uses tabs and newlines as separators, so it cannot contain these characters.
        separators = [c for c in kinds[kind] if c in "\t\n"]
        if long or separators:
            texts = nodes.replace(texts, f"({_character_class(separators, long)})", replacement)
        for first, last in long:
            for point in range(first, last + 1):
                del table[chr(point)]
        for character in separators:
            table.pop(character, None)
    texts = nodes.replace(texts, r"\z", ROW_END)
    return _add_character_map(nodes, texts, table, marks)


def _add_character_map(nodes: Nodes, texts: ir.Value, table: Mapping[str, str], marks: Mapping[str, str]) -> ir.Value:
    """Adds the nodes that replace every character as in `table`, and split the result into words."""
    rows = {c: new or DROPPED for c, new in table.items() if c not in (NUL, ROW_END, *MARKS)}
    rows |= {mark: surround_with_spaces(mark) for mark in (*marks.values(), ROW_END)}
    pattern = nodes.texts("((?s:.))")
    characters = nodes.add_with_outputs("StringRegexSplitWithOffsets", 4, texts, pattern, pattern, domain=EXTENSIONS)[0]
    lines = "\n".join(f"{character}\t{new}" for character, new in sorted(rows.items()))
    mapped = nodes.add("StringMapping", characters, domain=EXTENSIONS, map=lines)
    joined = nodes.add("StringJoin", mapped, nodes.texts(""), nodes.numbers([0]), domain=EXTENSIONS)
    joined = nodes.replace(joined, DROPPED, "")
    split = nodes.add_with_outputs("StringSplit", 3, joined, nodes.texts(" "), nodes.boolean(True), domain=EXTENSIONS)
    words: ir.Value = split[1]
    return words


def _longest_pieces(nodes: Nodes, words: ir.Value, model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> ir.Value:
    """Adds the nodes that split words into pieces; returns the pieces' int64 ids, with -1 after each text."""
    unknown = vocabulary[model["unk_token"]]
    tokens, _, begins, ends = nodes.add_with_outputs(
        "WordpieceTokenizer",
        4,
        words,
        nodes.numbers([]),
        domain=EXTENSIONS,
        vocab=json.dumps({**vocabulary, ROW_END: len(vocabulary)}, ensure_ascii=False),
        suffix_indicator=model["continuing_subword_prefix"],
        unknown_token=model["unk_token"],
        max_input_chars_per_word=model["max_input_chars_per_word"],
    )
    numbers = {**vocabulary, ROW_END: -1}
    ids = nodes.add(
        "LabelEncoder",
        tokens,
        domain=ML,
        keys_strings=list(numbers),
        values_int64s=list(numbers.values()),
        default_int64=unknown,
    )
    # If a word has an unknown piece, the operator `WordpieceTokenizer` returns the known pieces before the unknown
    # piece, and then the unknown token. The next nodes delete these known pieces. In the graph's result, each word
    # with an unknown piece is a single unknown token.
    last = nodes.add("Sub", ends, nodes.numbers([1]))
    is_unknown = nodes.add("Equal", nodes.add("Gather", ids, last), nodes.numbers([unknown]))
    first = nodes.add("Where", is_unknown, last, begins)
    ones = nodes.add("Expand", nodes.numbers([1]), nodes.add("Shape", begins))
    starts = nodes.add("ScatterElements", nodes.zeros_like(ids), begins, ones)
    word_of = nodes.add("Sub", nodes.add("CumSum", starts, nodes.numbers(0)), nodes.numbers([1]))
    count = nodes.add("Squeeze", nodes.add("Shape", ids))
    place = nodes.add("Range", nodes.numbers(0), count, nodes.numbers(1))
    return nodes.add("Compress", ids, nodes.add("GreaterOrEqual", place, nodes.add("Gather", first, word_of)))


def _character_class(characters: Sequence[str], ranges: Sequence[tuple[int, int]] = ()) -> str:
    """Returns a regular expression that matches one of the characters or a character in one of the ranges."""
    pairs = [*runs(characters), *ranges]
    return "[" + "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in pairs) + "]"
