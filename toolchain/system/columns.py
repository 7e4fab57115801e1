"""Rows of text as lines with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Returns one line for each row, the first column to the left and the others to the right.

    Args:
        rows: The rows, with equally many texts.
        width: Maximum number of characters in a line. Columns that do not fit follow below the others, again after the
            first column. None for no limit.
    """
    first, *others = [_pad(column, left=number == 0) for number, column in enumerate(zip(*rows, strict=True))]
    lines, parts = [], list(first)
    for column in others:
        if width and parts != first and len(parts[0]) + len(column[0]) + 2 > width:
            lines += parts
            parts = list(first)
        parts = [f"{part}  {text}" for part, text in zip(parts, column, strict=True)]
    return lines + parts


def _pad(column: Sequence[str], *, left: bool) -> list[str]:
    width = max(map(len, column))
    return [text.ljust(width) if left else text.rjust(width) for text in column]
