"""Sentences with labels, and the token arrays a session is given."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data import datasets
from toolchain.data.datasets import USUAL, Columns, Labelled
from toolchain.data.files import Text
from toolchain.data.labels import MULTI, SST2_LABELS, LabelSet
from toolchain.errors import CheckpointError, DataError

if TYPE_CHECKING:
    import numpy as np

SST2 = Path(__file__).parent.parent / "reference" / "sst2"
HELD_OUT = 2000
HELD_OUT_SPLIT, TRAIN_SPLIT, VALIDATION_SPLIT = "held-out", "train", "validation"
SENTENCE_WORDS = 12
TOKEN_TYPES = "token_type_ids"
FEWEST = 20
LONG = 64  # characters a token, beyond which a text is looked at from its start
SPLIT_SEED = 20  # one for all: what was held out once is never trained on


@dataclass(frozen=True)
class Data:
    """Texts, or pairs of texts, and the answer to each by a model with these `label_set`; `sha256` over texts and
    answers tells one data set from another."""

    name: str
    texts: tuple[Text, ...]
    labels: tuple[int, ...]
    label_set: LabelSet = field(default=SST2_LABELS, compare=False)

    @property
    def sha256(self) -> str:
        """Digest of texts and labels in order."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()

    @property
    def paired(self) -> bool:
        """Whether each row has two texts."""
        return bool(self.texts) and not isinstance(self.texts[0], str)

    @property
    def targets(self) -> list[int] | list[list[float]]:
        """The labels as a loss takes them; see `LabelSet.targets`."""
        return self.label_set.targets(self.labels)

    def only(self, rows: Sequence[int]) -> Data:
        """These of the rows, in that order."""
        texts, labels = tuple(self.texts[row] for row in rows), tuple(self.labels[row] for row in rows)
        return Data(self.name, texts, labels, self.label_set)

    def sample(self, count: int, seed: int) -> tuple[Text, ...]:
        """`count` texts drawn without replacement (all of them where there are fewer)."""
        return tuple(random.Random(seed).sample(self.texts, min(count, len(self.texts))))


def labelled(found: Labelled, labels: LabelSet) -> Data:
    """A table that was read, for a model with these `labels`; raises `DataError` where it has others."""
    return Data(found.name, found.texts, labels.indices(found.column), labels)


def embedded(split: str = VALIDATION_SPLIT) -> Data:
    """The embedded SST-2, split ``train`` or ``validation``."""
    return labelled(datasets.of_file(SST2 / f"{split}.tsv.gz", "sst2", USUAL), SST2_LABELS)


def load(spec: str | None, labels: LabelSet, columns: Columns = USUAL, split: str | None = None) -> Data:
    """What `--data` names, for a model with these `labels`; the embedded SST-2 where it is None.

    A file, or a data set of the hub, of which it is the split named (``validation`` by default); ``held-out`` is what
    training with the same name leaves out. Raises `DataError` for what cannot be read, lacks a column, is empty, or has
    labels the model does not.
    """
    if split == HELD_OUT_SPLIT:
        data = TrainingSource(spec, columns).load(labels)
        return data.only(hold_out(data)[1])
    if spec is None:
        _check_labels(labels, "--data")
        return embedded(_embedded_split(split or VALIDATION_SPLIT))
    return labelled(datasets.read(spec, columns, split, VALIDATION_SPLIT), labels)


def _embedded_split(split: str) -> str:
    if split not in (TRAIN_SPLIT, VALIDATION_SPLIT):
        raise DataError(
            f"The embedded SST-2 has no split {split!r}.",
            f"It has {TRAIN_SPLIT}, {VALIDATION_SPLIT} and {HELD_OUT_SPLIT}.",
        )
    return split


def embedded_fits(labels: LabelSet) -> bool:
    """Whether the embedded sentences have this model's labels."""
    same = tuple(name.upper() for name in labels.names) == SST2_LABELS.names
    return not labels.multi and len(labels.names) == 2 and (labels.generic or same)


def _check_labels(labels: LabelSet, option: str) -> None:
    """Raises `DataError` unless the embedded sentences have this model's labels."""
    if not embedded_fits(labels):
        what = "any number of " if labels.multi else ""
        raise DataError(
            f"The embedded SST-2 has the labels {', '.join(SST2_LABELS.names)}; this model has "
            f"{what}{', '.join(labels.names)}.",
            f"Pass data of its own: {option} FILE.",
        )


@dataclass(frozen=True)
class TrainingSource:
    """Where training sentences come from: a `file` or a data set of the hub with its columns and split, or the embedded
    SST-2 where there is none."""

    file: str | None = None
    columns: Columns = USUAL
    split: str | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Name, sha256 of the bytes (of the hub's data, of what was read) and the columns that were named: the same
        text for the same sentences."""
        path = SST2 / "train.tsv.gz" if self.file is None else datasets.file_of(self.file)
        name = "sst2" if self.file is None else self.file if path is None else path.name
        if path is None:
            found = self.read().sha256
        else:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        named = [self.columns.text or "", self.columns.label] if self.file else []
        return ":".join([name, found, *named, *filter(None, (self.columns.pair, self.split))])

    def read(self) -> Labelled:
        """The sentences with what their column says of them; raises `DataError` for what cannot be read."""
        if self.file is None:
            split = _embedded_split(self.split or TRAIN_SPLIT)
            return datasets.of_file(SST2 / f"{split}.tsv.gz", "sst2", USUAL, SST2_LABELS.names)
        return self._table

    @functools.cached_property
    def _table(self) -> Labelled:
        assert self.file is not None
        return datasets.read(self.file, self.columns, self.split, TRAIN_SPLIT)

    def load(self, labels: LabelSet) -> Data:
        """The sentences, for a model with these `labels`; raises `DataError` as `inputs.load` does."""
        if self.file is None:
            _check_labels(labels, "--train-data")
        return labelled(self.read(), labels)


def hold_out(data: Data) -> tuple[list[int], list[int]]:
    """The rows of training data in two parts, in seeded random order: what trains, and what choices are made on.

    `HELD_OUT` rows, a tenth where there are few, are held out; of sentence length (`SENTENCE_WORDS`) where there are
    enough of these, since phrases say little about sentences. Raises `DataError` for fewer than `FEWEST` rows.
    """
    count = len(data.labels)
    if count < FEWEST:
        raise DataError(f"{data.name} has {count} rows: too few to train on.", f"Pass at least {FEWEST}.")
    order = random.Random(SPLIT_SEED).sample(range(count), count)
    wanted = min(HELD_OUT, count // 10)
    held = sentence_rows(data, order, wanted)
    taken = set(held)
    return [row for row in order if row not in taken], held


def sentence_rows(data: Data, rows: Sequence[int], wanted: int) -> list[int]:
    """The first `wanted` of `rows` that are of sentence length, or simply the first where these are too few."""
    long = [row for row in rows if _words(data.texts[row]) >= SENTENCE_WORDS]
    return list(long if len(long) >= 2 * wanted else rows)[:wanted]


def _words(text: Text) -> int:
    return len((text if isinstance(text, str) else " ".join(text)).split())


class Tokens(list[int]):
    """The token ids of a text or pair; `types` says of each which of two texts it is of (0 or 1), where there are two
    and the tokenizer tells."""

    types: Sequence[int] = ()


@dataclass(frozen=True)
class Encoder:
    """Text to token ids as the checkpoint's tokenizer, which lies in `folder`, gives them; what the graph wants, and
    whether it answers with a set of labels (`multi_label`)."""

    folder: Path
    tokenizer: Any
    names: tuple[str, ...]
    pad_id: int
    max_length: int
    multi_label: bool = False

    @classmethod
    def open(cls, folder: Path, names: Sequence[str], max_length: int) -> Encoder:
        """Reads an artifact's tokenizer.json, whose padding is switched off and truncation set to `max_length`."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} cannot be read: {error}.", "Import the model again."
            ) from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        config = json.loads((folder / "config.json").read_text())
        pad, multi = config.get("pad_token_id") or 0, config.get("problem_type") == MULTI
        return cls(folder, tokenizer, tuple(names), pad, max_length, multi)

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Token ids with special tokens, one list a text or pair, which is cut off at its longer end."""
        starts = [self._start(text) if isinstance(text, str) else tuple(map(self._start, text)) for text in texts]
        found = []
        for encoding in self.tokenizer.encode_batch(starts):
            found.append(row := Tokens(encoding.ids))
            if any(encoding.type_ids):
                row.types = encoding.type_ids
        return found

    def _start(self, text: str) -> str:
        """As much of the text as decides its first `max_length` tokens: all of it, unless it is a book.

        Tokenizers split a text whole before they cut it off, at hundreds of bytes a token. What stands before a word
        does not depend on what comes after, so a start of twice as many tokens as are kept has the same first ones.
        """
        size = LONG * self.max_length
        while size < len(text):
            space = max(text.rfind(" ", size - LONG, size), text.rfind("\n", size - LONG, size))
            start = text[: space if space > 0 else size]
            encoding = self.tokenizer.encode(start)
            if len(encoding.overflowing) > 1:
                return start
            size *= 4
        return text


def pad(
    ids: Sequence[Sequence[int]], names: Sequence[str], pad_id: int, left: bool = False, width: int = 0
) -> dict[str, np.ndarray]:
    """One batch as int64 arrays [batch, longest or `width`]: ids padded on one side, the mask, token types where asked
    for, which are those of the rows that have any."""
    import numpy as np

    width = max(width, *(len(row) for row in ids))
    arrays = {name: np.zeros((len(ids), width), np.int64) for name in names}
    arrays["input_ids"][:] = pad_id
    for index, row in enumerate(ids):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        arrays["input_ids"][index, where] = row
        arrays["attention_mask"][index, where] = 1
        if isinstance(row, Tokens) and row.types and TOKEN_TYPES in arrays:
            arrays[TOKEN_TYPES][index, where] = row.types
    return arrays
