"""Entities in the labels of words: names of people, places and so on, written with one label for each word.

The label ``B-PER`` marks the first word of an entity of the kind ``PER``, and ``I-PER`` marks each further word. Any
other label, such as ``O``, marks a word outside of all entities. As in the evaluation of CoNLL-2000, an ``I-`` label
without an entity of its kind before it also starts an entity. See Tjong Kim Sang and Buchholz 2000, "Introduction to
the CoNLL-2000 Shared Task: Chunking".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_OTHER_SCHEMES = re.compile("[ELSU]-")
_FIRST, _FURTHER = "B-", "I-"

# An entity: its kind, the index of its first word, and the index after its last word.
Entity = tuple[str, int, int]


def find_entities(labels: Sequence[str]) -> list[Entity]:
    """Returns the entities in the labels of a text's words, in order."""
    entities: list[Entity] = []
    for index, label in enumerate(labels):
        kind = kind_of_entity(label)
        if kind is None:
            continue
        if label.startswith(_FURTHER) and entities and entities[-1][0] == kind and entities[-1][2] == index:
            entities[-1] = (kind, entities[-1][1], index + 1)
        else:
            entities.append((kind, index, index + 1))
    return entities


def describe_entities(
    text: str, spans: Sequence[tuple[int, int, int]], probabilities: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the entities that a model finds in a text, in order.

    The label of a word is the label of its first token.

    Args:
        text: The text.
        spans: For each word, the position of its first token, and its start and end in the text, in characters.
        probabilities: Label probabilities of each token, of shape [tokens, labels].
        names: Names of the labels, by index.

    Returns:
        For each entity: its kind as ``label``, its ``text``, its ``start`` and ``end`` in characters, and its
        ``score``, which is the smallest probability of its words' labels.
    """
    words = probabilities[[position for position, _, _ in spans]]
    shares = words.max(axis=1)
    entities = []
    for kind, first, last in find_entities([names[index] for index in words.argmax(axis=1)]):
        start, end = spans[first][1], spans[last - 1][2]
        score = round(float(shares[first:last].min()), 6)
        entities.append({"label": kind, "text": text[start:end], "start": start, "end": end, "score": score})
    return entities


def check_names(names: Sequence[str]) -> str:
    """Returns the reason why label names cannot mark entities in the BIO scheme; empty if they can."""
    if not any(kind_of_entity(name) for name in names):
        return "none begins with B- or I-"
    if other := next((name for name in names if _OTHER_SCHEMES.match(name)), None):
        return f"{other} belongs to another scheme than BIO"
    return "" if any(kind_of_entity(name) is None for name in names) else "none is for words outside of entities"


def kind_of_entity(label: str) -> str | None:
    """Returns the kind of entity that a label marks; None for a label outside of entities."""
    return label[len(_FIRST) :] or None if label.startswith((_FIRST, _FURTHER)) else None
