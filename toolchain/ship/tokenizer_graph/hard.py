"""Difficult texts, which tokenizers often split differently."""

from __future__ import annotations

import functools
import itertools
import json
import random
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

SEED, MIXED = 9, 600
PER_TEXT = 48  # characters of Unicode in one text
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

    They are the texts of ``hard.json``, control characters, words and texts of excessive length, random mixtures of
    these with other characters, and every assigned character of Unicode except NUL.
    """
    written: dict[str, list[str]] = json.loads(Path(__file__).with_name("hard.json").read_text(encoding="utf-8"))
    found = list(itertools.chain.from_iterable(written.values()))
    found += [f"a{chr(point)}b {chr(point)} c" for point in CONTROLS]
    found += [part * count for part, counts in REPEATED.items() for count in counts]
    known = [character for character in map(chr, range(1, sys.maxunicode + 1)) if _assigned(character)]
    return (*found, *_mixed(found, known), *_every(known))


def _mixed(found: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    rng = random.Random(SEED)
    words = [word for text in found for word in text.split(" ")]
    narrow = [character for character in known if ord(character) < 0x3000]
    for _ in range(MIXED):
        parts = [rng.choice(words)[:20] for _ in range(rng.randint(1, 5))]
        parts += [rng.choice(narrow if rng.random() < 0.7 else known) for _ in range(rng.randint(1, 8))]
        rng.shuffle(parts)
        yield rng.choice(("", " ")).join(parts)


def _every(known: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(known), PER_TEXT):
        yield " ".join(f"x{character}y {character}" for character in known[start : start + PER_TEXT])


def _assigned(character: str) -> bool:
    """Returns whether Python's Unicode has the character: not unassigned, private use or a surrogate."""
    return unicodedata.category(character) not in ("Cn", "Co", "Cs")
