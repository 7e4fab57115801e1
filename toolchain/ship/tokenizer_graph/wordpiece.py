"""BERT's tokenizer as a graph: it maps characters, splits words, and finds the longest pieces of each word.

The algorithm is WordPiece (Schuster and Nakajima 2012). The graph uses only those operators of onnxruntime-extensions
that compute correctly. `BertTokenizer` takes a single text and treats accents differently from the checkpoint.
`WordpieceTokenizer` keeps the first pieces of a word with an unknown piece; the graph runs it on separate words and
drops these pieces. Tables map the characters; `characters` computes them with the checkpoint's own tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.errors import ShippingError
from toolchain.ship.targets.releases import EXTENSIONS, ML
from toolchain.ship.tokenizer_graph.characters import DELETED, WITHOUT, by_kind, changes, runs, spaced
from toolchain.ship.tokenizer_graph.nodes import Nodes
from toolchain.ship.tokenizer_graph.rows import Ragged

if TYPE_CHECKING:
    import onnx_ir as ir

# Control characters with a meaning inside the graph. The tokenizer deletes these characters, so no token is lost.
NUL, DROPPED, ROW_END = "\x00", "\x01", "\x02"
MARKS = [chr(point) for point in (*range(3, 9), 11, 12, *range(14, 32))]
LONG_RUN = 64  # characters; from this length on, a run is cheaper in a regular expression than in a table


def word_pieces(nodes: Nodes, texts: ir.Value, tokenizer: Any) -> Ragged:
    """Adds the nodes that split texts into tokens, without the special tokens around a text.

    Args:
        nodes: Nodes to extend.
        texts: The texts, string [texts].
        tokenizer: The checkpoint's tokenizer.

    Raises:
        ShippingError: The graph cannot express the tokenizer's normaliser or its added tokens.
    """
    definition = tokenizer.to_str()
    model, changed = json.loads(definition)["model"], changes(definition)
    marks = _marks(tokenizer, changed)
    words = _words(nodes, texts, changed, marks)
    vocabulary = {**model["vocab"], **{mark: model["vocab"][token] for token, mark in marks.items()}}
    ids = _longest_pieces(nodes, words, model, vocabulary)
    ends = nodes.add("Squeeze", nodes.add("NonZero", nodes.add("Equal", ids, nodes.numbers([-1]))), nodes.numbers([0]))
    after = nodes.add("Add", ends, nodes.numbers([1]))
    others = nodes.add("Slice", after, nodes.numbers([0]), nodes.numbers([-1]))
    return Ragged(ids, nodes.add("Concat", nodes.numbers([0]), others, axis=0), ends)


def _marks(tokenizer: Any, changed: Mapping[str, str]) -> dict[str, str]:
    """Returns a control character for each added token, the longest token first.

    The control character replaces the token in a text before normalisation.

    Raises:
        ShippingError: The tokenizer keeps control characters, or the graph cannot express its added tokens.
    """
    kept = [mark for mark in (NUL, DROPPED, ROW_END, *MARKS) if changed.get(mark) != DELETED]
    if kept:
        raise ShippingError(
            f"The tokenizer keeps control characters such as {kept[0]!r}, which stand for its own here.", WITHOUT
        )
    tokens = sorted(tokenizer.get_added_tokens_decoder().values(), key=lambda token: -len(token.content))
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    for token in tokens:
        if token.lstrip or token.rstrip or token.single_word or token.normalized or token.content not in vocabulary:
            raise ShippingError(
                f"The tokenizer looks for its added token {token.content!r} in a way that a graph cannot.", WITHOUT
            )
    if len(tokens) > len(MARKS):
        raise ShippingError(
            f"The tokenizer has {len(tokens)} added tokens, of {len(MARKS)} at most in a graph.", WITHOUT
        )
    return dict(zip((token.content for token in tokens), MARKS, strict=False))


def _words(nodes: Nodes, texts: ir.Value, changed: Mapping[str, str], marks: Mapping[str, str]) -> ir.Value:
    """Adds the nodes that split texts into words, string [words]; `ROW_END` follows the words of each text."""
    # ONNX Runtime's own operator removes NUL first, because NUL ends a text for onnxruntime-extensions.
    parts = nodes.several("StringSplit", 2, texts, delimiter=NUL)[0]
    texts = nodes.add("StringJoin", parts, nodes.texts(DROPPED), nodes.numbers([1]), domain=EXTENSIONS)
    texts = nodes.replace(texts, _class([ROW_END, *MARKS]), DROPPED)
    for token, mark in marks.items():
        texts = nodes.replace(texts, re.escape(token), mark)
    table = dict(changed)
    kinds = by_kind(changed)
    for kind, by in (("deleted", ""), ("space", " "), ("words", r" \1 ")):
        long = [run for run in runs(kinds[kind]) if run[1] - run[0] >= LONG_RUN]
        apart = [c for c in kinds[kind] if c in "\t\n"]  # separators in the table of `_mapped`
        if long or apart:
            texts = nodes.replace(texts, f"({_class(apart, long)})", by)
        for first, last in long:
            for point in range(first, last + 1):
                del table[chr(point)]
        for character in apart:
            table.pop(character, None)
    texts = nodes.replace(texts, r"\z", ROW_END)
    return _mapped(nodes, texts, table, marks)


def _mapped(nodes: Nodes, texts: ir.Value, table: Mapping[str, str], marks: Mapping[str, str]) -> ir.Value:
    """Adds the nodes that map every character with the table and split the result into words."""
    own = {mark: spaced(mark) for mark in (*marks.values(), ROW_END)}
    rows = {**{c: became or DROPPED for c, became in table.items() if c not in (NUL, ROW_END, *MARKS)}, **own}
    each = nodes.texts("((?s:.))")
    split = nodes.several("StringRegexSplitWithOffsets", 4, texts, each, each, domain=EXTENSIONS)[0]
    lines = "\n".join(f"{character}\t{became}" for character, became in sorted(rows.items()))
    mapped = nodes.add("StringMapping", split, domain=EXTENSIONS, map=lines)
    joined = nodes.add("StringJoin", mapped, nodes.texts(""), nodes.numbers([0]), domain=EXTENSIONS)
    joined = nodes.replace(joined, DROPPED, "")
    split = nodes.several("StringSplit", 3, joined, nodes.texts(" "), nodes.truth(True), domain=EXTENSIONS)
    found: ir.Value = split[1]
    return found


def _longest_pieces(nodes: Nodes, words: ir.Value, model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> ir.Value:
    """Adds the nodes that split words into pieces; returns their ids, int64 [pieces], with -1 after each text."""
    unknown = vocabulary[model["unk_token"]]
    tokens, _, begins, ends = nodes.several(
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
    # A word with an unknown piece is unknown. Only its last piece stays, which is the unknown token.
    last = nodes.add("Sub", ends, nodes.numbers([1]))
    is_unknown = nodes.add("Equal", nodes.add("Gather", ids, last), nodes.numbers([unknown]))
    first = nodes.add("Where", is_unknown, last, begins)
    ones = nodes.add("Expand", nodes.numbers([1]), nodes.add("Shape", begins))
    starts = nodes.add("ScatterElements", nodes.zeros_like(ids), begins, ones)
    word_of = nodes.add("Sub", nodes.add("CumSum", starts, nodes.numbers(0)), nodes.numbers([1]))
    count = nodes.add("Squeeze", nodes.add("Shape", ids))
    place = nodes.add("Range", nodes.numbers(0), count, nodes.numbers(1))
    return nodes.add("Compress", ids, nodes.add("GreaterOrEqual", place, nodes.add("Gather", first, word_of)))


def _class(single: Sequence[str], found: Sequence[tuple[int, int]] = ()) -> str:
    """Returns a regular expression that matches one of the characters or a character in one of the ranges."""
    ranges = [*runs(single), *found]
    return "[" + "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in ranges) + "]"
