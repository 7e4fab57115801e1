"""Scores the texts of a work unit: a pure function from texts to a table of answers, for every engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.data.files import Text, group_texts
from toolchain.data.labels import LabelSet
from toolchain.errors import CheckpointError
from toolchain.predict import WINDOW_CHARACTERS, LoadedModel, answer_values, predict_texts

# The texts of one window are tokenised together and sorted by length.
WINDOW_TEXTS = 8192


@dataclass(frozen=True)
class Answers:
    """The answers to the texts of a work unit.

    Attributes:
        rows: Indices of the texts that have an answer, in order.
        table: The answers, one row for each index in `rows`, as a table of pyarrow.
        faults: Index and reason for each text on which the tokenizer fails.
    """

    rows: list[int]
    table: Any
    faults: list[tuple[int, str]]


def score_texts(
    loaded_model: LoadedModel,
    label_set: LabelSet,
    names: Sequence[str],
    texts: Sequence[Text],
    skipped: Sequence[int] = (),
) -> Answers:
    """Returns the answers to texts, in order.

    Args:
        loaded_model: The model.
        label_set: Labels of the model.
        names: Names of the columns of the answers; see `Model.answer_columns`.
        texts: The texts or pairs of texts.
        skipped: Indices of texts that need no answer.
    """
    omitted, faults = set(skipped), list[tuple[int, str]]()
    rows: list[int] = []
    values: list[list[Any]] = []
    for window in _windows(texts):
        indices = [index for index in window if index not in omitted]
        try:
            predictions = predict_texts(loaded_model, label_set, [texts[index] for index in indices])
        except CheckpointError:
            found = dict(_find_faults(loaded_model, texts, indices))
            if not found:
                raise
            faults += found.items()
            indices = [index for index in indices if index not in found]
            predictions = predict_texts(loaded_model, label_set, [texts[index] for index in indices])
        values += [answer_values(label_set, prediction) for prediction in predictions]
        rows += indices
    return Answers(rows, _to_table(names, values), faults)


def _windows(texts: Sequence[Text]) -> Iterator[range]:
    start = 0
    for group in group_texts(texts, WINDOW_TEXTS, WINDOW_CHARACTERS):
        yield range(start, start + len(group))
        start += len(group)


def _find_faults(loaded_model: LoadedModel, texts: Sequence[Text], indices: Sequence[int]) -> list[tuple[int, str]]:
    """Returns index and reason for each text on which the tokenizer fails; halves the texts to find these."""
    if not indices:
        return []
    try:
        loaded_model.encode([texts[index] for index in indices])
    except CheckpointError as error:
        if len(indices) == 1:
            return [(indices[0], error.cause.rstrip("."))]
        middle = len(indices) // 2
        return [
            *_find_faults(loaded_model, texts, indices[:middle]),
            *_find_faults(loaded_model, texts, indices[middle:]),
        ]
    return []


def _to_table(names: Sequence[str], values: Sequence[Sequence[Any]]) -> Any:
    import pyarrow

    columns = list(zip(*values, strict=True)) or [()] * len(names)
    arrays = []
    for name, column in zip(names, columns, strict=True):
        if name == "score" or name.startswith("score_"):
            arrays.append(pyarrow.array(column, pyarrow.float32()))
        else:
            texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in column]
            arrays.append(pyarrow.array(texts, pyarrow.string()))
    return pyarrow.table(arrays, names=list(names))
