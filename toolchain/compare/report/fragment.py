"""The comparison as a part of an HTML page, for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from toolchain.compare.report.columns import columns, rows_with_figures, title
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import Row
from toolchain.system.escaping import escape_line


def to_fragment(rows: Sequence[Row]) -> str:
    """Returns title, table and notes as HTML; text from result files cannot act as markup."""
    shown = rows_with_figures(rows)
    parts = [f"<p>{'<br>'.join(map(_text, title(rows)))}</p>"]
    if shown:
        chosen = columns(shown)
        head = "".join(f"<th>{_text(column.header)}</th>" for column in chosen)
        body = "".join(
            f"<tr>{''.join(f'<td>{_text(column.text(row))}</td>' for column in chosen)}</tr>" for row in shown
        )
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    if remarks := notes(rows):
        parts.append(f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in remarks)}</ul>")
    return "".join(parts)


def _text(text: str) -> str:
    return escape(escape_line(text))
