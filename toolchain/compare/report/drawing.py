"""Functions that draw the plots of a comparison, one panel below another, and describe them in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from toolchain.compare.report.canvas import (
    INK,
    LINES,
    PAPER,
    axis_of,
    canvas,
    label_x,
    legend,
    place_labels,
    place_labels_at_end,
    runtime_style,
)
from toolchain.compare.report.columns import score_names
from toolchain.compare.report.notes import speedup_over_unpruned
from toolchain.compare.report.panels import Panel
from toolchain.compare.report.point_texts import (
    NO_INTERVAL,
    latency_text,
    length_text,
    point_text,
    ratio_text,
    score_text,
)
from toolchain.compare.report.points import Drawing, Mark, Marks
from toolchain.compare.rows import Row
from toolchain.results.providers import is_on_gpu

FAINT = 0.4
DASHED: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "alpha": 0.6}
RING: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "none", "markersize": 11}


def accuracy_latency(panels: Sequence[Panel]) -> Drawing | None:
    """Draws accuracy against latency: one point with intervals for each row, and the Pareto front of each panel.

    Returns:
        The drawing; None if no row has both accuracy and latency.
    """
    shown = select_rows(panels, lambda row: row.measurement.score and latency_ms(row))
    if not shown:
        return None
    marks = Marks()
    figure, grid = canvas([point_panel_height(panel) for panel in shown], sharex=True, sharey=True)
    for (axes,), panel in zip(grid, shown, strict=True):
        axes.set_title(panel.title)
        draw_front(axes, panel.rows, marks, {"color": INK, **DASHED})
        for row in panel.rows:
            _draw_point(axes, row, marks)
        axes.set_ylabel(f"{score_names(panel.rows)}, %")
        axis_of(axes.xaxis, [latency_ms(row) for part in shown for row in part.rows])
    label_x(grid, latency_label([row for panel in shown for row in panel.rows]))
    legend(figure, [row for panel in shown for row in panel.rows], {"Pareto front": DASHED, "baseline": RING})
    for (axes,), panel in zip(grid, shown, strict=True):
        points = [(latency_ms(row), accuracy_percent(row), panel.label(row)) for row in panel.rows]
        marks.add_labels(panel.rows, place_labels(axes, points))
    descriptions = []
    for panel in shown:
        front_text = ", ".join(
            f"{panel.label(row)} ({accuracy_percent(row):.2f} % at {latency_ms(row):.2f} ms)"
            for row in accuracy_front(panel.rows)
        )
        descriptions.append(
            f"{panel.title}: {len(panel.rows)} variants; no variant is both faster and more accurate than {front_text}"
        )
    return Drawing(figure, descriptions, marks)


def latency_ms(row: Row) -> float:
    """Returns the median latency at batch 1, or the mean if there is no median; 0 if there is neither."""
    figures = row.measurement.latency_ms
    return figures.get("p50") or figures.get("mean") or 0.0


def latency_label(rows: Sequence[Row]) -> str:
    """Returns the label of the axis of `latency_ms`."""
    has_means = any("p50" not in row.measurement.latency_ms for row in rows)
    return "latency at batch 1, ms" + ("; hollow: mean, published" if has_means else ", median")


def accuracy_percent(row: Row) -> float:
    """Returns the score in per cent; 0 if there is none."""
    return 100 * row.measurement.score.value if row.measurement.score else 0.0


def accuracy_front(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that are more accurate than all faster rows, fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (latency_ms(row), -accuracy_percent(row))):
        if not front or accuracy_percent(row) > accuracy_percent(front[-1]):
            front.append(row)
    return front


def draw_front(axes: Any, rows: Sequence[Row], marks: Marks, style: dict[str, Any]) -> None:
    """Draws a line through the rows that are more accurate than all faster rows."""
    front = accuracy_front(rows)
    places = [(latency_ms(row), accuracy_percent(row)) for row in front]
    (line,) = axes.step(*zip(*places, strict=True), where="post", **style)
    marks.add(line, Mark(tuple(front)))


def _draw_point(axes: Any, row: Row, marks: Marks) -> None:
    draw_accuracy_point(axes, row, marks, *runtime_style(row))
    if row.measurement is row.baseline:
        (ring,) = axes.plot(latency_ms(row), accuracy_percent(row), color=INK, **RING)
        marks.add(ring, Mark((row,), ring=True))


def draw_accuracy_point(axes: Any, row: Row, marks: Marks, colour: str, marker: str) -> None:
    """Draws accuracy and latency of a row with their intervals; a hollow marker shows a published mean."""
    x, y = latency_ms(row), accuracy_percent(row)
    with marks.of_row(axes, row, point_text(row, latency_text(row), score_text(row)), compared=True):
        if row.quality:
            axes.vlines(x, 100 * row.quality.low, 100 * row.quality.high, color=colour, alpha=FAINT, linewidth=1)
        if row.latency_interval:
            axes.hlines(y, *row.latency_interval, color=colour, alpha=0.8, linewidth=1)
        face = colour if "p50" in row.measurement.latency_ms else PAPER
        axes.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=6, zorder=3)


def size_memory(panels: Sequence[Panel]) -> Drawing | None:
    """Draws one bar for each row and known figure: size, peak host memory and peak GPU memory, in MB (10^6 bytes).

    Returns:
        The drawing; None if no row has a size or a peak memory.
    """
    kinds: dict[str, Callable[[Row], float | None]] = {
        "size, MB": lambda row: row.measurement.size_bytes.get("total"),
        "peak memory, MB": lambda row: row.measurement.memory_bytes.get("peak"),
        "peak GPU memory, MB": lambda row: row.measurement.memory_bytes.get("gpu", {}).get("peak"),
    }
    kinds = {
        name: figure_of
        for name, figure_of in kinds.items()
        if any(figure_of(row) for panel in panels for row in panel.rows)
    }
    shown = select_rows(panels, lambda row: any(figure_of(row) for figure_of in kinds.values()))
    if not shown:
        return None
    figure, grid = canvas([_row_panel_height(panel) for panel in shown], len(kinds), sharex="col", sharey="row")
    descriptions, marks = [], Marks()
    for line, panel in zip(grid, shown, strict=True):
        marks.add_labels(panel.rows, label_rows(line[0], panel))
        texts = []
        for axes, (name, figure_of) in zip(line, kinds.items(), strict=True):
            bars = [
                (position, row, (figure_of(row) or 0) / 1e6)
                for position, row in enumerate(panel.rows)
                if figure_of(row)
            ]
            for position, row, value in bars:
                number = f"{value:.1f}" if value < 100 else f"{value:.0f}"
                text = f"{name.removesuffix(', MB')}: {number} MB, {NO_INTERVAL}"
                with marks.of_row(axes, row, point_text(row, text)):
                    axes.annotate(number, (value, position), (3, 0), **_LABEL_STYLE)
                    axes.barh(position, value, color=runtime_style(row)[0], height=0.62)
            if not bars:
                axes.annotate("unknown", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", alpha=0.7)
            axes.margins(x=0.12)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel(name)
            texts.append(f"{panel.title}: {name}: {_range_text(panel, [(row, value) for _, row, value in bars])}")
        descriptions.append(". ".join(texts))
    legend(figure, [row for panel in shown for row in panel.rows])
    return Drawing(figure, descriptions, marks)


_LABEL_STYLE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7.5}


def latency(panels: Sequence[Panel]) -> Drawing | None:
    """Draws a box plot of the stored times at batch 1, with one box for each row.

    Returns:
        The drawing; None if no row has stored times.
    """
    import numpy as np

    shown = select_rows(panels, lambda row: row.measurement.latency)
    if not shown:
        return None
    figure, grid = canvas([_row_panel_height(panel) for panel in shown], sharex=True)
    descriptions, ends, marks = [], [], Marks()
    for (axes,), panel in zip(grid, shown, strict=True):
        marks.add_labels(panel.rows, label_rows(axes, panel))
        for position, row in enumerate(panel.rows):
            times = row.measurement.latency.values() if row.measurement.latency else []
            low, left, middle, right, high, last = np.percentile(times, [5, 25, 50, 75, 95, 99]) / 1000
            colour = runtime_style(row)[0]
            percentiles = f"5th to 95th percentile {low:.2f} to {high:.2f} ms, 99th percentile {last:.2f} ms"
            with marks.of_row(axes, row, point_text(row, latency_text(row), percentiles)):
                axes.hlines(position, low, high, color=colour, linewidth=1.2)
                axes.vlines(middle, position - 0.31, position + 0.31, color=PAPER, linewidth=1.6)
                axes.plot(last, position, "x", color=colour, markersize=4.5)
                axes.barh(position, right - left, left=left, color=colour, height=0.62)
            ends += [low, last]
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        descriptions.append(
            f"{panel.title}: median {_range_text(panel, [(row, latency_ms(row)) for row in panel.rows], ' ms')}"
        )
    axis_of(grid[-1][0].xaxis, ends)
    label_x(grid, "latency at batch 1, ms")
    legend(figure, [row for panel in shown for row in panel.rows])
    return Drawing(figure, descriptions, marks)


def latency_by_length(panels: Sequence[Panel]) -> Drawing | None:
    """Draws one line for each row: the median latency over the number of tokens.

    Returns:
        The drawing; None if no row was measured by length.
    """
    shown = select_rows(panels, lambda row: row.measurement.by_length)
    if not shown:
        return None
    figure, grid = canvas([max(3.6, 0.17 * len(panel.rows) + 1.2) for panel in shown], sharex=True)
    descriptions, labels, marks = [], [], Marks()
    for (axes,), panel in zip(grid, shown, strict=True):
        axes.set_title(panel.title)
        ends: list[tuple[Row, int, float]] = []
        all_medians: list[float] = []
        for row in panel.rows:
            medians = {n: s.milliseconds()["p50"] for n, s in sorted(row.measurement.by_length.items())}
            colour, marker = runtime_style(row)
            with marks.of_row(axes, row):
                line = LINES[is_on_gpu(row.measurement.provider)]
                axes.plot(list(medians), list(medians.values()), line, color=colour)
            for tokens_of_point, median in medians.items():
                text = length_text(tokens_of_point, row.measurement.by_length[tokens_of_point])
                with marks.of_row(axes, row, point_text(row, text)):
                    axes.plot(tokens_of_point, median, marker, color=colour)
            ends.append((row, max(medians), medians[max(medians)]))
            all_medians += medians.values()
        tokens = sorted({n for row in panel.rows for n in row.measurement.by_length})
        axis_of(axes.xaxis, tokens, ticks=tokens)
        axis_of(axes.yaxis, all_medians)
        axes.set_ylabel("median, ms")
        axes.set_xlim(right=tokens[-1] * max(2.0, tokens[-1] / tokens[0]) ** 0.3)
        labels.append((axes, panel.rows, [(x, y, panel.label(row)) for row, x, y in ends]))
        longest = [(row, y) for row, x, y in ends if x == tokens[-1]]
        descriptions.append(f"{panel.title}: at {tokens[-1]} tokens, median {_range_text(panel, longest, ' ms')}")
    label_x(grid, "tokens")
    legend(figure, [row for panel in shown for row in panel.rows])
    for axes, rows, points in labels:
        marks.add_labels(rows, place_labels_at_end(axes, points))
    return Drawing(figure, descriptions, marks)


def pruning_speedup(panels: Sequence[Panel]) -> Drawing | None:
    """Draws one point for each pruned row that has both a predicted and a measured speed-up.

    Returns:
        The drawing; None if no row has a predicted and a measured speed-up.
    """
    rows = [row for panel in panels for row in panel.rows]
    shown = select_rows(panels, lambda row: _predicted_speedup(row) and speedup_over_unpruned(row, rows))
    if not shown:
        return None
    figure, grid = canvas([point_panel_height(panel) for panel in shown], sharex=True, sharey=True)
    descriptions, labels, marks = [], [], Marks()
    for (axes,), panel in zip(grid, shown, strict=True):
        axes.set_title(panel.title)
        points = []
        for row in panel.rows:
            speedup, predicted = speedup_over_unpruned(row, rows), _predicted_speedup(row)
            assert speedup is not None
            (unpruned, ratio), (colour, marker) = speedup, runtime_style(row)
            text = f"speed-up over {unpruned}: predicted {predicted:.2f}×, measured {ratio_text(ratio)}"
            with marks.of_row(axes, row, point_text(row, text)):
                if ratio.low and ratio.high:
                    axes.vlines(predicted, ratio.low, ratio.high, color=colour, alpha=FAINT, linewidth=1)
                axes.plot(predicted, ratio.value, marker, color=colour, markersize=6, zorder=3)
            points.append((predicted, ratio.value, panel.label(row)))
        axes.axline((1, 1), slope=1, color=INK, **DASHED)
        axes.margins(0.12)
        axes.set_ylabel("measured, times faster")
        labels.append((axes, panel.rows, points))
        texts = (f"{name} predicted {x:.2f}×, measured {y:.2f}×" for x, y, name in points)
        descriptions.append(f"{panel.title}: {'; '.join(texts)}")
    label_x(grid, "predicted, times faster")
    legend(figure, [row for panel in shown for row in panel.rows], {"as predicted": DASHED})
    for axes, panel_rows, points in labels:
        marks.add_labels(panel_rows, place_labels(axes, points))
    return Drawing(figure, descriptions, marks)


def _predicted_speedup(row: Row) -> float:
    """Returns the predicted speed-up of the row's pruning; 0 if there is no prediction."""
    value = row.measurement.facts.get("pruning", {}).get("predicted_speedup", {}).get("value", 0)
    return float(value) if isinstance(value, int | float) else 0.0


def select_rows(panels: Sequence[Panel], condition: Callable[[Row], Any]) -> list[Panel]:
    """Returns the panels with only the rows for which `condition` is true, without empty panels."""
    selected = [Panel(panel.title, tuple(row for row in panel.rows if condition(row))) for panel in panels]
    return [panel for panel in selected if panel.rows]


def point_panel_height(panel: Panel) -> float:
    """Returns the height in inches of a panel with labelled points."""
    return min(4.6, 2.4 + 0.2 * len(panel.rows))


def _row_panel_height(panel: Panel) -> float:
    return 0.21 * len(panel.rows) + 0.7


def label_rows(axes: Any, panel: Panel) -> list[Any]:
    """Draws the title of the panel, and labels the y axis with its rows, the first row at the top.

    Returns:
        The label of each row.
    """
    axes.set_title(panel.title)
    axes.set_yticks(range(len(panel.rows)), [panel.label(row) for row in panel.rows])
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    return list(axes.get_yticklabels())


def _range_text(panel: Panel, values: Sequence[tuple[Row, float]], unit: str = "") -> str:
    """Returns a text with the smallest and the largest value and their rows."""
    if not values:
        return "not measured"
    (first_row, least), (last_row, most) = min(values, key=lambda pair: pair[1]), max(values, key=lambda pair: pair[1])
    return f"{least:.2f}{unit} ({panel.label(first_row)}) to {most:.2f}{unit} ({panel.label(last_row)})"
