"""Functions that draw what exits do: accuracy against the expected work, and against the measured mean latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.artifacts.names import VariantName
from toolchain.compare.report.canvas import INK, PAPER, axis_of, canvas, label_x, legend, place_labels, runtime_style
from toolchain.compare.report.columns import score_names
from toolchain.compare.report.drawing import (
    DASHED,
    RING,
    accuracy_percent,
    point_panel_height,
    select_rows,
)
from toolchain.compare.report.panels import Panel
from toolchain.compare.report.point_texts import NO_INTERVAL, mean_latency_text, point_text, score_text
from toolchain.compare.report.points import Drawing, Mark, Marks
from toolchain.compare.rows import Row
from toolchain.errors import UnknownVariantError
from toolchain.results.facts import ExitPoint

_FILLED: dict[str, Any] = {"marker": "s", "linestyle": "", "markersize": 6}
_HOLLOW: dict[str, Any] = {**_FILLED, "markerfacecolor": PAPER}
MARKS = 200  # number of places on the lines of a panel that labels should not cover
WITHOUT, CHOSEN = "without exits", "threshold of the variant"


def exits_work(panels: Sequence[Panel]) -> Drawing | None:
    """Draws one line for each variant with exits: the accuracy change against the expected work, on held-out rows.

    Returns:
        The drawing; None if no row has exits with a curve.
    """
    import numpy as np

    shown = select_rows(panels, lambda row: row.measurement.facts.get("exits", {}).get("curve"))
    shown = [Panel(panel.title, _distinct_variants(panel)) for panel in shown]
    if not shown:
        return None
    figure, grid = canvas([point_panel_height(panel) for panel in shown], sharex=True, sharey=True)
    descriptions, labels, drawn = [], [], Marks()
    for (axes,), panel in zip(grid, shown, strict=True):
        axes.set_title(panel.title)
        axes.axhline(0, color=INK, **DASHED)
        points, texts = [], []
        marks: list[tuple[float, float]] = []
        for row in panel.rows:
            facts, (colour, marker) = row.measurement.facts["exits"], runtime_style(row)
            curve = sorted((_position(point) for point in facts["curve"]), key=lambda place: place[0])
            works, changes = (list(values) for values in zip(*curve, strict=True))
            with drawn.of_row(axes, row):
                axes.plot(works, changes, "-", color=colour)
            for point in facts["curve"]:
                with drawn.of_row(axes, row, point_text(row, _threshold_text(point, facts["held_out_rows"]))):
                    axes.plot(*_position(point), marker, color=colour, markersize=3)
            places = np.linspace(works[0], works[-1], MARKS // len(panel.rows))
            marks += zip(places, np.interp(places, works, changes), strict=True)
            x, y = _position(facts)
            with drawn.of_row(axes, row):
                axes.plot(x, y, color=INK, **RING)
            points.append((x, y, f"{panel.label(row)}, {facts['confidence']:g}"))
            texts.append(
                f"{panel.label(row)} from {curve[0][1]:+.2f} points at {curve[0][0]:.0f} % of the work to "
                f"{curve[-1][1]:+.2f} points at {curve[-1][0]:.0f} %, with its threshold {facts['confidence']:g} "
                f"{y:+.2f} points at {x:.0f} %"
            )
        axes.margins(0.08)
        axes.set_ylabel("accuracy change on held-out rows, points")
        labels.append((axes, points, marks, panel.rows))
        descriptions.append(f"{panel.title}: {'; '.join(texts)}")
    label_x(grid, "expected work on held-out rows, % of the work without exits")
    legend(figure, [row for panel in shown for row in panel.rows], {WITHOUT: DASHED, CHOSEN: RING})
    for *label, rows in labels:
        drawn.add_labels(rows, place_labels(*label))
    return Drawing(figure, descriptions, drawn)


def _position(point: ExitPoint) -> tuple[float, float]:
    """Returns the expected work in per cent, and the accuracy change in percentage points."""
    return 100 * point["work"], 0.0 - point["drop"]


def _threshold_text(point: ExitPoint, held_out_rows: int) -> str:
    work, change = _position(point)
    return (
        f"confidence threshold {point['confidence']:g}: expected work {work:.0f} %, accuracy change {change:+.2f} "
        f"points on {held_out_rows} held-out rows, {NO_INTERVAL}"
    )


def _distinct_variants(panel: Panel) -> tuple[Row, ...]:
    """Returns the first row of each artifact, because the rows of one artifact have the same held-out rows."""
    return tuple({row.measurement.artifact_id or row.measurement.cell: row for row in reversed(panel.rows)}.values())[
        ::-1
    ]


def exits_latency(panels: Sequence[Panel]) -> Drawing | None:
    """Draws one line for the variants of each parent: the measured accuracy against the mean latency at batch 1.

    A line connects at least two variants with exits of the same parent; the parent's own point is hollow.

    Returns:
        The drawing; None if no parent has two measured variants with exits.
    """
    families = [(panel, _families(panel)) for panel in panels]
    families = [(panel, lines) for panel, lines in families if lines]
    if not families:
        return None
    shown = [Panel(panel.title, tuple(row for line in lines for row in line)) for panel, lines in families]
    figure, grid = canvas([point_panel_height(panel) for panel in shown], sharex=True, sharey=True)
    descriptions, labels, marks = [], [], Marks()
    for (axes,), panel, (whole, lines) in zip(grid, shown, families, strict=True):
        axes.set_title(panel.title)
        points = []
        for line in lines:
            places = [(row.measurement.latency_ms["mean"], accuracy_percent(row)) for row in line]
            colour, marker = runtime_style(line[0])
            (curve,) = axes.plot(*zip(*places, strict=True), "-", color=colour)
            marks.add(curve, Mark(tuple(line)))
            for row, (x, y) in zip(line, places, strict=True):
                face = colour if "exits" in row.measurement.facts else PAPER
                with marks.of_row(axes, row, point_text(row, mean_latency_text(row), score_text(row))):
                    axes.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=6, zorder=3)
                points.append((x, y, whole.label(row)))
        axes.set_ylabel(f"{score_names(panel.rows)}, %")
        axis_of(axes.xaxis, [row.measurement.latency_ms["mean"] for part in shown for row in part.rows])
        axes.margins(0.12)
        labels.append((axes, panel.rows, points))
        texts = ", ".join(f"{name} {y:.2f} % at {x:.2f} ms" for x, y, name in points)
        descriptions.append(f"{panel.title}: {texts}")
    label_x(grid, "mean latency at batch 1, ms")
    legend(figure, [], {"with exits": _FILLED, WITHOUT: _HOLLOW})
    for axes, rows, points in labels:
        marks.add_labels(rows, place_labels(axes, points))
    return Drawing(figure, descriptions, marks)


def _families(panel: Panel) -> list[list[Row]]:
    """Returns the rows of each parent that has several variants with exits, and of the parent, fastest first."""
    families: dict[tuple[str, str], list[Row]] = {}
    for row in panel.rows:
        if row.measurement.score and row.measurement.latency_ms.get("mean"):
            try:
                parent = VariantName(row.measurement.variant).with_parts(exits=False, label="")
            except UnknownVariantError:
                continue
            if "exits" in row.measurement.facts or row.measurement.variant == parent:
                families.setdefault((parent, row.measurement.provider), []).append(row)
    lines = [rows for rows in families.values() if sum("exits" in row.measurement.facts for row in rows) > 1]
    return [sorted(rows, key=lambda row: row.measurement.latency_ms["mean"]) for rows in lines]
