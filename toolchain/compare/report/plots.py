"""The comparison as plots, for the HTML report or as SVG and PNG files."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.compare.report import drawing, drawing_exits, drawing_figures, drawing_machines
from toolchain.compare.report.canvas import STYLE
from toolchain.compare.report.columns import rows_with_figures
from toolchain.compare.report.panels import Panel, panels, printable
from toolchain.compare.report.points import Drawing, Marks
from toolchain.compare.rows import Row
from toolchain.errors import ResultFileError
from toolchain.system import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS_PER_INCH = 160


@dataclass(frozen=True)
class Plot:
    """A plot with its heading, its caption and its description for screen readers.

    Attributes:
        figure: The figure.
        title: The heading.
        caption: Text that explains the plot and how to read it.
        alt: Content of the plot in words, for screen readers.
        panels: Content of each panel in words.
        marks: The marks of the plot, and the rows that they show.
    """

    figure: Figure
    title: str
    caption: str
    alt: str
    panels: tuple[str, ...] = ()
    marks: Marks = field(default_factory=Marks)

    def __repr__(self) -> str:
        """Returns one line that names the plot."""
        return f"<Plot {self.title!r}>"

    def _repr_svg_(self) -> str:
        """Returns the plot as SVG on a white background, which a notebook shows."""
        return svg(self, self.title, "white")

    def save(self, path: str | Path) -> None:
        """Writes the plot to a file, whose ending is ``.svg`` or ``.png``.

        Raises:
            ResultFileError: The path has another ending, or the file cannot be written.
        """
        file = Path(path)
        if file.suffix not in (".svg", ".png"):
            raise ResultFileError(f"A plot cannot be written to {file}.", "Choose a path that ends in .svg or .png.")
        _write(file, svg(self, self.title, "white").encode() if file.suffix == ".svg" else _png(self, self.title))


# Name of a plot → heading, caption, and the function that draws the plot or returns None if there is no data.
PLOTS: dict[str, tuple[str, str, Callable[[Sequence[Panel]], Drawing | None]]] = {
    "accuracy-latency-machines": (
        "Accuracy against latency on several machines",
        "Up and to the left is better. Colour and shape show the machine. Bars are 95 % intervals. Each machine has "
        "its own Pareto front and its own baseline, because ratios are never taken across machines. If a panel has "
        "many points, it names only the fastest, the most accurate and the baseline row of each machine.",
        drawing_machines.accuracy_latency_of_machines,
    ),
    "latency-machines": (
        "Latency of the variants on several machines",
        "To the left is better. Only variants that several machines measured are shown. Colour and shape show the "
        "machine. Bars are 95 % intervals of the median over rounds.",
        drawing_machines.latency_of_machines,
    ),
    "accuracy-latency": (
        "Accuracy against latency",
        "Up and to the left is better. Vertical bars are 95 % intervals of the score over sentences. Horizontal "
        "bars are 95 % intervals of the median over rounds. No row is both faster and more accurate than a row on the "
        "dashed line. A ring marks the baseline.",
        drawing.accuracy_latency,
    ),
    "size-memory": (
        "Size and memory",
        "Shorter is better. Size is the size of the artifact's files. Memory is the peak memory of the process "
        "during the measurement.",
        drawing.size_memory,
    ),
    "latency": (
        "Distribution of latency",
        "Latency is measured at batch 1, with each sentence at its own length. The box reaches from the 25th to the "
        "75th percentile, with a line at the median. The whiskers reach from the 5th to the 95th percentile. The cross "
        "is the 99th percentile.",
        drawing.latency,
    ),
    "latency-by-length": (
        "Latency by length",
        "Median latency at batch 1 by number of tokens of the sentence, special tokens included.",
        drawing.latency_by_length,
    ),
    "pruning-speedup": (
        "Predicted and measured speed-up of pruning",
        "The baseline is the same variant without pruning, in the same run, at batch 1. On the line, the measurement "
        "equals the prediction. Below the line, the speed-up is smaller than predicted. Bars are 95 % intervals over "
        "rounds.",
        drawing.pruning_speedup,
    ),
    "exits-work": (
        "Accuracy against the work with exits",
        "Up and to the left is better. Each point is a confidence threshold that the build measured on held-out rows. "
        "The accuracy change is relative to the same variant without exits. A ring marks the threshold of the variant.",
        drawing_exits.exits_work,
    ),
    "exits-latency": (
        "Accuracy against mean latency with exits",
        "Up and to the left is better. A line connects the variants with exits of one parent, and the parent.",
        drawing_exits.exits_latency,
    ),
}


def figures(rows: Sequence[Row], names: Collection[str] = tuple(PLOTS)) -> dict[str, Plot]:
    """Returns the plots that have data, by name, with one panel for each model, machine, data set and thread count.

    Args:
        rows: The rows.
        names: Names of the plots.
    """
    shown = panels(rows_with_figures(rows))
    plots = {}
    with _style():
        for name, (title, caption, draw) in PLOTS.items():
            if name in names and (drawn := draw(shown)):
                plots[name] = _plot(drawn, title, caption)
    return plots


def svg(plot: Plot, name: str, background: str = "none") -> str:
    """Returns the plot as SVG with text elements instead of outlines; the same rows give the same bytes.

    Args:
        plot: The plot.
        name: Salt of the ids in the SVG; a fixed salt makes the ids reproducible.
        background: Colour of the background; ``none`` is transparent.
    """
    out = io.StringIO()
    with _style(name):
        plot.figure.savefig(out, format="svg", facecolor=background, metadata={"Date": None})
    return out.getvalue()


def figure_against(rows: Sequence[Row], y: str, x: str) -> Plot | None:
    """Returns a plot of one figure against another one, or None if no row has both.

    Args:
        rows: The rows.
        y: Name of the figure on the vertical axis, a key of `drawing_figures.AXES`.
        x: Name of the figure on the horizontal axis.
    """
    name = f"{y}-{x}"
    if name in PLOTS:
        return figures(rows, [name]).get(name)
    with _style():
        drawn = drawing_figures.figure_against(panels(rows_with_figures(rows)), y, x)
    caption = "Each point is a row of the comparison. A ring marks the baseline."
    return _plot(drawn, f"{y.capitalize()} against {x}", caption) if drawn else None


def _plot(drawn: Drawing, title: str, caption: str) -> Plot:
    texts = tuple(printable(f"{text}.", 4000) for text in drawn.descriptions)
    return Plot(drawn.figure, title, caption, printable(" ".join(texts), 4000), texts, drawn.marks)


def _png(plot: Plot, name: str) -> bytes:
    image = io.BytesIO()
    with _style(name):
        plot.figure.savefig(image, format="png", dpi=PIXELS_PER_INCH, facecolor="white", metadata={"Software": None})
    return image.getvalue()


def save(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes NAME.svg and NAME.png of each plot on a white background and returns their paths.

    Each file is written atomically.

    Raises:
        ResultFileError: A file cannot be written.
    """
    written = []
    for name, plot in figures(rows).items():
        for ending, content in (("svg", svg(plot, name, "white").encode()), ("png", _png(plot, name))):
            _write(folder / f"{name}.{ending}", content)
            written.append(folder / f"{name}.{ending}")
    return written


def _write(path: Path, content: bytes) -> None:
    try:
        files.write_whole(path, content)
    except OSError as error:
        raise ResultFileError.unwritable(path, error) from error


@contextlib.contextmanager
def _style(salt: str = "") -> Iterator[None]:
    import matplotlib as mpl

    settings: Any = {**STYLE, "svg.hashsalt": salt}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The font of the PNG may lack letters of a name, but the SVG uses the reader's fonts. Matplotlib's warning
        # about missing letters is therefore hidden.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield
