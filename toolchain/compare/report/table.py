"""The comparison as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from toolchain.compare.report.columns import columns, rows_with_figures, title
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import Row
from toolchain.system.escaping import escape_line

# Maximum number of characters in a line if the output is a file or a pipe, which has no terminal width.
_PIPED_WIDTH = 400


def print_table(rows: Sequence[Row]) -> None:
    """Prints title lines, table and notes to standard output, with visible escapes for control characters."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED_WIDTH)
    for line in title(rows):
        console.print(escape_line(line), style="bold", markup=False, soft_wrap=True)
    shown = rows_with_figures(rows)
    if shown:
        table = Table(box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns(shown)):
            table.add_column(column.header, justify="left" if index == 0 else "right", overflow="fold")
        for row in shown:
            table.add_row(*(escape_line(column.text(row)) for column in columns(shown)))
        console.print(table, markup=False)
    for line in notes(rows):
        console.print(escape_line(line), markup=False, soft_wrap=True)
