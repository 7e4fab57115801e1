"""Common parts of the plots of a comparison: style, colours, marker shapes, axes, and labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.compare.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of saved plots; the HTML page replaces them by the colours of its theme.
INK, PAPER = "#1b1f24", "#fefefe"
# Runtime → colour from Okabe and Ito's palette, and a marker shape for readers who cannot distinguish the colours.
RUNTIME_STYLES = {"torch": ("#0072b2", "o"), "onnx": ("#d55e00", "s"), "bnb": ("#009e73", "^")}
OTHER_STYLE = ("#cc79a7", "D")
LINES = ("-", "--")
WIDTH_IN = 9.5
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 8.5,
    "figure.dpi": 72,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.markersize": 4,
    "lines.linewidth": 1.2,
}
Box = tuple[float, float, float, float]


def runtime_style(row: Row) -> tuple[str, str]:
    """Returns colour and marker shape of the row's runtime."""
    return RUNTIME_STYLES.get(row.measurement.variant.split("-")[0], OTHER_STYLE)


def canvas(heights: Sequence[float], columns: int = 1, **shared: Any) -> tuple[Figure, Any]:
    """Returns a figure, and an array of shape [panels, columns] that holds its axes.

    Args:
        heights: Height of each panel, in inches.
        columns: Number of axes in each panel, side by side.
        shared: Further arguments of `Figure.subplots`, such as `sharex`.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=list(heights), **shared)
    for (row, column), axes in np.ndenumerate(grid):
        axes.tick_params(labelbottom=True)
        axes.set_gid(f"panel-{row}-{column}")
    return figure, grid


def axis_of(axis: Any, values: Sequence[float], ticks: Sequence[float] | None = None) -> None:
    """Makes an axis logarithmic if the largest value exceeds three times the smallest value.

    The labels of a logarithmic axis are plain numbers.

    Args:
        axis: The x or y axis.
        values: The values on the axis.
        ticks: Positions of the ticks; None leaves the choice to Matplotlib.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    if max(values) > 3 * min(values):
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if ticks is not None:
        axis.set_major_locator(FixedLocator(list(ticks)))


def label_x(grid: Any, text: str) -> None:
    """Writes the label of the x axis below each panel, because a reader of the page can hide the other panels."""
    for axes in grid[:, 0]:
        axes.set_xlabel(text)


def legend(figure: Figure, rows: Sequence[Row], others: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Draws a legend above the panels.

    Args:
        figure: The figure.
        rows: Rows whose runtimes the legend names.
        others: Name of each legend entry besides the runtimes → style of its line or marker.
    """
    from matplotlib.lines import Line2D

    names = dict.fromkeys(row.measurement.variant.split("-")[0] for row in rows)
    styles = {name: RUNTIME_STYLES[name] for name in names if name in RUNTIME_STYLES}
    if len(styles) < len(names):
        styles["other"] = OTHER_STYLE
    handles = [Line2D([], [], color=c, marker=m, linestyle="", markersize=6, label=n) for n, (c, m) in styles.items()]
    handles += [Line2D([], [], color=INK, label=name, **style) for name, style in (others or {}).items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, handletextpad=0.5)


def place_labels(
    axes: Any, points: Sequence[tuple[float, float, str]], marks: Sequence[tuple[float, float]] = ()
) -> list[Any]:
    """Writes a label near each point, away from other labels, points and marks if there is space.

    Args:
        axes: The axes.
        points: For each point, x and y in the units of the axes, and the text of its label.
        marks: x and y of other things that a label should not cover, such as places on a line.

    Returns:
        The label of each point, in the order of `points`.
    """
    axes.figure.draw_without_rendering()
    frame = axes.get_window_extent()
    limits = (frame.x0, frame.y0, frame.x1, frame.y1)
    positions = [axes.transData.transform(point[:2]) for point in points]
    others = [axes.transData.transform(mark) for mark in marks]
    occupied: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in [*positions, *others]]
    labels: dict[int, Any] = {}
    for index in sorted(range(len(points)), key=lambda i: (positions[i][0], positions[i][1])):
        probe = _write_label(axes, points[index])
        size = probe.get_window_extent()
        probe.remove()
        options = [
            (_overlap_penalty(box, occupied, limits) + radius, box, radius)
            for box, radius in _boxes_around(positions[index], size)
        ]
        _, box, radius = min(options, key=lambda option: option[0])
        occupied.append(box)
        # `side` is the part of the label that is horizontally nearest to the point: left side (0), centre (0.5) or
        # right side (1). If a line connects the point with its label, the line ends at this part of the label.
        side = 0.0 if box[0] >= positions[index][0] else 1.0 if box[2] <= positions[index][0] else 0.5
        offset = (box[0] + side * size.width - positions[index][0], (box[1] + box[3]) / 2 - positions[index][1])
        labels[index] = _write_label(axes, points[index], offset, side, radius > NEAR)
    return [labels[index] for index in range(len(points))]


NEAR = 9.0
LINE_HEIGHT = 10.0
RADII = (NEAR, 18.0, 30.0, 44.0, 60.0, 80.0, 104.0)


def _write_label(
    axes: Any,
    point: tuple[float, float, str],
    offset: tuple[float, float] = (0, 0),
    side: float = 0.0,
    with_line: bool = False,
) -> Any:
    """Writes the label of a point at `offset` from the point.

    `side` says which part of the text is at `offset`: the left side (0), the centre (0.5) or the right side (1). If
    `with_line` is true, a line connects the text to the point.
    """
    line = {"arrowstyle": "-", "color": INK, "alpha": 0.45, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    arrow: dict[str, Any] = {"arrowprops": {**line, "relpos": (side, 0.5)}} if with_line else {}
    background = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    alignment: dict[str, Any] = {"ha": ("left", "center", "right")[round(2 * side)], "va": "center"}
    note = axes.annotate(
        point[2],
        point[:2],
        offset,
        textcoords="offset points",
        fontsize=7.5,
        bbox=background,
        zorder=4,
        **alignment,
        **arrow,
    )
    note.set_in_layout(False)
    return note


def _boxes_around(position: Sequence[float], size: Any) -> list[tuple[Box, float]]:
    """Returns boxes of the given size around a point, each with its distance from the point, nearest first."""
    boxes = []
    for radius in RADII:
        for turn in (1, 7, 3, 5, 2, 6, 0, 4):
            dx, dy = radius * math.cos(turn * math.pi / 4), radius * math.sin(turn * math.pi / 4)
            left = position[0] + dx - (0.5 - 0.5 * (dx > 1) + 0.5 * (dx < -1)) * size.width
            bottom = position[1] + dy - size.height / 2
            boxes.append(((left, bottom, left + size.width, bottom + size.height), radius))
    return boxes


def _overlap_penalty(box: Box, occupied: Sequence[Box], limits: Box) -> float:
    """Returns the penalty of a box that overlaps occupied boxes or is partly outside the axes; 0 for a free box."""
    overlaps = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in occupied)
    inside = box[0] >= limits[0] and box[1] >= limits[1] and box[2] <= limits[2] and box[3] <= limits[3]
    return 1000.0 * overlaps + (0 if inside else 5000.0)


def place_labels_at_end(axes: Any, points: Sequence[tuple[float, float, str]]) -> list[Any]:
    """Writes the labels in a column to the right of all points, moved apart vertically so that they do not overlap.

    Args:
        axes: The axes.
        points: For each point, x and y in the units of the axes, and the text of its label.

    Returns:
        The label of each point, in the order of `points`.
    """
    axes.figure.draw_without_rendering()
    positions = [axes.transData.transform(point[:2]) for point in points]
    order = sorted(range(len(points)), key=lambda index: positions[index][1])
    heights = [positions[index][1] for index in order]
    for _ in range(100):
        for below in range(len(heights) - 1):
            overlap = LINE_HEIGHT - (heights[below + 1] - heights[below])
            if overlap > 0:
                heights[below] -= overlap / 2
                heights[below + 1] += overlap / 2
    overflow = max(0.0, heights[-1] - axes.get_window_extent().y1)
    edge = max(x for x, _ in positions)
    labels: dict[int, Any] = {}
    for index, height in zip(order, heights, strict=True):
        x, y = positions[index]
        labels[index] = _write_label(axes, points[index], (edge - x + 20, height - overflow - y), with_line=True)
    return [labels[index] for index in range(len(points))]
