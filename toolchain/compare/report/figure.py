"""One figure of a row, as a table shows it."""

from __future__ import annotations

from dataclasses import dataclass

NOTHING = "–"


@dataclass(frozen=True)
class Figure:
    """One figure or name of a row, as a table shows it.

    Attributes:
        text: The figure without its note, or the name.
        number: Number by which tables sort the figure: the first number in `text`. None if `text` is a name, such as
            the name of a model.
        note: Text that compares the figure with the baseline, such as ``1.52×``; may be empty.
    """

    text: str
    number: float | None = None
    note: str = ""

    @classmethod
    def from_number(cls, value: float | None, form: str, suffix: str = "", note: str = "") -> Figure | None:
        """Returns a number as a figure; None if the number is unknown.

        Args:
            value: The number; None if it is unknown.
            form: Format specification of the number.
            suffix: Text after the number.
            note: Text that compares the figure with the baseline, such as ``1.52×``; may be empty.
        """
        if value is None:
            return None
        text = format(value, form)
        return cls(text + suffix, float(text), note)

    def with_unit(self, unit: str) -> str:
        """Returns the figure with its unit and its note."""
        return " ".join(filter(None, [self.text, unit, f"({self.note})" if self.note else ""]))

    def __str__(self) -> str:
        return self.with_unit("")


def show_figure(figure: Figure | None) -> str:
    """Returns the text of a figure; `NOTHING` if there is no figure."""
    return NOTHING if figure is None else str(figure)
