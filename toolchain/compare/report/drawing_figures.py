"""Draws any two figures of a comparison against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from toolchain.compare.report.canvas import INK, axis_of, canvas, label_x, legend, place_labels, runtime_style
from toolchain.compare.report.columns import to_megabytes
from toolchain.compare.report.drawing import RING, point_panel_height, select_rows
from toolchain.compare.report.panels import Panel
from toolchain.compare.report.points import Drawing
from toolchain.compare.rows import Row

# Name of a figure → label of its axis, and the function that returns the figure of a row, or None if it is unknown.
AXES: Mapping[str, tuple[str, Callable[[Row], float | None]]] = {
    "accuracy": ("score, %", lambda row: 100 * row.measurement.score.value if row.measurement.score else None),
    "latency": ("median latency at batch 1, ms", lambda row: row.measurement.latency_ms.get("p50")),
    "throughput": ("throughput, sentences per second", lambda row: row.measurement.throughput_per_s),
    "memory": ("peak memory, MB", lambda row: to_megabytes(row.measurement.memory_bytes.get("peak"))),
    "size": ("size, MB", lambda row: to_megabytes(row.measurement.size_bytes.get("total"))),
}


def figure_against(panels: Sequence[Panel], y: str, x: str) -> Drawing | None:
    """Draws the figure `y` against the figure `x`, two keys of `AXES`: one point for each row.

    Returns:
        The drawing; None if no row has both figures.
    """
    (y_label, y_of), (x_label, x_of) = AXES[y], AXES[x]
    shown = select_rows(panels, lambda row: y_of(row) is not None and x_of(row) is not None)
    if not shown:
        return None
    points = [[(x_of(row) or 0.0, y_of(row) or 0.0, panel.label(row)) for row in panel.rows] for panel in shown]
    figure, grid = canvas([point_panel_height(panel) for panel in shown], sharex=True, sharey=True)
    descriptions = []
    for (axes,), panel, panel_points in zip(grid, shown, points, strict=True):
        axes.set_title(panel.title)
        axes.set_ylabel(y_label)
        for (x_value, y_value, _), row in zip(panel_points, panel.rows, strict=True):
            colour, marker = runtime_style(row)
            axes.plot(x_value, y_value, marker, color=colour, markersize=6, zorder=3)
            if row.measurement is row.baseline:
                axes.plot(x_value, y_value, color=INK, **RING)
        descriptions.append(
            f"{panel.title}: "
            + ", ".join(f"{label} ({y} {y_value:.4g}, {x} {x_value:.4g})" for x_value, y_value, label in panel_points)
        )
    all_points = [point for panel_points in points for point in panel_points]
    if x != "accuracy":
        axis_of(grid[0][0].xaxis, [x_value for x_value, _, _ in all_points])
    if y != "accuracy":
        axis_of(grid[0][0].yaxis, [y_value for _, y_value, _ in all_points])
    label_x(grid, x_label)
    legend(figure, [row for panel in shown for row in panel.rows], {"baseline": RING})
    for (axes,), panel_points in zip(grid, points, strict=True):
        place_labels(axes, panel_points)
    return Drawing(figure, descriptions)
