"""Sentences with labels, and the token arrays a session is given."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import tempfile
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
        generic = all(name == f"LABEL_{i}" for i, name in enumerate(labels))
        if len(labels) != 2 or not (generic or tuple(n.upper() for n in labels) == SST2_LABELS):
            raise DataError(
                f"The embedded SST-2 has the labels {', '.join(SST2_LABELS)}; this model has {', '.join(labels)}.",
                "Pass data of its own: --data FILE.",
            )
        return embedded()
    path = Path(spec).expanduser()
    if not path.is_file():
        raise DataError(f"There is no file {spec}.", "Pass a CSV or TSV file with a text and a label column.")
    return _read(path, path.name, text_column, label_column, labels)


def _read(path: Path, name: str, text_column: str | None, label_column: str, labels: Sequence[str]) -> Data:
    table = _table(path)
    columns = list(table.column_names)
    text = text_column or next((c for c in TEXT_COLUMNS if c in columns), None)
    for wanted, flag in ((text, "--text-column"), (label_column, "--label-column")):
        if wanted not in columns:
            what = f"no column {wanted!r}" if wanted else f"no column {' or '.join(map(repr, TEXT_COLUMNS))}"
            raise DataError(f"{path} has {what}; it has {', '.join(map(repr, columns))}.", f"Name it with {flag}.")
    texts = tuple(str(value) for value in table[text])
    indices = {label.lower(): index for index, label in enumerate(labels)}
    found = tuple(_label(value, row, path, indices) for row, value in enumerate(table[label_column], start=1))
    return Data(name, texts, found)


def _table(path: Path) -> Any:
    import datasets

    name = path.name.removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")):
        raise DataError(f"{path} is neither .csv nor .tsv.", "Convert it to CSV with a text and a label column.")
    # Tab-separated values have no quoting (IANA, GLUE): a stray quote must not swallow the rows that follow.
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.endswith(".tsv") else {}
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                "csv",
                data_files=str(path),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                na_filter=False,
                **dialect,
            )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = str(error.__cause__ or error).strip()
        raise DataError(
            f"{path} cannot be read: {cause}.", "Save it as UTF-8 with the same columns in every row."
        ) from error
    except (ValueError, OSError) as error:
        if "no data" in str(error):
            raise DataError(f"{path} has no rows.", "Pass a file with at least one sentence.") from error
        raise DataError(f"{path} cannot be read: {error}.", "Pass a CSV or TSV file.") from error


def _label(value: Any, row: int, path: Path, indices: dict[str, int]) -> int:
    text = str(value).strip()
    if text.lower() in indices:
        return indices[text.lower()]
    try:
        index = int(text)
    except ValueError:
        index = None
    if index == -1:
        raise DataError(
            f"{path}, row {row}: the label is -1, as in GLUE's test sets, whose labels are not public.",
            "Evaluate on a validation set.",
        )
    if index is None or not 0 <= index < len(indices):
        names = ", ".join(f"{i} {name}" for name, i in indices.items())
        raise DataError(
            f"{path}, row {row}: the label {text!r} is not one of the model's ({names}).", "Correct the label column."
        )
    return index


@dataclass(frozen=True)
class Encoder:
    """Text to token ids as the checkpoint's tokenizer gives them, and ids to the arrays the graph wants."""

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
        return cls(tokenizer, tuple(names), pad, max_length)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, one list a text."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]


def pad(ids: Sequence[Sequence[int]], names: Sequence[str], pad_id: int, left: bool = False) -> dict[str, np.ndarray]:
    """One batch as int64 arrays [batch, longest]: ids padded on one side, the mask, token types where asked for."""
    import numpy as np

    width = max(len(row) for row in ids)
    arrays = {name: np.zeros((len(ids), width), np.int64) for name in names}
    arrays["input_ids"][:] = pad_id
    for index, row in enumerate(ids):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        arrays["input_ids"][index, where] = row
        arrays["attention_mask"][index, where] = 1
    return arrays
