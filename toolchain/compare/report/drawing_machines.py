"""Functions that draw several machines in one panel: accuracy against latency, and the latency of each variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.compare.report.canvas import INK, PAPER, axis_of, canvas, label_x, place_labels
from toolchain.compare.report.columns import score_names
from toolchain.compare.report.drawing import (
    DASHED,
    FAINT,
    RING,
    accuracy_percent,
    draw_accuracy_point,
    draw_front,
    label_rows,
    latency_label,
    latency_ms,
    select_rows,
)
from toolchain.compare.report.machines import MachineNames
from toolchain.compare.report.panels import Panel, printable
from toolchain.compare.report.point_texts import latency_text, point_text
from toolchain.compare.report.points import Drawing, Mark, Marks
from toolchain.compare.rows import Row

# Colours and marker shapes of machines. The two lists have different lengths, so that more machines than colours still
# have different pairs.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#6a51a3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("--", ":", "-.")
FEW = 24  # maximum number of points in a panel in which each point has a label
LONGEST = 60  # maximum number of characters of a machine's name in a legend
HEIGHT_IN = 4.6


@dataclass(frozen=True)
class _Group:
    """The rows of one model and data set that several machines measured.

    Attributes:
        title: Heading of the panel.
        machines: Name of each machine, and its rows.
    """

    title: str
    machines: dict[str, list[Row]]

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.machines.values() for row in rows]


def accuracy_latency_of_machines(panels: Sequence[Panel]) -> Drawing | None:
    """Draws accuracy against latency of all machines of one model and data set together.

    Returns:
        The drawing; None if no model and data set has rows of several machines with both figures.
    """
    names = MachineNames([row for panel in panels for row in panel.rows])
    groups = _groups(select_rows(panels, lambda row: row.measurement.score and latency_ms(row)), names)
    if not groups:
        return None
    styles, marks, labels = _styles(groups), Marks(), []
    figure, grid = canvas([HEIGHT_IN for _ in groups], sharex=True, sharey=True)
    for (axes,), group in zip(grid, groups, strict=True):
        axes.set_title(group.title)
        labelled: list[Row] = []
        for name, rows in group.machines.items():
            colour, marker, line = styles[name]
            draw_front(axes, rows, marks, {"color": colour, "linestyle": line, "linewidth": 1.2, "alpha": 0.7})
            for row in rows:
                draw_accuracy_point(axes, row, marks, colour, marker)
                if row.measurement is row.baseline:
                    (ring,) = axes.plot(latency_ms(row), accuracy_percent(row), color=INK, **RING)
                    marks.add(ring, Mark((row,), ring=True))
            labelled += rows if len(group.rows) <= FEW else _named_rows(rows)
        axes.set_ylabel(f"{score_names(group.rows)}, %")
        axis_of(axes.xaxis, [latency_ms(row) for part in groups for row in part.rows])
        labels.append((axes, labelled, [(latency_ms(row), accuracy_percent(row)) for row in group.rows]))
    label_x(grid, latency_label([row for group in groups for row in group.rows]))
    _legend(figure, styles, {"Pareto front of a machine": DASHED, "baseline": RING})
    for axes, rows, places in labels:
        points = [(latency_ms(row), accuracy_percent(row), printable(row.measurement.variant)) for row in rows]
        marks.add_labels(rows, place_labels(axes, points, places))
    return Drawing(figure, [_fastest_text(group) for group in groups], marks)


def latency_of_machines(panels: Sequence[Panel]) -> Drawing | None:
    """Draws one line for each variant that several machines measured, with the latency on each machine.

    Returns:
        The drawing; None if no variant was measured on several machines.
    """
    names = MachineNames([row for panel in panels for row in panel.rows])
    groups = [_shared_variants(group) for group in _groups(select_rows(panels, latency_ms), names)]
    groups = [group for group in groups if group.machines]
    if not groups:
        return None
    styles, marks = _styles(groups), Marks()
    variants = [list(dict.fromkeys(row.measurement.variant for row in group.rows)) for group in groups]
    figure, grid = canvas([0.26 * len(names) + 0.7 for names in variants], sharex=True)
    for (axes,), group, lines in zip(grid, groups, variants, strict=True):
        first_rows = {row.measurement.variant: row for row in reversed(group.rows)}
        label_rows(axes, Panel(group.title, tuple(first_rows[variant] for variant in lines)))
        for place, (name, rows) in enumerate(group.machines.items()):
            shift = 0.5 * ((place + 0.5) / len(group.machines) - 0.5)
            for row in rows:
                _draw_latency(axes, row, lines.index(row.measurement.variant) + shift, styles[name], marks)
        axis_of(axes.xaxis, [latency_ms(row) for part in groups for row in part.rows])
        axes.tick_params(axis="y", length=0)
    label_x(grid, latency_label([row for group in groups for row in group.rows]))
    _legend(figure, styles, {})
    return Drawing(figure, [_fastest_text(group) for group in groups], marks)


def _draw_latency(axes: Any, row: Row, y: float, style: tuple[str, str, str], marks: Marks) -> None:
    colour, marker, _ = style
    with marks.of_row(axes, row, point_text(row, latency_text(row))):
        if row.latency_interval:
            axes.hlines(y, *row.latency_interval, color=colour, alpha=2 * FAINT, linewidth=1.2)
        face = colour if "p50" in row.measurement.latency_ms else PAPER
        axes.plot(latency_ms(row), y, marker, color=colour, markerfacecolor=face, markersize=5, zorder=3)


def _groups(panels: Sequence[Panel], names: MachineNames) -> list[_Group]:
    """Returns the rows of each model and data set that has rows of several machines, grouped by machine."""
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in (row for panel in panels for row in panel.rows):
        machines = groups.setdefault((row.measurement.model, row.run.data["sha256"]), {})
        machines.setdefault(names.name(row), []).append(row)
    shown = []
    for machines in groups.values():
        if len(machines) > 1:
            row = next(iter(machines.values()))[0]
            title = f"{row.measurement.model} on {len(machines)} machines; {row.run.data['name']}"
            shown.append(_Group(printable(title, 110), machines))
    return shown


def _shared_variants(group: _Group) -> _Group:
    """Returns the group with only the variants that several machines measured."""
    machines_of: dict[str, set[str]] = {}
    for name, rows in group.machines.items():
        for row in rows:
            machines_of.setdefault(row.measurement.variant, set()).add(name)
    shared = {
        name: [row for row in rows if len(machines_of[row.measurement.variant]) > 1]
        for name, rows in group.machines.items()
    }
    return _Group(group.title, {name: rows for name, rows in shared.items() if rows})


def _named_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns the fastest, the most accurate and the baseline row of a machine, each once."""
    fastest = min(rows, key=latency_ms)
    best = max(rows, key=lambda row: (accuracy_percent(row), -latency_ms(row)))
    baselines = [row for row in rows if row.measurement is row.baseline]
    return list({id(row): row for row in (fastest, best, *baselines)}.values())


def _styles(groups: Sequence[_Group]) -> dict[str, tuple[str, str, str]]:
    """Returns colour, marker shape and line style of each machine."""
    names = dict.fromkeys(name for group in groups for name in group.machines)
    return {
        name: (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index % len(LINES)])
        for index, name in enumerate(names)
    }


def _legend(figure: Any, styles: dict[str, tuple[str, str, str]], others: dict[str, dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=printable(name, LONGEST))
        for name, (colour, marker, _) in styles.items()
    ]
    handles += [Line2D([], [], color=INK, label=name, **style) for name, style in others.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, handletextpad=0.5)


def _fastest_text(group: _Group) -> str:
    """Returns a text with the fastest row of each machine."""
    fastest = [(name, min(rows, key=latency_ms)) for name, rows in group.machines.items()]
    texts = [f"{name}: fastest is {row.measurement.variant}, {latency_ms(row):.2f} ms" for name, row in fastest]
    return f"{group.title}: {'; '.join(texts)}"
