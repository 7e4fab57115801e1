"""Content of the HTML report as plain tables and lists; the template defines their appearance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from toolchain.compare.report.columns import (
    CELL,
    COLUMNS,
    columns,
    group_columns,
    host_name,
    row_marks,
    score_names,
    to_megabytes,
)
from toolchain.compare.report.figure import Figure, show_figure
from toolchain.compare.report.panels import Panel
from toolchain.compare.rows import Quality, Row
from toolchain.results.scores import Accuracy

# Header of a column, and the function that returns the figure of a row.
_FigureColumn = tuple[str, Callable[[Row], Figure | None]]

MEANINGS = {
    "baseline": "The ratios in other rows compare with this row.",
    "Pareto": "Every row that beats this row in its score, latency or size is worse in another of these figures.",
    "noisy": "The times are unreliable. A note below gives the reason.",
    "stale": "A newer build has replaced the measured artifact.",
    "reported": "Published figures, not measured here.",
    "fallback": "A part of the model ran on another provider.",
}


@dataclass(frozen=True)
class Entry:
    """One entry of a table in the HTML report.

    Attributes:
        text: The displayed text.
        key: Number by which the table sorts the entry; None sorts the entry by its text.
        marks: Marks of the row, such as ``stale``, each with its meaning.
        empty: Whether the figure of the entry is unknown.
    """

    text: str
    key: float | None = None
    marks: tuple[tuple[str, str], ...] = ()
    empty: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        caption: The caption.
        headers: Header of each column.
        rows: Entries of the table, row by row.
        head: Index of the column that names the rows.
        sortable: Whether a reader can sort the table.
        sources: The row of the comparison that each line shows; empty if a line does not show a single row.
        compact: Whether the page hides the columns whose figures are all unknown.
    """

    caption: str
    headers: list[str]
    rows: list[list[Entry]]
    head: int = 0
    sortable: bool = True
    sources: tuple[Row, ...] = ()
    compact: bool = False

    def key(self, line: int, column: int) -> float | str | None:
        """Returns the value by which the table sorts an entry; None for an unknown figure."""
        entry = self.rows[line][column]
        return None if entry.empty else entry.key if self.numeric[column] else entry.text

    @functools.cached_property
    def blank(self) -> list[bool]:
        """Returns, for each column, whether all its figures are unknown."""
        return [all(entry.empty for entry in column) for column in zip(*self.rows, strict=True)]

    @functools.cached_property
    def numeric(self) -> list[bool]:
        """Returns, for each column, whether the page sorts it by number.

        A column is numeric if the table is sortable and every non-empty entry has a number as its sort key.
        """
        return [
            self.sortable and all(entry.key is not None or entry.empty for entry in column)
            for column in zip(*self.rows, strict=True)
        ]


def make_entry(figure: Figure | None) -> Entry:
    """Returns the table entry that shows a figure."""
    return Entry(show_figure(figure), key=figure.number if figure else None, empty=figure is None)


def comparison(rows: Sequence[Row]) -> Table:
    """Returns a table with the columns of the terminal table.

    The entry of a cell holds the cell's name as its text and the cell's marks in the attribute `marks`.
    """
    shown = columns(rows)
    lines = [[_cell(row) if column is CELL else make_entry(column.figure(row)) for column in shown] for row in rows]
    headers = [column.header for column in shown]
    return Table(
        "Every variant on its provider; ratios in brackets, above 1 is better",
        headers,
        lines,
        shown.index(CELL),
        sources=tuple(rows),
    )


def _cell(row: Row) -> Entry:
    conditions = {"baseline": row.measurement is row.baseline, "Pareto": row.pareto}
    names = [mark for mark, holds in conditions.items() if holds]
    names += [mark for mark in MEANINGS if mark in row_marks(row)]
    meanings = {**MEANINGS, "noisy": f"The times are unreliable: {row.noisy}."}
    return Entry(row.measurement.cell, marks=tuple((name, meanings[name]) for name in names))


def marks(table: Table) -> list[tuple[str, str]]:
    """Returns each mark in the table with its meaning."""
    used = dict.fromkeys(mark for row in table.rows for mark, _ in row[table.head].marks)
    return [(mark, MEANINGS[mark]) for mark in used]


def quality(rows: Sequence[Row], others: Sequence[Row] = ()) -> Table | None:
    """Returns the table of scores beyond accuracy, without empty columns; None if no row has scores.

    Args:
        rows: The rows.
        others: The same rows with other baselines. The table also has a column if only these rows have its figure.
    """
    scored = [row for row in rows if row.quality]
    figures: list[_FigureColumn] = [
        (
            f"{score_names(scored)}, 95 % interval",
            _quality_figure(lambda q: _interval((100 * q.low, 100 * q.high), ".2f", "%")),
        ),
        ("macro-F1", _quality_figure(lambda q: Figure.from_number(q.macro_f1, ".4f"))),
        ("balanced accuracy", _quality_figure(lambda q: Figure.from_number(q.balanced_accuracy, ".4f"))),
        ("precision", _quality_figure(lambda q: Figure.from_number(q.precision, ".4f"))),
        ("recall", _quality_figure(lambda q: Figure.from_number(q.recall, ".4f"))),
        ("lost", _quality_figure(lambda q: Figure.from_number(q.lost, "d"))),
        ("won", _quality_figure(lambda q: Figure.from_number(q.won, "d"))),
        ("root mean squared error", _quality_figure(lambda q: Figure.from_number(q.root_mean_squared_error, ".4g"))),
        ("Pearson", _quality_figure(lambda q: Figure.from_number(q.pearson, ".4f"))),
        ("Spearman", _quality_figure(lambda q: Figure.from_number(q.spearman, ".4f"))),
        ("McNemar p", _quality_figure(lambda q: Figure.from_number(q.p if q.test == "McNemar" else None, ".2g"))),
        ("Wilcoxon p", _quality_figure(lambda q: Figure.from_number(q.p if q.test == "Wilcoxon" else None, ".2g"))),
        ("largest shift", _quality_figure(lambda q: Figure.from_number(q.largest_shift, ".4f"))),
        ("mean shift", _quality_figure(lambda q: Figure.from_number(q.mean_shift, ".4f"))),
        ("calibration error", _quality_figure(lambda q: Figure.from_number(q.calibration_error, ".4f"))),
        ("changed in a batch", _quality_figure(lambda q: Figure.from_number(q.batch_changed, "d"))),
    ]
    table = _row_table(
        f"Scores of the answers beyond their {score_names(scored)}", rows, scored, _filled(figures, [*scored, *others])
    )
    return replace(table, compact=True) if table else None


def stages(rows: Sequence[Row], others: Sequence[Row] = ()) -> Table | None:
    """Returns a table of the figures that the comparison table omits; None if no row is measured.

    The table has no empty columns. The figures in the table are intervals, tail latencies, latency with tokenising,
    load time, memory by stage and gzip size.

    Args:
        rows: The rows.
        others: The same rows with other baselines. The table also has a column if only these rows have its figure.
    """

    def milliseconds(name: str, quantile: str, form: str = ".2f") -> Callable[[Row], Figure | None]:
        return lambda row: Figure.from_number(getattr(row.measurement, name).get(quantile), form)

    def megabytes(name: str, part: str) -> Callable[[Row], Figure | None]:
        return lambda row: Figure.from_number(to_megabytes(getattr(row.measurement, name).get(part)), ".1f")

    figures: list[_FigureColumn] = [
        ("p50 ms, 95 % interval", lambda row: _interval(row.latency_interval, ".2f")),
        (
            "times faster, 95 % interval",
            lambda row: _interval((row.speedup.low, row.speedup.high), ".2f") if row.speedup else None,
        ),
        ("p90 ms", milliseconds("latency_ms", "p90")),
        ("p99 ms", milliseconds("latency_ms", "p99")),
        ("p50 ms with tokenising", milliseconds("with_tokenizing_ms", "p50")),
        ("load ms", milliseconds("load_ms", "p50", ".0f")),
        ("bare process MB", megabytes("memory_bytes", "bare")),
        ("after imports MB", megabytes("memory_bytes", "imports")),
        ("after load MB", megabytes("memory_bytes", "load")),
        ("gzip MB", megabytes("size_bytes", "gzip")),
    ]
    measured_rows = [row for row in rows if row.measurement.status == "ok"]
    caption = "Intervals, tail latencies, load time, memory by stage, and download size"
    measured_others = [row for row in others if row.measurement.status == "ok"]
    table = _row_table(caption, rows, measured_rows, _filled(figures, [*measured_rows, *measured_others]))
    return replace(table, compact=True) if table else None


def _interval(bounds: Sequence[float | None] | None, form: str, suffix: str = "") -> Figure | None:
    """Returns an interval as a figure; the table sorts it by its lower bound. Returns None if a bound is unknown."""
    low, high = bounds or (None, None)
    if low is None or high is None:
        return None
    return Figure(f"{low:{form}}{suffix} to {high:{form}}{suffix}", float(format(low, form)))


def _quality_figure(figure: Callable[[Quality], Figure | None]) -> Callable[[Row], Figure | None]:
    return lambda row: figure(row.quality) if row.quality else None


def _filled(figures: Sequence[_FigureColumn], rows: Sequence[Row]) -> list[_FigureColumn]:
    """Returns the columns in which at least one row has a figure."""
    return [(header, figure) for header, figure in figures if any(figure(row) for row in rows)]


def _row_table(
    caption: str, rows: Sequence[Row], chosen: Sequence[Row], figures: Sequence[_FigureColumn]
) -> Table | None:
    """Returns a table of the rows in `chosen`; None if `chosen` is empty.

    The first columns hold the cell and, if `rows` come from several models or machines, the model and the machine.
    """
    group = group_columns(rows)
    headers = [*(column.header for column in group), CELL.header, *(header for header, _ in figures)]
    lines = [
        [
            *(make_entry(column.figure(row)) for column in group),
            Entry(row.measurement.cell),
            *(make_entry(figure(row)) for _, figure in figures),
        ]
        for row in chosen
    ]
    return Table(caption, headers, lines, len(group), sources=tuple(chosen)) if lines else None


@dataclass(frozen=True)
class Best:
    """The best row of a panel for one figure.

    Attributes:
        advantage: The advantage of the row, such as ``smallest`` for the figure ``size``.
        name: Name of the row.
        texts: The figure of the row, and its score if the score is known. For the score itself, only the score.
        row: The row.
    """

    advantage: str
    name: str
    texts: list[str]
    row: Row


def best_rows(panel: Panel) -> list[Best]:
    """Returns the best measured row of a panel for each figure that at least two rows have."""
    categories: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("score", "most accurate", _negative_score),
        ("p50", "fastest at batch 1", lambda row: row.measurement.latency_ms.get("p50")),
        ("throughput", "most sentences a second", lambda row: -(row.measurement.throughput_per_s or 0)),
        ("size", "smallest", lambda row: row.measurement.size_bytes.get("total")),
        ("memory", "least memory", lambda row: row.measurement.memory_bytes.get("peak")),
    )
    # The fastest row comes first, so `min` prefers it among equally good rows.
    rows = sorted(panel.rows, key=lambda row: row.measurement.latency_ms.get("p50", 0.0))
    columns_by_name = {column.name: column for column in COLUMNS}
    best = []
    for name, category, cost in categories:
        column = columns_by_name.get(name)
        measured_rows = [row for row in rows if row.measurement.status == "ok" and cost(row)]
        if len(measured_rows) > 1:
            row = min(measured_rows, key=lambda row: cost(row) or 0.0)
            figure, score = column and column.figure(row), row.measurement.score
            texts = [figure.with_unit(column.unit)] if column and figure else []
            texts += [_score_text(row)] if score else []
            best.append(Best(category, panel.label(row), texts, row))
    return best


def _score_text(row: Row) -> str:
    score = row.measurement.score
    if score is None:
        return ""
    return f"{score.value:.2%} right" if isinstance(score, Accuracy) else f"{score.name} {score.value:.2%}"


def _negative_score(row: Row) -> float | None:
    return -row.measurement.score.value if row.measurement.score else None


def rows_without_figures(rows: Sequence[Row]) -> Table | None:
    """Returns the table of rows without figures, with reasons and hints; None if all rows have figures.

    Cells of the same model, machine, status, reason and hint share one line.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        m = row.measurement
        if m.status not in ("ok", "reported"):
            groups.setdefault((m.model, host_name(row), m.status, m.reason, m.mend), []).append(m.cell)
    lines = [[Entry(", ".join(cells)), *map(Entry, reason)] for reason, cells in groups.items()]
    return (
        Table("Reasons and hints", [CELL.header, "model", "machine", "status", "reason", "hint"], lines)
        if lines
        else None
    )


def roofline(rows: Sequence[Row]) -> Table | None:
    """Returns the table of work per sentence, minimum time (floor) and floor / p50; None if no row has a roofline."""

    def fact(name: str, factor: float, form: str) -> Callable[[Row], Figure | None]:
        def figure(row: Row) -> Figure | None:
            value = row.measurement.facts["roofline"].get(name)
            return Figure.from_number(value * factor, form) if isinstance(value, int | float) else None

        return figure

    figures = [
        ("multiply-accumulates, M", fact("macs", 1e-6, ".1f")),
        ("weights, MB", fact("weight_bytes", 1e-6, ".1f")),
        ("floor, ms", fact("floor_ms", 1, ".3f")),
        ("floor's share of p50, %", fact("share", 100, ".0f")),
    ]
    rows_with_work = [row for row in rows if isinstance(row.measurement.facts.get("roofline"), dict)]
    return _row_table("Floor: the minimum time for a sentence on this machine", rows, rows_with_work, figures)
