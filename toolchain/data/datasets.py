"""Reads labelled texts from a file, a folder or a hub data set: one or two columns of texts, and a column of labels.

The name of a hub data set is ``user/name`` or ``user/name:config``. ``glue/sst2`` means ``nyu-mll/glue:sst2``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.data import folders
from toolchain.data.files import Text, require_column, text_columns, text_of
from toolchain.data.labels import Column, Value
from toolchain.data.tables import FORMATS, Header, Table, kind_of
from toolchain.errors import DataError, first_line

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_GLUE = "glue/"
EMBEDDED = "sst2"  # name of the embedded data
_NUMERIC = (int, float)


@dataclass(frozen=True)
class Columns:
    """Names of columns.

    Attributes:
        text: Column of the texts; None for ``sentence`` or ``text``.
        label: Column of the labels.
        pair: Column of the second texts if rows are pairs; None otherwise.
    """

    text: str | None = None
    label: str = "label"
    pair: str | None = None


DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True)
class LabelledTable:
    """A table in memory: its name, its texts or pairs of texts, and its label column."""

    name: str
    texts: tuple[Text, ...]
    column: Column

    @functools.cached_property
    def sha256(self) -> str:
        """Returns the sha256 in hex of the texts, the labels and the class names."""
        body = [self.texts, list(self.column.values), self.column.classes]
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def read(spec: str, columns: Columns, split: str | None, default_split: str) -> LabelledTable:
    """Reads a file, or a split of a folder or of a hub data set.

    Args:
        spec: Path of a file or folder, or name of a hub data set.
        columns: The columns to read.
        split: Split of a data set; None for `default_split`.
        default_split: Split of a data set that is read if `split` is None.

    Raises:
        DataError: The table does not exist, is unreadable, lacks a column or has no rows, or `split` is set for a file.
    """
    path = find_file(spec)
    if path is None:
        return read_hub(spec, columns, split or default_split)
    if path.is_dir():
        return read_file(folders.choose_split(path, split, default_split), path.resolve().name, columns)
    if split:
        raise DataError(
            f"{spec} is a file, which has no split {split!r}.", "Leave --split out, or use --split held-out."
        )
    return read_file(path, path.name, columns)


def find_file(spec: str) -> Path | None:
    """Returns the file or folder that `spec` names, or None if `spec` has the form of a hub data set's name.

    Raises:
        DataError: `spec` names no file or folder and does not have the form of a hub data set's name.
    """
    path = Path(spec)
    if path.is_file() or path.is_dir():
        return path
    if kind_of(spec) in FORMATS or path.exists() or not _HUB.fullmatch(spec):
        raise DataError(
            f"There is no file {spec}.",
            "Pass a CSV, TSV, JSON lines or Parquet file with a text and a label column, a folder of Parquet files, or "
            "a hub dataset such as glue/sst2.",
        )
    return None


def read_file(path: Path, name: str, columns: Columns, classes: Sequence[str] = ()) -> LabelledTable:
    """Reads the table in a file or folder.

    Args:
        path: The file, or a folder without splits.
        name: Name of the data set.
        columns: The columns to read.
        classes: Class names for the indices in the label column; empty to take the class names in the metadata of a
            Parquet or Arrow file, if there are any.

    Raises:
        DataError: The file is unreadable, lacks a column or has no rows, or a row has no valid text or label.
    """
    table, names, class_names = Table(str(path)), list[str](), list(classes)

    def choose(header: Header) -> list[str]:
        names.extend(text_columns(header, columns.text, columns.pair, table.file))
        names.append(require_column(header, columns.label, table.file, "--label-column"))
        class_names.extend(() if classes else header.classes.get(columns.label, ()))
        return names

    return _collect_rows(name, table, names, table.read(choose), class_names)


def read_hub(spec: str, columns: Columns, split: str) -> LabelledTable:
    """Reads a split of a hub data set with its class names, from the hub or from the local cache.

    Raises:
        DataError: The split is unavailable, lacks a column or has no rows, or a row has no valid text or label.
    """
    data = _download(spec, split)
    header = list(data.column_names)
    source = f"{spec}, split {split}"
    names = text_columns(header, columns.text, columns.pair, source)
    names.append(require_column(header, columns.label, source, "--label-column"))
    feature = data.features[columns.label]
    classes = tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())
    rows = (tuple(row[name] for name in names) for row in data.select_columns(list(dict.fromkeys(names))))
    return _collect_rows(spec, Table(source), names, rows, classes)


def hub_dataset(name: str) -> tuple[str, str | None] | None:
    """Returns the hub id and the config of the data set with this name; None if the name is that of a file.

    Args:
        name: Name of data: of a file, of a hub data set, or ``sst2`` for the embedded SST-2.
    """
    if name == EMBEDDED:
        name = _GLUE + EMBEDDED
    if kind_of(name) in FORMATS or not _HUB.fullmatch(name):
        return None
    path, _, config = name.partition(":")
    if path.startswith(_GLUE):
        path, config = "nyu-mll/glue", path.removeprefix(_GLUE)
    return path, config or None


def _download(spec: str, split: str) -> Any:
    import datasets

    path, config = hub_dataset(spec) or (spec, None)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the library `datasets` raises errors of many classes
        cause = first_line(error)
        raise DataError(
            f"{spec}, split {split}, cannot be loaded: {cause.rstrip('.')}.",
            "Check the name, the config (user/name:config) and --split. Without a network, use a cached dataset "
            "or pass a file.",
        ) from error


def _collect_rows(
    name: str, table: Table, names: Sequence[str], rows: Iterable[tuple[Any, ...]], classes: Sequence[str]
) -> LabelledTable:
    texts: list[Text] = []
    values: list[Value] = []
    first_kind = ""
    for number, row in enumerate(rows, start=1):
        texts.append(text_of(row[:-1], names[:-1], number, table))
        kind = _label_kind(row[-1])
        first_kind = first_kind or kind
        if kind != first_kind:
            raise table.row_error(
                number, f"the label is {kind}, but earlier rows have {first_kind}", "Use one kind of label in all rows."
            )
        values.append(_label_value(row[-1], number, table))
    if not texts:
        raise DataError(f"{table.file} has no rows.", "Pass at least one row.")
    return LabelledTable(name, tuple(texts), Column(values, table.file, tuple(classes)))


def _label_kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, _NUMERIC):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list | tuple) else "nothing"


def _label_value(value: Any, number: int, table: Table) -> Value:
    """Returns a label as a text or a tuple of texts: 1.0 becomes ``1``, 2.5 becomes ``2.5``, a list becomes a tuple."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, list | tuple):
        members = [_label_value(member, number, table) for member in value]
        if all(isinstance(member, str) for member in members):
            return tuple(member.strip() for member in members if isinstance(member, str))
    raise table.row_error(number, f"the label is {value!r}", "Use a name, a number, or a list of these as the label.")
