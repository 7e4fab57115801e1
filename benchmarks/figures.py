"""Figures of the studies: the common style, and the file, whose bytes depend on the plotted values only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def axes(path: Path, x_label: str, y_label: str) -> Iterator[Any]:
    """Yields empty axes of matplotlib, and writes them to `path` as SVG when the block ends."""
    import matplotlib as mpl
    from matplotlib import pyplot

    style = {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        yield axes
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
