"""What a tokenizer's normaliser and pre-tokeniser make of each character of Unicode, found by asking them."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toolchain.errors import ShippingError

SURROGATES = range(0xD800, 0xE000)  # no characters, and in no UTF-8
BLOCK = 256  # characters asked about at once, most of which are treated alike
LEFT, RIGHT = "a", "b"  # what a character is put between; these stay as they are in every tokenizer
DELETED, SPACE = "", " "
WITHOUT = "Ship without --with-tokenizer."


def spaced(character: str) -> str:
    """What stands for a character that is a word of its own."""
    return f" {character} "


@functools.lru_cache(maxsize=1)
def changes(definition: str) -> Mapping[str, str]:
    """Every character that does not stay as it is → what stands in its place, where a space ends a word; `definition`
    is the tokenizer's JSON.

    Raises `ShippingError` for a tokenizer that does more than treat one character after the other.
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
    """Code points in order → first and last of each run without a gap."""
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
    """The characters that are deleted, that become a space, and that become words of their own."""
    return {
        "deleted": [c for c, became in changed.items() if became == DELETED],
        "space": [c for c, became in changed.items() if became == SPACE],
        "words": [c for c, became in changed.items() if became == spaced(c)],
    }
