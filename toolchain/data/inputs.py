"""Sentences with labels: the embedded SST-2, files, folders, hub data sets, and the held-out rows of training data."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.data import datasets, folders
from toolchain.data.datasets import DEFAULT_COLUMNS, Columns, LabelledTable
from toolchain.data.files import WORD, Text
from toolchain.data.labels import REGRESSION, SINGLE, SST2_LABELS, TOKENS, Answer, LabelSet, Targets, Tokens
from toolchain.errors import DataError

SST2 = Path(__file__).parent.parent / "reference" / "sst2"
MAX_HELD_OUT_ROWS = 2000
HELD_OUT_SPLIT, TRAIN_SPLIT, VALIDATION_SPLIT = "held-out", "train", "validation"
SENTENCE_WORDS = 12
MIN_ROWS = 20
_OTHER_ANSWERS = {REGRESSION: "a score", TOKENS: "a label for each word"}
SPLIT_SEED = 20  # One seed for all runs, so that no run trains on the held-out rows of another run.


@dataclass(frozen=True)
class Data:
    """Texts or pairs of texts, each with the correct answer.

    Attributes:
        name: Name of the data set.
        texts: The texts or pairs of texts, in the order of the data set.
        labels: Correct answer for each text or pair of texts, as in `LabelSet.answers`.
        label_set: Labels of the model.
    """

    name: str
    texts: tuple[Text, ...]
    labels: tuple[Answer, ...]
    label_set: LabelSet = field(default=SST2_LABELS, compare=False)

    @property
    def sha256(self) -> str:
        """Returns the sha256 in hex of texts and labels in order, which identifies the data set."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()

    @property
    def has_pairs(self) -> bool:
        """Returns whether the data set holds pairs of texts instead of single texts."""
        return bool(self.texts) and not isinstance(self.texts[0], str)

    def targets(self, ids: Sequence[Tokens]) -> Targets:
        """Returns the labels as targets of a loss; see `LabelSet.targets`."""
        return self.label_set.targets(self.labels, ids)

    def select(self, rows: Sequence[int]) -> Data:
        """Returns the data with the given rows only, in the given order."""
        texts, labels = tuple(self.texts[row] for row in rows), tuple(self.labels[row] for row in rows)
        return Data(self.name, texts, labels, self.label_set)

    def sample(self, count: int, seed: int) -> tuple[Text, ...]:
        """Returns `count` random texts without replacement, or all texts if there are fewer than `count`."""
        return tuple(random.Random(seed).sample(self.texts, min(count, len(self.texts))))


def data_from_table(table: LabelledTable, labels: LabelSet) -> Data:
    """Returns the texts and labels of `table` as `Data` for a model with these `labels`.

    Raises:
        DataError: The label column of `table` has a label that the model does not have. For token classification: the
            number of labels of a row differs from the number of its words.
    """
    answers = labels.answers(table.column)
    if labels.task == TOKENS:
        for number, (text, answer) in enumerate(zip(table.texts, answers, strict=True), start=1):
            if not isinstance(text, str):
                raise DataError(
                    f"{table.name} has pairs of texts, but the model labels the words of single texts.",
                    "Leave out --text-pair-column.",
                )
            words = len(WORD.findall(text))
            if not isinstance(answer, tuple) or len(answer) != words:
                fault = f"the row has {words} words, but {len(answer) if isinstance(answer, tuple) else 0} labels"
                hint = "Give one label for each word. Spaces separate the words of a text."
                raise table.column.row_error(number, fault, hint)
    return Data(table.name, table.texts, answers, labels)


def load_embedded(split: str = VALIDATION_SPLIT) -> Data:
    """Returns a split of the embedded SST-2, ``train`` or ``validation``."""
    return data_from_table(
        datasets.read_file(SST2 / f"{split}.tsv.gz", datasets.EMBEDDED, DEFAULT_COLUMNS), SST2_LABELS
    )


def load(spec: str | None, labels: LabelSet, columns: Columns = DEFAULT_COLUMNS, split: str | None = None) -> Data:
    """Returns the data that `--data` names.

    Args:
        spec: A file, a folder or a hub data set; None for the embedded SST-2.
        labels: Labels of the model.
        columns: Names of the text and label columns.
        split: Split of a data set; None for ``validation``. If `split` is ``held-out``, `spec` names training data, and
            the function returns the held-out rows of that data.

    Raises:
        DataError: The data is unreadable, lacks a column, is empty, or has a label that the model does not have.
    """
    if split == HELD_OUT_SPLIT:
        data = TrainingSource(spec, columns).load(labels)
        return data.select(hold_out(data)[1])
    if spec is None:
        _check_labels(labels, "--data")
        return load_embedded(_embedded_split(split or VALIDATION_SPLIT))
    return data_from_table(datasets.read(spec, columns, split, VALIDATION_SPLIT), labels)


def _embedded_split(split: str) -> str:
    if split not in (TRAIN_SPLIT, VALIDATION_SPLIT):
        raise DataError(
            f"The embedded SST-2 has no split {split!r}.",
            f"Use the split {TRAIN_SPLIT}, {VALIDATION_SPLIT} or {HELD_OUT_SPLIT}.",
        )
    return split


def fits_embedded_data(labels: LabelSet) -> bool:
    """Returns whether the embedded SST-2 fits a model with these `labels`.

    The model must have two labels and answer with one of them. The labels must have the names of SST-2, or default
    names such as LABEL_0.
    """
    has_sst2_names = tuple(name.upper() for name in labels.names) == SST2_LABELS.names
    return labels.task == SINGLE and len(labels.names) == 2 and (labels.has_default_names or has_sst2_names)


def _check_labels(labels: LabelSet, option: str) -> None:
    """Raises `DataError` unless the embedded sentences fit the model's labels."""
    if not fits_embedded_data(labels):
        if labels.task in _OTHER_ANSWERS:
            answers = f"this model answers with {_OTHER_ANSWERS[labels.task]}"
        else:
            kind = "multi-label model" if labels.multi_label else "model"
            answers = f"this {kind} has {', '.join(labels.names)}"
        raise DataError(
            f"The embedded SST-2 has the labels {', '.join(SST2_LABELS.names)}; {answers}.",
            f"Pass data with the model's labels: {option} FILE.",
        )


def data_name(digest: str) -> str:
    """Returns the data set's name for messages; `digest` is a `TrainingSource.digest` or a `Texts.digest`."""
    return digest.partition(":")[0]


@dataclass(frozen=True)
class TrainingSource:
    """The source of training sentences.

    Attributes:
        file: A file, a folder or a hub data set; None for the embedded SST-2.
        columns: Names of the text and label columns.
        split: Split of a data set; None for ``train``.
    """

    file: str | None = None
    columns: Columns = DEFAULT_COLUMNS
    split: str | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Returns an id of the training sentences: the source's name, a sha256, and the names of columns and split.

        The sha256 covers the bytes of the file or folder, or the texts and labels of a hub data set.
        """
        path = SST2 / "train.tsv.gz" if self.file is None else datasets.find_file(self.file)
        name = datasets.EMBEDDED if self.file is None else self.file if path is None else path.resolve().name
        if path is None:
            content_digest = self.read().sha256
        else:
            files = folders.choose_split(path, self.split, TRAIN_SPLIT) if path.is_dir() else path
            content_digest = folders.digest(files)
        column_names = [self.columns.text or "", self.columns.label] if self.file else []
        return ":".join([name, content_digest, *column_names, *filter(None, (self.columns.pair, self.split))])

    def read(self) -> LabelledTable:
        """Reads the training sentences with their label column.

        Raises:
            DataError: `datasets.read` fails, or the embedded SST-2 does not have the split.
        """
        if self.file is None:
            split = _embedded_split(self.split or TRAIN_SPLIT)
            return datasets.read_file(SST2 / f"{split}.tsv.gz", datasets.EMBEDDED, DEFAULT_COLUMNS, SST2_LABELS.names)
        return self._table

    @functools.cached_property
    def _table(self) -> LabelledTable:
        assert self.file is not None
        return datasets.read(self.file, self.columns, self.split, TRAIN_SPLIT)

    def load(self, labels: LabelSet) -> Data:
        """Returns the training sentences as `Data` for a model with these `labels`.

        Raises:
            DataError: As in `inputs.load`.
        """
        if self.file is None:
            _check_labels(labels, "--train-data")
        return data_from_table(self.read(), labels)


def hold_out(data: Data) -> tuple[list[int], list[int]]:
    """Splits training data into rows to train on and held-out rows.

    The function holds out a tenth of the rows, at most `MAX_HELD_OUT_ROWS`. If enough rows have at least
    `SENTENCE_WORDS` words, the function holds out only such rows, because results on phrases predict little about
    sentences.

    Returns:
        The indices of the training rows and of the held-out rows, both in seeded random order.

    Raises:
        DataError: The data has fewer than `MIN_ROWS` rows.
    """
    count = len(data.labels)
    if count < MIN_ROWS:
        raise DataError(
            f"{data.name} has {count} rows, which are too few for training.", f"Pass at least {MIN_ROWS} rows."
        )
    order = random.Random(SPLIT_SEED).sample(range(count), count)
    held_out_count = min(MAX_HELD_OUT_ROWS, count // 10)
    held_out_rows = sentence_rows(data, order, held_out_count)
    held_out_set = set(held_out_rows)
    return [row for row in order if row not in held_out_set], held_out_rows


def sentence_rows(data: Data, rows: Sequence[int], count: int) -> list[int]:
    """Returns the first `count` row indices in `rows` whose texts have at least `SENTENCE_WORDS` words.

    If fewer than 2 × `count` rows have at least `SENTENCE_WORDS` words, the function returns the first `count` rows of
    any length.
    """
    long_rows = [row for row in rows if _count_words(data.texts[row]) >= SENTENCE_WORDS]
    return list(long_rows if len(long_rows) >= 2 * count else rows)[:count]


def exclude_overlaps(data: Data, rows: Sequence[int], held_out_rows: Sequence[int]) -> list[int]:
    """Returns the `rows` whose text is not contained in a held-out text.

    In SST-2, phrases of a sentence are separate rows. A model that was trained on the phrases of a held-out sentence
    would get too high a score on this sentence.
    """
    joined = "\n".join(_one_line(data.texts[row]) for row in held_out_rows)
    return [row for row in rows if _one_line(data.texts[row]) not in joined]


def _one_line(text: Text) -> str:
    return " ".join((text if isinstance(text, str) else " ".join(text)).split())


def _count_words(text: Text) -> int:
    return len(_one_line(text).split())
