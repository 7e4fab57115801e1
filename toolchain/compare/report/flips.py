"""Which sentences a variant answers otherwise than its baseline, in words where they are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.compare.report.columns import host
from toolchain.compare.rows import Row
from toolchain.data import inputs
from toolchain.data.files import Text
from toolchain.data.labels import SEPARATOR, LabelSet
from toolchain.results.measurements import Measurement, ResultFile

MOST = 100  # sentences shown of a list


@dataclass(frozen=True)
class Sentence:
    """A row of the data, from 1: its text (empty where only the number is known) and its label."""

    number: int
    text: str
    label: str


@dataclass(frozen=True)
class Sentences:
    """The first `MOST` of so many."""

    count: int
    shown: list[Sentence]


@dataclass(frozen=True)
class Flip:
    """What a cell lost and won against its baseline; `where` names model and machine."""

    cell: str
    baseline: str
    where: str
    lost: Sentences
    won: Sentences


@dataclass(frozen=True)
class Shared:
    """What the baseline of a run has right and all `others` of its cells have wrong."""

    baseline: str
    where: str
    others: int
    lost: Sentences


class Texts:
    """The sentences of the data that comes with the toolchain, read when first asked for; other data has numbers."""

    def __init__(self) -> None:
        self._known: inputs.Data | None = None

    def named(self, run: ResultFile, rows: Sequence[int]) -> Sentences:
        """These rows of the run's data."""
        if rows and self._known is None:
            self._known = inputs.embedded()
        known = self._known if self._known and self._known.sha256 == run.data["sha256"] else None
        labels = run.data["labels"] if rows else ()
        names = run.data.get("label_names")  # older runs have none
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
    """One for each row whose answers and whose baseline's are known."""
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
    """One for each run and baseline with more than one other row."""
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
