"""Content of the HTML report as plain tables and lists; the template defines their appearance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.compare.report.columns import NOTHING, columns, host_name
from toolchain.compare.report.panels import Panel
from toolchain.compare.rows import Row

_LEADING_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?(?![\w.])")
CELL = "cell"
MEANINGS = {
    "baseline": "Ratios are against this row.",
    "Pareto": "No row beside it is better in accuracy, latency and size.",
    "noisy": "Its times are not to be relied on",
    "stale": "The artifact has been built anew since.",
    "reported": "Published figures, not measured here.",
    "fallback": "Part of it ran elsewhere than on the provider.",
}


@dataclass(frozen=True)
class Entry:
    """One entry of a table.

    Attributes:
        text: The displayed text.
        key: Number that the entry is sorted by; None sorts it by its text.
        marks: Each mark with its meaning.
    """

    text: str
    key: float | None = None
    marks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        caption: The caption.
        headers: Header of each column.
        rows: Entries, row by row.
        head: Index of the column that names the rows.
        sortable: Whether a reader can sort the table.
    """

    caption: str
    headers: list[str]
    rows: list[list[Entry]]
    head: int = 0
    sortable: bool = True

    @property
    def numeric(self) -> list[bool]:
        """Returns, for each column, whether the page sorts it by number.

        In a numeric column of a sortable table, every non-empty entry starts with a number.
        """
        return [
            self.sortable and all(e.key is not None or e.text == NOTHING for e in column)
            for column in zip(*self.rows, strict=True)
        ]


def make_entry(text: str, marks: tuple[tuple[str, str], ...] = ()) -> Entry:
    """Returns an entry whose key is the number at the start of the text; None if there is no number."""
    number = _LEADING_NUMBER.match(text)
    return Entry(text, float(number[0]) if number else None, marks)


def comparison(rows: Sequence[Row]) -> Table:
    """Returns a table with the columns of the terminal table; the cells' bracketed words become marks."""
    chosen = columns(rows)
    headers = [header for header, _ in chosen]
    lines = []
    for row in rows:
        texts = [text(row) for _, text in chosen]
        lines.append(
            [_cell(row, text) if h == CELL else make_entry(text) for h, text in zip(headers, texts, strict=True)]
        )
    return Table("Every variant on its provider; ratios in brackets, above 1 is better", headers, lines, _head(headers))


def _head(headers: Sequence[str]) -> int:
    return headers.index(CELL) if CELL in headers else 0


def _cell(row: Row, text: str) -> Entry:
    name = row.measurement.cell
    if not text.startswith(name):
        return Entry(text)
    conditions = {
        "baseline": row.measurement is row.baseline,
        "Pareto": row.pareto,
        "noisy": bool(row.noisy),
        "stale": row.stale,
        "reported": row.measurement.status == "reported",
    }
    marks = [mark for mark, holds in conditions.items() if holds]
    marks += [mark for mark in re.findall(r"\[(\w+)", text.removeprefix(name)) if mark not in marks]
    meanings = {**MEANINGS, "noisy": f"{MEANINGS['noisy']}: {row.noisy}."}
    return Entry(name, marks=tuple((mark, meanings.get(mark, "")) for mark in marks))


def marks(table: Table) -> list[tuple[str, str]]:
    """Returns each mark in the table with its meaning.

    If the meaning is not the general one of `MEANINGS`, it starts with the cells that it applies to.
    """
    cells: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        for mark in row[table.head].marks:
            cells.setdefault(mark, []).append(row[table.head].text)
    return [
        (mark, meaning if meaning == MEANINGS.get(mark) else f"{', '.join(names)}: {meaning}")
        for (mark, meaning), names in cells.items()
    ]


def quality(rows: Sequence[Row]) -> Table | None:
    """Returns the table of scores beyond accuracy, without empty columns; None if no row has scores."""
    figures: dict[str, Callable[[Any], str]] = {
        "accuracy, 95 % interval": lambda q: f"{q.low:.2%} to {q.high:.2%}",
        "macro-F1": lambda q: _figure_text(q.macro_f1, ".4f"),
        "balanced accuracy": lambda q: _figure_text(q.balanced_accuracy, ".4f"),
        "lost": lambda q: _figure_text(q.lost),
        "won": lambda q: _figure_text(q.won),
        "McNemar p": lambda q: _figure_text(q.p, ".2g"),
        "largest shift": lambda q: _figure_text(q.largest_shift, ".4f"),
        "mean shift": lambda q: _figure_text(q.mean_shift, ".4f"),
        "calibration error": lambda q: _figure_text(q.calibration_error, ".4f"),
        "changed in a batch": lambda q: _figure_text(q.batch_changed),
    }
    scored = [row for row in rows if row.quality]
    figures = {
        name: figure_of
        for name, figure_of in figures.items()
        if any(figure_of(row.quality) != NOTHING for row in scored)
    }
    shown = [(name, _quality_text(figure_of)) for name, figure_of in figures.items()]
    return _row_table("What the answers say beyond their accuracy", rows, scored, shown)


def stages(rows: Sequence[Row]) -> Table | None:
    """Returns the table of further figures, without empty columns; None if there is no measured row.

    The figures are intervals, tail latencies, latency with tokenising, load time, memory by stage and gzip size.
    """

    def milliseconds(name: str, quantile: str, form: str = ".2f") -> Callable[[Row], str]:
        return lambda row: _figure_text(getattr(row.measurement, name).get(quantile), form)

    def megabytes(name: str, part: str) -> Callable[[Row], str]:
        return lambda row: _figure_text(_megabytes(getattr(row.measurement, name).get(part)), ".1f")

    figures: list[tuple[str, Callable[[Row], str]]] = [
        ("p50 ms, 95 % interval", lambda row: _interval(row.latency_interval)),
        (
            "times faster, 95 % interval",
            lambda row: _interval((row.speedup.low, row.speedup.high) if row.speedup else None),
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
    measured = [row for row in rows if row.measurement.status == "ok"]
    figures = [(name, text) for name, text in figures if any(text(row) != NOTHING for row in measured)]
    return _row_table("Intervals, tails, starts, memory by stage, and the size of a download", rows, measured, figures)


def _interval(bounds: Sequence[float | None] | None) -> str:
    if not bounds or None in bounds:
        return NOTHING
    return " to ".join(f"{value:.2f}" for value in bounds)


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _quality_text(figure: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: figure(row.quality)


def _row_table(
    caption: str, rows: Sequence[Row], chosen: Sequence[Row], shown: Sequence[tuple[str, Callable[[Row], str]]]
) -> Table | None:
    """Returns a table of some of the rows; None if there are none.

    The first columns name model, machine and cell, as in the comparison of all rows.
    """
    group_columns = [(header, text) for header, text in columns(rows) if header in ("model", "machine")]
    name_columns: list[tuple[str, Callable[[Row], str]]] = [*group_columns, (CELL, lambda row: row.measurement.cell)]
    lines = [
        [Entry(text(row)) for _, text in name_columns] + [make_entry(text(row)) for _, text in shown] for row in chosen
    ]
    return (
        Table(caption, [header for header, _ in (*name_columns, *shown)], lines, len(group_columns)) if lines else None
    )


def _figure_text(value: float | None, form: str = "") -> str:
    return NOTHING if value is None else format(value, form)


def best_rows(panel: Panel) -> list[tuple[str, str, list[str]]]:
    """Returns the best measured row of a panel for each figure that at least two rows have.

    Returns:
        Category, label of the best row, and a list with its figure and, for a figure other than accuracy, its
        accuracy.
    """
    wanted: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("accuracy", "most accurate", _negative_accuracy),
        ("p50 ms", "fastest at batch 1", lambda row: row.measurement.latency_ms.get("p50")),
        ("sentences/s", "most sentences a second", lambda row: -(row.measurement.throughput_per_s or 0)),
        ("size MB", "smallest", lambda row: row.measurement.size_bytes.get("total")),
        ("peak MB", "least memory", lambda row: row.measurement.memory_bytes.get("peak")),
    )
    # `min` takes the first of equally good rows, so this order prefers the fastest one.
    rows = sorted(panel.rows, key=lambda row: row.measurement.latency_ms.get("p50", 0.0))
    found = []
    for column, what, figure in wanted:
        text = next((text for header, text in columns(panel.rows) if header.startswith(column)), None)
        known = [row for row in rows if row.measurement.status == "ok" and figure(row)]
        if len(known) > 1 and text:
            row = min(known, key=lambda row: figure(row) or 0.0)
            value, _, ratio = text(row).partition(" ")
            said = f"{value} {column.removeprefix('p50 ').split()[-1]} {ratio}" if column != "accuracy" else text(row)
            accurate = row.measurement.accuracy if column != "accuracy" else None
            found.append((what, panel.label(row), [said, *([f"{accurate.value:.2%} right"] if accurate else [])]))
    return found


def _negative_accuracy(row: Row) -> float | None:
    return -row.measurement.accuracy.value if row.measurement.accuracy else None


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
        Table("Why, and what mends it", [CELL, "model", "machine", "status", "reason", "mend"], lines)
        if lines
        else None
    )


def roofline(rows: Sequence[Row]) -> Table | None:
    """Returns the table of each row's work, its floor and the floor's share of p50; None if no row has these facts."""

    def of(name: str, by: float, form: str) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            value = row.measurement.facts["roofline"].get(name)
            return format(value * by, form) if isinstance(value, int | float) else NOTHING

        return text

    shown = [
        ("multiply-accumulates, M", of("macs", 1e-6, ".1f")),
        ("weights, MB", of("weight_bytes", 1e-6, ".1f")),
        ("floor, ms", of("floor_ms", 1, ".3f")),
        ("floor's share of p50, %", of("share", 100, ".0f")),
    ]
    rows_with_work = [row for row in rows if isinstance(row.measurement.facts.get("roofline"), dict)]
    return _row_table("Against the least time the machine allows", rows, rows_with_work, shown)
