"""Sentences that only one of a row and its baseline answers correctly, with their texts if these are available."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.compare.report.columns import host
from toolchain.compare.rows import Row
from toolchain.data import inputs
from toolchain.data.files import Text
from toolchain.data.labels import SEPARATOR, LabelSet
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile

MOST = 100  # maximum number of sentences shown in a list


@dataclass(frozen=True)
class Sentence:
    """A row of the data.

    Attributes:
        number: Number of the row in the data; the first row is 1.
        text: Text of the row; empty if it is unknown.
        label: Name of the correct label.
    """

    number: int
    text: str
    label: str


@dataclass(frozen=True)
class Sentences:
    """A list of sentences, cut to the first `MOST`.

    Attributes:
        count: Number of sentences before the cut.
        shown: The first `MOST` sentences.
    """

    count: int
    shown: list[Sentence]


@dataclass(frozen=True)
class Flip:
    """The differences between the answers of a cell and of its baseline.

    Attributes:
        cell: The cell.
        baseline: Cell of the baseline.
        where: Model and machine.
        lost: Sentences that only the baseline answers correctly.
        won: Sentences that only the cell answers correctly.
    """

    cell: str
    baseline: str
    where: str
    lost: Sentences
    won: Sentences


@dataclass(frozen=True)
class Shared:
    """The sentences that the baseline answers correctly and all other rows of the run answer wrongly.

    Attributes:
        baseline: Cell of the baseline.
        where: Model and machine.
        others: Number of other rows.
        lost: The sentences.
    """

    baseline: str
    where: str
    others: int
    lost: Sentences


class Texts:
    """Texts of sentences by row number.

    The texts are known only for the data set that comes with the toolchain. The class reads it at the first use.
    """

    def __init__(self) -> None:
        self._known: inputs.Data | None = None

    def named(self, run: ResultFile, rows: Sequence[int]) -> Sentences:
        """Returns the sentences of the given rows; the texts are empty if the run used other data.

        Args:
            run: The run, with its data's digest and labels.
            rows: Indices into the run's data, from 0.
        """
        if rows and self._known is None:
            self._known = inputs.embedded()
        known = self._known if self._known and self._known.sha256 == run.data["sha256"] else None
        labels = run.data["labels"] if rows else ()
        names = run.data.get("label_names")  # result files of older releases do not have this key
        label_set = LabelSet(tuple(names), bool(run.data.get("multi_label"))) if names else known and known.label_set
        shown = [
            Sentence(
                row + 1,
                _text(known.texts[row]) if known else "",
                label_set.named(labels[row]) if label_set else f"label {labels[row]}",
            )
            for row in rows[:MOST]
        ]
        return Sentences(len(rows), shown)


def _text(text: Text) -> str:
    return text if isinstance(text, str) else SEPARATOR.join(text)


def flips(rows: Sequence[Row], texts: Texts) -> list[Flip]:
    """Returns one `Flip` for each row whose answers are known, and its baseline's answers too."""
    return [
        Flip(
            row.measurement.cell,
            row.baseline.cell,
            _where(row),
            texts.named(row.run, row.changed("lost")),
            texts.named(row.run, row.changed("won")),
        )
        for row in rows
        if _judged(row) and row.baseline
    ]


def shared(rows: Sequence[Row], texts: Texts) -> list[Shared]:
    """Returns one `Shared` for each run and baseline with more than one other row."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if _judged(row):
            groups.setdefault((id(row.run), id(row.baseline)), []).append(row)
    found = []
    for group in groups.values():
        base, common = group[0].baseline, set.intersection(*(set(row.changed("lost")) for row in group))
        if len(group) > 1 and base:
            found.append(Shared(base.cell, _where(group[0]), len(group), texts.named(group[0].run, sorted(common))))
    return found


def _judged(row: Row) -> bool:
    base: Measurement | None = row.baseline
    return bool(row.quality and row.quality.lost is not None and row.measurement is not base)


def _where(row: Row) -> str:
    return f"{row.measurement.model} on {host(row)}"
