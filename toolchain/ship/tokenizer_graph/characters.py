"""The effect of a tokenizer's normaliser and pre-tokeniser on each character of Unicode, found by running them."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toolchain.errors import ShippingError

SURROGATES = range(0xD800, 0xE000)  # not characters, and not valid in UTF-8
BLOCK = 256  # characters per call; the tokenizer treats most blocks uniformly
LEFT, RIGHT = "a", "b"  # letters around a tested character; no tokenizer changes them
DELETED, SPACE = "", " "
WITHOUT = "Ship without --with-tokenizer."


def spaced(character: str) -> str:
    """Returns the replacement of a character that is a separate word."""
    return f" {character} "


@functools.lru_cache(maxsize=1)
def changes(definition: str) -> Mapping[str, str]:
    """Returns the replacement of every character that the tokenizer changes; a space in it ends a word.

    Args:
        definition: The tokenizer's JSON.

    Raises:
        ShippingError: The tokenizer does not treat each character independently.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    found: dict[str, str] = {}
    for characters in _blocks():
        framed = [f"{LEFT}{character}{RIGHT}" for character in characters]
        words = _words(tokenizer, " ".join(framed))
        if words == framed:
            continue
        if words == [LEFT + RIGHT] * len(characters):
            found |= dict.fromkeys(characters, DELETED)
        elif words == [part for character in characters for part in (LEFT, character, RIGHT)]:
            found |= {character: spaced(character) for character in characters}
        else:
            for character, text in zip(characters, framed, strict=True):
                became = _became(tokenizer, text)
                if became != character:
                    found[character] = became
    return found


def runs(characters: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the first and last code point of each run of consecutive characters."""
    points = sorted(map(ord, characters))
    groups = itertools.groupby(enumerate(points), lambda pair: pair[1] - pair[0])
    found = [[point for _, point in group] for _, group in groups]
    return [(run[0], run[-1]) for run in found]


def _blocks() -> Iterator[list[str]]:
    for start in range(0, sys.maxunicode + 1, BLOCK):
        if start not in SURROGATES:
            yield [chr(point) for point in range(start, start + BLOCK)]


def _words(tokenizer: Any, text: str) -> list[str]:
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    pairs = tokenizer.pre_tokenizer.pre_tokenize_str(normal) if tokenizer.pre_tokenizer else [(normal, None)]
    return [word for word, _ in pairs]


def _became(tokenizer: Any, framed: str) -> str:
    words = _words(tokenizer, framed)
    text = SPACE.join(words)
    if any(SPACE in word for word in words) or not (text.startswith(LEFT) and text.endswith(RIGHT)):
        raise ShippingError(
            f"The tokenizer makes {words} of {framed!r}: it does more than treat one character after the other, which "
            "is all that a tokenizer in the graph can do.",
            WITHOUT,
        )
    return text[len(LEFT) : -len(RIGHT)]


def by_kind(changed: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns three lists: ``deleted`` characters, those that become a ``space``, and separate ``words``.

    Args:
        changed: Replacements by character, from `changes`.
    """
    return {
        "deleted": [c for c, became in changed.items() if became == DELETED],
        "space": [c for c, became in changed.items() if became == SPACE],
        "words": [c for c, became in changed.items() if became == spaced(c)],
    }
