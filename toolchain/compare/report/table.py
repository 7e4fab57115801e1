"""The comparison as a terminal table."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolchain.compare.report.columns import columns, rows_with_figures, title
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import Row
from toolchain.system.escaping import escape_line

if TYPE_CHECKING:
    from rich.console import Console

# Maximum number of characters in a line if the output is a file or a pipe, which has no terminal width.
_PIPED_WIDTH = 400


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Prints title lines, table and notes, with visible escapes for control characters.

    Args:
        rows: The rows.
        console: The console; None for standard output.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if console is None:
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


def to_text(rows: Sequence[Row], width: int | None = None) -> str:
    """Returns what `print_table` prints, without colours.

    Args:
        rows: The rows.
        width: Maximum number of characters in a line of the table; None for the width that `print_table` uses.
    """
    from rich.console import Console

    text = io.StringIO()
    columns_shown = width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPED_WIDTH)
    # In a notebook, a console would show the table itself, and write nothing to its file. A notebook also asks for
    # colours with an environment variable.
    console = Console(
        file=text, highlight=False, width=columns_shown, color_system=None, force_terminal=False, force_jupyter=False
    )
    print_table(rows, console)
    return text.getvalue()
