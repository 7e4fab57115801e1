"""The card of a trained checkpoint: the content of training.json, as `finetune` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired

from typing_extensions import TypedDict

from toolchain.artifacts.manifest_facts import Recovery
from toolchain.system.decoding import Amount, Check, Count, Line, Plain, decode, open_record, read_bytes


@open_record
class Judged(TypedDict):
    """Scores of the trained model; each task has its own scores."""

    data: Line
    rows: Count
    accuracy: NotRequired[float]
    balanced_accuracy: NotRequired[float]
    macro_f1: NotRequired[float]
    r2: NotRequired[float]
    mean_absolute_error: NotRequired[Amount]
    root_mean_squared_error: NotRequired[Amount]
    entity_f1: NotRequired[float]
    precision: NotRequired[float]
    recall: NotRequired[float]


_SCORES = (
    {"accuracy", "balanced_accuracy", "macro_f1"},
    {"r2", "mean_absolute_error", "root_mean_squared_error"},
    {"entity_f1", "precision", "recall"},
)


@open_record
class Card(TypedDict):
    """The content of training.json."""

    key: Line
    training: Recovery
    judged: Judged


def _check_card(card: Card) -> Card:
    if "score" not in card["training"] or not any(names <= set(card["judged"]) for names in _SCORES):
        raise ValueError("a score of the model is missing")
    return card


_STORED: Any = Annotated[Card, Plain, Check(_check_card)]


def read_card(path: Path) -> Card:
    """Returns the content of a training.json.

    Raises:
        ValueError: The content is not that of a training.json.
        OSError: The file cannot be read.
    """
    card: Card = decode(_STORED, read_bytes(path))
    return card
