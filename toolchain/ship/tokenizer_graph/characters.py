"""Tables of the changes that a tokenizer's normaliser and pre-tokeniser make to each Unicode character."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toolchain.errors import ShippingError

SURROGATES = range(0xD800, 0xE000)  # Surrogates are not characters, and not valid in UTF-8.
# One call of the tokenizer tests a block of this many consecutive Unicode characters. For most blocks, one call is
# enough, because the tokenizer treats all characters of the block in the same way.
BLOCK = 256
# To test a character, the function `changes` puts the character between these two letters. No tokenizer changes these
# two letters.
LEFT, RIGHT = "a", "b"
DELETED, SPACE = "", " "
SHIP_WITHOUT_HINT = "Ship without --with-tokenizer."


def surround_with_spaces(character: str) -> str:
    """Adds a space before and after the character, so that the character becomes a separate word."""
    return f" {character} "


@functools.lru_cache(maxsize=1)
def changes(definition: str) -> Mapping[str, str]:
    """Returns the replacement of every character that the tokenizer changes; a space in a replacement ends a word.

    Args:
        definition: The tokenizer as JSON.

    Raises:
        ShippingError: The tokenizer does not treat each character independently.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    replacements: dict[str, str] = {}
    for characters in _blocks():
        framed = [f"{LEFT}{character}{RIGHT}" for character in characters]
        words = _split_words(tokenizer, " ".join(framed))
        if words == framed:
            continue
        if words == [LEFT + RIGHT] * len(characters):
            replacements |= dict.fromkeys(characters, DELETED)
        elif words == [part for character in characters for part in (LEFT, character, RIGHT)]:
            replacements |= {character: surround_with_spaces(character) for character in characters}
        else:
            for character, text in zip(characters, framed, strict=True):
                replacement = _find_replacement(tokenizer, text)
                if replacement != character:
                    replacements[character] = replacement
    return replacements


def runs(characters: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the first and last code point of each run of consecutive characters."""
    points = sorted(map(ord, characters))
    groups = itertools.groupby(enumerate(points), lambda pair: pair[1] - pair[0])
    runs_of_points = [[point for _, point in group] for _, group in groups]
    return [(run[0], run[-1]) for run in runs_of_points]


def _blocks() -> Iterator[list[str]]:
    for start in range(0, sys.maxunicode + 1, BLOCK):
        if start not in SURROGATES:
            yield [chr(point) for point in range(start, start + BLOCK)]


def _split_words(tokenizer: Any, text: str) -> list[str]:
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    pairs = tokenizer.pre_tokenizer.pre_tokenize_str(normal) if tokenizer.pre_tokenizer else [(normal, None)]
    return [word for word, _ in pairs]


def _find_replacement(tokenizer: Any, framed: str) -> str:
    words = _split_words(tokenizer, framed)
    text = SPACE.join(words)
    if any(SPACE in word for word in words) or not (text.startswith(LEFT) and text.endswith(RIGHT)):
        raise ShippingError(
            f"The tokenizer splits {framed!r} into {words}, so it does not treat each character independently. A "
            "tokenizer in the graph can only replace single characters.",
            SHIP_WITHOUT_HINT,
        )
    return text[len(LEFT) : -len(RIGHT)]


def group_by_kind(changed: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the characters that are ``deleted``, that become a ``space``, and that become separate ``words``.

    Args:
        changed: The replacement of each changed character, as returned by `changes`.
    """
    return {
        "deleted": [c for c, replacement in changed.items() if replacement == DELETED],
        "space": [c for c, replacement in changed.items() if replacement == SPACE],
        "words": [c for c, replacement in changed.items() if replacement == surround_with_spaces(c)],
    }
