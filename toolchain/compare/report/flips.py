"""Flips of a row: sentences whose answer is correct in the row and wrong in its baseline, or the reverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.compare.report.columns import host_name
from toolchain.compare.rows import Row
from toolchain.data import inputs
from toolchain.data.files import Text
from toolchain.data.labels import SEPARATOR, LabelSet
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile

MOST = 100  # maximum number of sentences in a list of flips


@dataclass(frozen=True)
class Sentence:
    """A sentence of the data with its correct label.

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
    """A list of sentences; of a long list, the report shows only the beginning.

    Attributes:
        count: Number of all sentences in the list, including those that the report does not show.
        shown: The sentences that the report shows, at most `MOST`.
    """

    count: int
    shown: list[Sentence]


@dataclass(frozen=True)
class Flip:
    """The sentences that either a cell or its baseline answers correctly, but not both.

    Attributes:
        cell: The cell.
        baseline: Cell of the baseline.
        place: Model and machine.
        lost: Sentences that the baseline answers correctly and the cell answers wrongly.
        won: Sentences that the cell answers correctly and the baseline answers wrongly.
        row: The row of the cell.
    """

    cell: str
    baseline: str
    place: str
    lost: Sentences
    won: Sentences
    row: Row


@dataclass(frozen=True)
class SharedLoss:
    """The sentences that a baseline answers correctly and all rows compared with this baseline answer wrongly.

    Attributes:
        baseline: Cell of the baseline.
        place: Model and machine.
        others: Number of rows that are compared with the baseline.
        lost: The sentences.
    """

    baseline: str
    place: str
    others: int
    lost: Sentences


class Texts:
    """Texts of sentences by row number.

    Result files hold no texts, so only sentences of the embedded SST-2 have texts. The class reads the embedded
    SST-2 when a text is first needed.
    """

    def __init__(self) -> None:
        self._embedded: inputs.Data | None = None

    def sentences(self, run: ResultFile, rows: Sequence[int]) -> Sentences:
        """Returns the sentences at the indices `rows`; the texts are empty if the run did not use the embedded SST-2.

        Args:
            run: The run, with its data's digest and labels.
            rows: Indices of the sentences in the run's data, from 0.
        """
        if rows and self._embedded is None:
            self._embedded = inputs.load_embedded()
        labels = run.data["labels"] if rows else ()
        # A file that states the digest of the embedded SST-2 may hold other labels, or more of them.
        data = self._embedded
        if data and (data.sha256 != run.data["sha256"] or list(data.labels) != list(labels)):
            data = None
        names = run.data.get("label_names")  # result files of older releases lack the key `label_names`
        label_set = LabelSet(tuple(names), run.task) if names else data and data.label_set
        shown = [
            Sentence(
                row + 1,
                _text(data.texts[row]) if data else "",
                label_set.format_answer(labels[row]) if label_set else f"label {labels[row]}",
            )
            for row in rows[:MOST]
        ]
        return Sentences(len(rows), shown)


def _text(text: Text) -> str:
    return text if isinstance(text, str) else SEPARATOR.join(text)


def flips(rows: Sequence[Row], texts: Texts) -> list[Flip]:
    """Returns, for each row, the sentences that either the row or its baseline answers correctly, but not both.

    Each `Flip` holds the sentences of one row. The list omits baselines. The list also omits a row if the answers of
    the row or of its baseline are unknown.
    """
    return [
        Flip(
            row.measurement.cell,
            row.baseline.cell,
            _model_and_machine(row),
            texts.sentences(row.run, row.changed_sentences("lost")),
            texts.sentences(row.run, row.changed_sentences("won")),
            row,
        )
        for row in rows
        if _has_flips(row) and row.baseline
    ]


def shared_losses(rows: Sequence[Row], texts: Texts) -> list[SharedLoss]:
    """Returns the sentences that a baseline answers correctly and all rows compared with this baseline answer wrongly.

    Each `SharedLoss` holds these sentences for one baseline of one run. The list omits a baseline if fewer than two
    rows are compared with this baseline.
    """
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if _has_flips(row):
            groups.setdefault((id(row.run), id(row.baseline)), []).append(row)
    losses = []
    for group in groups.values():
        base, common = group[0].baseline, set.intersection(*(set(row.changed_sentences("lost")) for row in group))
        if len(group) > 1 and base:
            losses.append(
                SharedLoss(
                    base.cell, _model_and_machine(group[0]), len(group), texts.sentences(group[0].run, sorted(common))
                )
            )
    return losses


def _has_flips(row: Row) -> bool:
    base: Measurement | None = row.baseline
    return bool(row.quality and row.quality.lost is not None and row.measurement is not base)


def _model_and_machine(row: Row) -> str:
    return f"{row.measurement.model} on {host_name(row)}"
