"""The comparison as Markdown, for a README or an issue thread."""

from __future__ import annotations

from collections.abc import Sequence

from toolchain.compare.report.columns import columns, rows_with_figures, title
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import Row
from toolchain.system.escaping import escape_markdown


def to_markdown(rows: Sequence[Row]) -> str:
    """Returns title, table and notes as Markdown; text from result files cannot act as markup."""
    shown = rows_with_figures(rows)
    parts = ["\n".join(map(escape_markdown, title(rows)))]
    if shown:
        chosen = columns(shown)
        lines = [_line([column.header for column in chosen]), _line(["---"] + ["---:"] * (len(chosen) - 1))]
        lines += [_line([escape_markdown(column.text(row)) for column in chosen]) for row in shown]
        parts.append("\n".join(lines))
    if remarks := notes(rows):
        parts.append("\n".join(f"* {escape_markdown(line)}" for line in remarks))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
