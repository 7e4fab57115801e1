"""Sentences with labels, and the token arrays a session is given."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, DataError

if TYPE_CHECKING:
    import numpy as np

SST2 = Path(__file__).parent / "reference" / "sst2"
SST2_LABELS = ("NEGATIVE", "POSITIVE")
TEXT_COLUMNS = ("sentence", "text")
HELD_OUT = 2000
SENTENCE_WORDS = 12
FEWEST = 20
LONG = 64  # characters a token, beyond which a text is looked at from its start
SPLIT_SEED = 20  # one for all: what was held out once is never trained on


@dataclass(frozen=True)
class Data:
    """Sentences and their label indices; `sha256` over both tells one data set from another."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Digest of sentences and labels in order."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()

    def only(self, rows: Sequence[int]) -> Data:
        """These of the rows, in that order."""
        return Data(self.name, tuple(self.texts[row] for row in rows), tuple(self.labels[row] for row in rows))

    def sample(self, count: int, seed: int) -> tuple[str, ...]:
        """`count` sentences drawn without replacement (all of them where there are fewer)."""
        return tuple(random.Random(seed).sample(self.texts, min(count, len(self.texts))))


def embedded(split: str = "validation") -> Data:
    """The embedded SST-2, split ``train`` or ``validation``."""
    return _read(SST2 / f"{split}.tsv.gz", "sst2", None, "label", SST2_LABELS)


def load(spec: str | None, labels: Sequence[str], text_column: str | None = None, label_column: str = "label") -> Data:
    """What `--data` names, for a model with these `labels`; the embedded SST-2 where it is None.

    Raises `DataError` for a file that cannot be read, lacks a column, is empty, or has labels the model does not.
    """
    if spec is None:
        _check_labels(labels, "--data")
        return embedded()
    return _read(_file(spec), Path(spec).name, text_column, label_column, labels)


def _file(spec: str) -> Path:
    path = Path(spec)
    if not path.is_file():
        raise DataError(f"There is no file {spec}.", "Pass a CSV or TSV file with a text and a label column.")
    return path


def _check_labels(labels: Sequence[str], option: str) -> None:
    """Raises `DataError` unless the embedded sentences have this model's labels."""
    generic = all(name == f"LABEL_{i}" for i, name in enumerate(labels))
    if len(labels) != 2 or not (generic or tuple(n.upper() for n in labels) == SST2_LABELS):
        raise DataError(
            f"The embedded SST-2 has the labels {', '.join(SST2_LABELS)}; this model has {', '.join(labels)}.",
            f"Pass data of its own: {option} FILE.",
        )


@dataclass(frozen=True)
class TrainingSource:
    """Where training sentences come from: a `file` with its columns, or the embedded SST-2 where there is none."""

    file: str | None = None
    text_column: str | None = None
    label_column: str = "label"

    @functools.cached_property
    def digest(self) -> str:
        """Name, sha256 of the bytes and the columns that were named: the same text for the same sentences."""
        path = SST2 / "train.tsv.gz" if self.file is None else _file(self.file)
        name = "sst2" if self.file is None else path.name
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        columns = [self.text_column or "", self.label_column] if self.file else []
        return ":".join([name, found, *columns])

    def load(self, labels: Sequence[str]) -> Data:
        """The sentences, for a model with these `labels`; raises `DataError` as `inputs.load` does."""
        if self.file is None:
            _check_labels(labels, "--train-data")
            return embedded("train")
        return _read(_file(self.file), Path(self.file).name, self.text_column, self.label_column, labels)


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
    long = [row for row in rows if len(data.texts[row].split()) >= SENTENCE_WORDS]
    return list(long if len(long) >= 2 * wanted else rows)[:wanted]


def _read(path: Path, name: str, text_column: str | None, label_column: str, labels: Sequence[str]) -> Data:
    table = _table(path)
    columns = list(table.column_names)
    text = text_column or next((c for c in TEXT_COLUMNS if c in columns), None)
    for wanted, flag in ((text, "--text-column"), (label_column, "--label-column")):
        if wanted not in columns:
            what = f"no column {wanted!r}" if wanted else f"no column {' or '.join(map(repr, TEXT_COLUMNS))}"
            raise DataError(f"{path} has {what}; it has {', '.join(map(repr, columns))}.", f"Name it with {flag}.")
    return Data(name, tuple(table[text]), _indices(list(table[label_column]), path, labels))


def _table(path: Path) -> Any:
    """The file as a table of strings: a sentence `007` or `null` stays what it is."""
    import datasets
    import pandas

    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")):
        raise DataError(f"{path} is neither .csv nor .tsv.", "Convert it to CSV with a text and a label column.")
    # Tab-separated values have no quoting (IANA, GLUE): a stray quote must not swallow the rows that follow.
    dialect: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if name.endswith(".tsv") else {}
    try:
        with warnings.catch_warnings():
            # Rows longer than the header would otherwise lose a field, or turn one into an index.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            frame = pandas.read_csv(path, dtype=str, na_filter=False, index_col=False, **dialect)
    except (ValueError, OSError, pandas.errors.ParserWarning) as error:
        raise DataError(
            f"{path} cannot be read: {str(error).strip()}.",
            "Save it as UTF-8 with as many fields in every row as in the header; quote a text that has commas.",
        ) from error
    if frame.empty:
        raise DataError(f"{path} has no rows.", "Pass a file with at least one sentence.")
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


def _indices(values: Sequence[str], path: Path, labels: Sequence[str]) -> tuple[int, ...]:
    """The column as label indices: all of it names, or all of it indices, decided once."""
    found = [value.strip() for value in values]
    names = _by_name(found, labels)
    by_index = {str(index): index for index in range(len(labels))}
    chosen = names if all(value in names for value in found) else by_index
    if chosen is names and all(value in by_index and by_index[value] != names[value] for value in found):
        raise DataError(
            f"{path}: the labels {', '.join(sorted(set(found)))} are names of the model's labels and indices as well.",
            "Rename them in the model's config.json (id2label) and in the file.",
        )
    for row, value in enumerate(found, start=1):
        if value == "-1":
            raise DataError(
                f"{path}, row {row}: the label is -1, as in GLUE's test sets, whose labels are not public.",
                "Evaluate on a validation set.",
            )
        if value not in chosen:
            known = ", ".join(f"{index} {name}" for index, name in enumerate(labels))
            raise DataError(
                f"{path}, row {row}: the label {value!r} is not one of the model's ({known}).",
                "Correct the label column: all names, or all indices.",
            )
    return tuple(chosen[value] for value in found)


def _by_name(found: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Label name → index, as written; in any case where that is not ambiguous."""
    exact = {label: index for index, label in enumerate(labels)}
    folded = {label.casefold(): index for label, index in exact.items()}
    if len(folded) < len(labels):
        return exact
    return {**{value: folded[value.casefold()] for value in found if value.casefold() in folded}, **exact}


@dataclass(frozen=True)
class Encoder:
    """Text to token ids as the checkpoint's tokenizer, which lies in `folder`, gives them; and what the graph wants."""

    folder: Path
    tokenizer: Any
    names: tuple[str, ...]
    pad_id: int
    max_length: int

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
        pad = json.loads((folder / "config.json").read_text()).get("pad_token_id") or 0
        return cls(folder, tokenizer, tuple(names), pad, max_length)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, one list a text."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch([self._start(text) for text in texts])]

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
    for."""
    import numpy as np

    width = max(width, *(len(row) for row in ids))
    arrays = {name: np.zeros((len(ids), width), np.int64) for name in names}
    arrays["input_ids"][:] = pad_id
    for index, row in enumerate(ids):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        arrays["input_ids"][index, where] = row
        arrays["attention_mask"][index, where] = 1
    return arrays
