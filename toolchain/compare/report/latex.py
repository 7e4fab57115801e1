"""The comparison as LaTeX, for a thesis or a paper."""

from __future__ import annotations

from collections.abc import Sequence

from toolchain.compare.report.columns import columns, rows_with_figures, title
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import Row
from toolchain.system.escaping import escape_latex


def to_latex(rows: Sequence[Row]) -> str:
    """Returns a LaTeX table with title and notes, for the package booktabs; text from result files runs no command."""
    shown = rows_with_figures(rows)
    lines = ["% The table needs \\usepackage{booktabs}.", "\\begin{table}", "\\centering", "\\small"]
    lines.append(f"\\caption{{{' '.join(map(escape_latex, title(rows)))}}}")
    if shown:
        chosen = columns(shown)
        lines += [f"\\begin{{tabular}}{{l{'r' * (len(chosen) - 1)}}}", "\\toprule"]
        lines += [_line([column.header for column in chosen]), "\\midrule"]
        lines += [_line([column.text(row) for column in chosen]) for row in shown]
        lines += ["\\bottomrule", "\\end{tabular}"]
    if remarks := notes(rows):
        lines += ["\\begin{itemize}", *(f"\\item {escape_latex(line)}" for line in remarks), "\\end{itemize}"]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"{' & '.join(map(escape_latex, cells))} \\\\"
