"""The marks of a plot, and the rows that they show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolchain.compare.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Mark:
    """A mark of a plot: a point, a bar, an interval, a label or a line.

    Attributes:
        rows: The rows that the mark shows. A filter that hides one of these rows also hides the mark.
        text: The text of the point: variant, machine, scenario, and values with units and intervals. The text is empty
            for marks without a text of their own, such as intervals and labels.
        compared: Whether the mark belongs to a plot that marks the baseline. The page then draws a ring around the
            baseline's mark, and the text of the mark ends with the row's ratio to the baseline.
        ring: Whether the mark is the ring around the baseline. The page draws its own rings, because a reader can
            choose another baseline.
    """

    rows: tuple[Row, ...]
    text: str = ""
    compared: bool = False
    ring: bool = False


class Marks:
    """The marks of a plot by the id that their elements have in the plot's SVG."""

    def __init__(self) -> None:
        self.by_id: dict[str, Mark] = {}

    def add(self, artist: Any, mark: Mark) -> None:
        """Gives the artist of Matplotlib an id, and stores the artist's mark under this id."""
        identifier = f"mark-{len(self.by_id)}"
        artist.set_gid(identifier)
        self.by_id[identifier] = mark

    @contextlib.contextmanager
    def of_row(self, axes: Any, row: Row, text: str = "", compared: bool = False) -> Iterator[None]:
        """Assigns everything that the block draws to a row; the mark that the block draws last has the text.

        Args:
            axes: The axes in which the block draws.
            row: The row.
            text: The text of the point.
            compared: Whether the plot marks the baseline.
        """
        present = {id(artist) for artist in axes.get_children()}
        yield
        new = [artist for artist in axes.get_children() if id(artist) not in present]
        for artist in new:
            is_last = artist is new[-1]
            self.add(artist, Mark((row,), text if is_last else "", compared and is_last))

    def add_labels(self, rows: Sequence[Row], labels: Sequence[Any]) -> None:
        """Assigns each label, and the line from the label to its point, to the row of the point."""
        for row, label in zip(rows, labels, strict=True):
            self.add(label, Mark((row,)))
            if arrow := getattr(label, "arrow_patch", None):
                self.add(arrow, Mark((row,)))


@dataclass(frozen=True)
class Drawing:
    """A drawn plot.

    Attributes:
        figure: The figure.
        descriptions: Content of each panel in words.
        marks: The marks of the figure.
    """

    figure: Figure
    descriptions: Sequence[str]
    marks: Marks = field(default_factory=Marks)
