"""The baselines that a reader of the HTML report can choose, and the texts that each choice changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.compare.report import sections
from toolchain.compare.report.notes import baseline_names, baseline_note
from toolchain.compare.report.panels import panels
from toolchain.compare.report.point_texts import baseline_text
from toolchain.compare.rows import Row, with_baseline
from toolchain.system.escaping import escape_controls

# Maximum number of pairs of a row and a baseline in a page. The intervals of each pair take a few milliseconds.
MOST_PAIRS = 2000
# A text in the page that depends on the baseline: the name of a table or list, and the indices of the text in it.
Place = tuple[str | int, ...]
# The text of a place, and the value by which a table sorts it; None if the figure is unknown, or outside tables.
Content = tuple[str, float | str | None]


@dataclass(frozen=True)
class Choice:
    """A baseline that a reader can choose.

    Attributes:
        label: Name of the baseline.
        rows: The rows of the page with this baseline.
    """

    label: str
    rows: list[Row]


def choices(rows: Sequence[Row]) -> list[Choice]:
    """Returns the baselines of a page: first the present one, then each variant, and each cell of several providers.

    A variant stands for its row on the provider of each row, or on the CPU, as with the option ``--baseline``. The list
    omits choices that give all rows the same baseline as a choice before. The list ends when the choices have
    `MOST_PAIRS` pairs of a row and a baseline.

    Args:
        rows: The rows with figures.
    """
    present = Choice(baseline_names(rows) or "none", list(rows))
    found = {_baseline_ids(rows): present}
    providers: dict[str, set[str]] = {}
    for row in rows:
        providers.setdefault(row.measurement.variant, set()).add(row.measurement.provider)
    names = [name for name, used in providers.items() if len(used) > 1]
    names += dict.fromkeys(row.measurement.cell for row in rows)
    for name in names:
        if (len(found) + 1) * len(rows) > MOST_PAIRS:
            break
        chosen = with_baseline(rows, name)
        found.setdefault(_baseline_ids(chosen), Choice(name, chosen))
    return list(found.values())


def _baseline_ids(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(id(row.baseline) for row in rows)


def page_contents(rows: Sequence[Row], others: Sequence[Row]) -> dict[Place, Content]:
    """Returns the texts that depend on the baseline, as the report computes them for the rows.

    Args:
        rows: The rows with figures.
        others: The same rows with other baselines, which decide on the columns.
    """
    contents: dict[Place, Content] = {("note",): (baseline_note(rows) or "There is no baseline.", None)}
    tables = {
        "comparison": sections.comparison(rows),
        "stages": sections.stages(rows, others),
        "quality": sections.quality(rows, others),
    }
    for name, table in tables.items():
        if table:
            for line, entries in enumerate(table.rows):
                for column, entry in enumerate(entries):
                    contents[name, line, column] = (entry.text, table.key(line, column))
    for index, panel in enumerate(panels(rows)):
        for position, best in enumerate(sections.best_rows(panel)):
            for line, text in enumerate(best.texts):
                contents["best", index, position, line] = (text, None)
    return contents


class Baselines:
    """The choices of a page, the places that they change, and the data for the page's script.

    Attributes:
        choices: The choices; the first one is the baseline that the page shows at first.
        places: Place → its number in the page. Only texts that differ between choices have a place.
        others: The rows of all choices, which decide on the columns of the tables.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.choices = choices(rows)
        self.others = [row for choice in self.choices for row in choice.rows]
        self._contents = [page_contents(choice.rows, self.others) for choice in self.choices]
        changed = [place for place in self._contents[0] if len({contents[place] for contents in self._contents}) > 1]
        self.places = {place: number for number, place in enumerate(changed)}

    def place(self, *place: str | int) -> int | None:
        """Returns the number of a place; None if its text is the same for all choices."""
        return self.places.get(place)

    def to_data(self, number_of: Callable[[Row], int]) -> dict[str, Any]:
        """Returns the choices for the page's script.

        Args:
            number_of: Function that returns the number of a row of the page.

        Returns:
            The key ``contents`` holds each pair of a text and a sort value once. Each choice names its baseline rows,
            the text that compares each row with its baseline, and for each place the index in ``contents``.
        """
        indices: dict[Content, int] = {}
        numbers = [number_of(row) for row in self.choices[0].rows]
        data = [
            {
                "baselines": [
                    number for number, row in zip(numbers, choice.rows, strict=True) if row.measurement is row.baseline
                ],
                "rows": [
                    [number, escape_controls(baseline_text(row))]
                    for number, row in zip(numbers, choice.rows, strict=True)
                ],
                "places": [indices.setdefault(contents[place], len(indices)) for place in self.places],
            }
            for choice, contents in zip(self.choices, self._contents, strict=True)
        ]
        return {"contents": [(escape_controls(text), key) for text, key in indices], "choices": data}
