"""Difficult texts, which two implementations of a tokenizer often split differently."""

from __future__ import annotations

import functools
import itertools
import json
import random
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

SEED, MIXTURES = 9, 600
PER_TEXT = 48  # number of different Unicode characters in one difficult text
CONTROLS = (*range(1, 32), *range(127, 160))
REPEATED = {
    "a": (99, 100, 101, 199, 200, 201, 1000),
    "é": (100,),
    "中": (600,),
    "x.": (120,),
    "ab ": (700,),
    "😀😃": (60,),
}


@functools.cache
def texts() -> tuple[str, ...]:
    """Returns all difficult texts.

    Some difficult texts come from the file ``difficult_texts.json``. Some difficult texts contain control characters or
    very long words, or are very long. Some difficult texts are random mixtures of words and characters. Together, the
    difficult texts contain every assigned Unicode character except NUL.
    """
    stored: dict[str, list[str]] = json.loads(
        Path(__file__).with_name("difficult_texts.json").read_text(encoding="utf-8")
    )
    examples = list(itertools.chain.from_iterable(stored.values()))
    examples += [f"a{chr(point)}b {chr(point)} c" for point in CONTROLS]
    examples += [part * count for part, counts in REPEATED.items() for count in counts]
    characters = [character for character in map(chr, range(1, sys.maxunicode + 1)) if _is_assigned(character)]
    return (*examples, *_random_mixtures(examples, characters), *_unicode_texts(characters))


def _random_mixtures(examples: Sequence[str], characters: Sequence[str]) -> Iterator[str]:
    rng = random.Random(SEED)
    words = [word for text in examples for word in text.split(" ")]
    common = [character for character in characters if ord(character) < 0x3000]
    for _ in range(MIXTURES):
        parts = [rng.choice(words)[:20] for _ in range(rng.randint(1, 5))]
        parts += [rng.choice(common if rng.random() < 0.7 else characters) for _ in range(rng.randint(1, 8))]
        rng.shuffle(parts)
        yield rng.choice(("", " ")).join(parts)


def _unicode_texts(characters: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(characters), PER_TEXT):
        yield " ".join(f"x{character}y {character}" for character in characters[start : start + PER_TEXT])


def _is_assigned(character: str) -> bool:
    """Returns whether Unicode assigns the character; private-use characters and surrogates count as unassigned."""
    return unicodedata.category(character) not in ("Cn", "Co", "Cs")
