"""Reads texts from a table or from plain lines, one by one and in bounded memory."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from toolchain.data import folders
from toolchain.data.tables import RowLines, Table, convert_read_errors, has_columns
from toolchain.errors import DataError

# One text, or a pair of texts that together are one input of the model.
Text = str | tuple[str, str]
TEXT_COLUMNS = ("sentence", "text", "tokens")
WORD = re.compile(r"\S+")
STDIN = "-"
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Texts:
    """A source of texts.

    Attributes:
        file: Name of a file or of a folder of files; ``-`` for plain lines on standard input.
        column: Column of the texts; None for ``sentence`` or ``text``.
        pair: Column of the second texts if rows are pairs; None otherwise.
    """

    file: str
    column: str | None = None
    pair: str | None = None

    def read(self) -> Iterator[Text]:
        """Yields every text or pair in order, and holds only a few of them in memory.

        Raises:
            DataError: The file is missing, is not UTF-8, lacks the column, has a row longer than `MAX_ROW_SIZE`, or has
                a value that is not a text. The error message names the faulty row where possible.
        """
        if self.file == STDIN or not has_columns(self.file):
            yield from self._lines()
            return
        table, names = Table(self.file), list[str]()

        def choose(header: Sequence[str]) -> list[str]:
            names.extend(text_columns(header, self.column, self.pair, self.file))
            return names

        for number, row in enumerate(table.read(choose), start=1):
            yield text_of(row, names, number, table)

    @functools.cached_property
    def sha256(self) -> str:
        """Returns the sha256 in hex of the file or folder; empty for standard input, which can be read only once.

        Raises:
            DataError: The file is unreadable.
        """
        if self.file == STDIN:
            return ""
        with convert_read_errors(self.file):
            return folders.digest(Path(self.file))

    @property
    def columns(self) -> list[str]:
        """Returns the columns of texts that the user named."""
        return [name for name in (self.column, self.pair) if name]

    @property
    def digest(self) -> str:
        """Returns an id of the texts. It has the file's name and sha256, and the columns that the user named."""
        return ":".join([Path(self.file).name, self.sha256, *self.columns])

    def count(self) -> int | None:
        """Returns the number of texts, or None for standard input, which can be read only once.

        It reads all texts, so that a faulty row raises an error before the first prediction.
        """
        return None if self.file == STDIN else sum(1 for _ in self.read())

    def _lines(self) -> Iterator[str]:
        if self.columns:
            raise DataError(
                f"{self.file} has plain lines, which have no columns.", "Leave out the options that name columns."
            )
        with convert_read_errors(self.file):
            stream: AbstractContextManager[IO[str]] = (
                nullcontext(_set_utf8(sys.stdin))  # standard input must stay open
                if self.file == STDIN
                else open(self.file, encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by the with below)
            )
            with stream as lines:
                row_lines = RowLines(lines, self.file)
                for line in row_lines:
                    row_lines.begin_row()
                    yield line.rstrip("\r\n")


def group_texts(texts: Iterable[Text], count: int, characters: int) -> Iterator[list[Text]]:
    """Yields lists of consecutive texts, each as soon as it is full.

    Args:
        texts: The texts or pairs of texts.
        count: Largest number of texts in a list.
        characters: Largest number of characters of all texts in a list; a longer text has its own list.
    """
    group: list[Text] = []
    size = 0
    for text in texts:
        length = len(text) if isinstance(text, str) else sum(map(len, text))
        if group and size + length > characters:
            yield group
            group, size = [], 0
        group.append(text)
        size += length
        if len(group) == count:
            yield group
            group, size = [], 0
    if group:
        yield group


def text_columns(names: Sequence[str], text: str | None, pair: str | None, file: str) -> list[str]:
    """Returns the column of texts, followed by the column of second texts if `pair` is set.

    Args:
        names: Columns of the file.
        text: Column of the texts; None for ``sentence`` or ``text``.
        pair: Column of the second texts if rows are pairs; None otherwise.
        file: Name of the file, for error messages.

    Raises:
        DataError: The file lacks a column.
    """
    if text is None and not any(name in names for name in TEXT_COLUMNS):
        fault = f"none of the columns {', '.join(map(repr, TEXT_COLUMNS))}"
        raise DataError(
            f"{file} has {fault}. Its columns: {_format_names(names)}.", "Name the column of texts with --text-column."
        )
    text = text or next(name for name in TEXT_COLUMNS if name in names)
    text_column = require_column(names, text, file, "--text-column")
    return [text_column, require_column(names, pair, file, "--text-pair-column")] if pair else [text_column]


def text_of(values: Sequence[Any], names: Sequence[str], number: int, table: Table) -> Text:
    """Returns the text of a row, or its pair of texts; joins a list of words with spaces.

    Args:
        values: The row's text, or its two texts if rows are pairs.
        names: Names of the one or two columns of texts.
        number: Number of the row, from 1.
        table: The file, for error messages.

    Raises:
        DataError: A value in a column of texts is neither a text nor a list of words without spaces, or the text has
            half of a surrogate pair, which UTF-8 cannot represent.
    """
    texts = []
    for name, value in zip(names, values, strict=True):
        if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
            if wrong := [word for word in value if not WORD.fullmatch(word)]:
                raise table.row_error(number, f"the word {wrong[0]!r} in the column {name!r} is empty or has a space")
            value = " ".join(value)
        if not isinstance(value, str):
            raise table.row_error(number, f"the column {name!r} holds no text")
        if SURROGATE.search(value):
            raise table.row_error(number, f"the text in the column {name!r} has half of a surrogate pair")
        texts.append(value)
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def require_column(names: Sequence[str], column: str, file: str, option: str) -> str:
    """Checks that the file has the column, and returns its name.

    Args:
        names: Columns of the file.
        column: The column that must exist.
        file: Name of the file, for error messages.
        option: The command-line option that names the column, for error messages.

    Raises:
        DataError: The file lacks the column.
    """
    if column not in names:
        raise DataError(
            f"{file} has no column {column!r}. Its columns: {_format_names(names)}.", f"Choose a column with {option}."
        )
    return column


def _format_names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _set_utf8(stream: Any) -> Any:
    """Sets the stream to UTF-8, independent of the locale."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding="utf-8", errors="strict")
    return stream
