"""The result file of one benchmark run: one row for each cell, with raw samples.

A result file stores each percentile and rate together with its samples. Reading a result file fails if samples are
missing, or if a figure does not follow from its samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from toolchain.data.labels import MULTI, REGRESSION, SINGLE, TOKENS, Answer, LabelSet
from toolchain.errors import ResultFileError
from toolchain.results.facts import (
    CellFacts,
    DataFacts,
    Memory,
    RunSettings,
    Size,
    StoredData,
    StoredFacts,
    StoredMemory,
    StoredRun,
    StoredSize,
)
from toolchain.results.measurements import BATCHED, MAX_SAMPLES, MAX_TIME_US, SAMPLES, Measurement, Samples
from toolchain.results.scores import SCORES, Accuracy, EntityScore, RegressionScore, score_answers
from toolchain.system import files
from toolchain.system.decoding import Amount, Check, Count, Line, Name, Note, decode, read_bytes, strict
from toolchain.system.hardware import Machine, StoredMachine

SCHEMA = 2  # result files of schema 1 have no probabilities, start times or labels
MAX_ROWS = 1000
MAX_SENTENCES = 10**9
MAX_SCORE = 1e15  # a larger score of a regression would overflow in the sum of squared errors


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class ResultFile:
    """The result file of one benchmark run.

    Attributes:
        created: Date and time of the result, in UTC and ISO 8601 format.
        toolchain: Release of the toolchain.
        machine: Description of the machine; see `hardware.machine`.
        run: Settings of the run.
        data: Name, digest and number of rows of the data, the task of the model as ``task``, and the label of each
            sentence as ``labels``.
        rows: The measurements.
    """

    created: str
    toolchain: str
    machine: Machine
    run: RunSettings
    data: DataFacts
    rows: tuple[Measurement, ...]

    @property
    def task(self) -> str:
        """Returns the task of the model; older files say only whether the model is a multi-label model."""
        return str(self.data.get("task", MULTI if self.data.get("multi_label") else SINGLE))

    def to_json(self) -> str:
        """Returns the text of the file, with one measurement on each line."""
        head = {name: getattr(self, name) for name in ("created", "toolchain", "machine", "run", "data")}
        head["data"] = {name: value for name, value in self.data.items() if name != "labels"}
        text = json.dumps({"schema": SCHEMA, **head}, indent=1, allow_nan=False)[:-2]
        rows = ",\n".join(f"  {_line(row.to_json())}" for row in self.rows)
        return f'{text},\n "labels": {_line(self.data.get("labels", []))},\n "rows": [\n{rows}\n ]\n}}\n'

    def write(self, path: Path, *, replace: bool = True) -> None:
        """Writes the file atomically.

        Raises:
            FileExistsError: `path` exists and `replace` is false.
            ResultFileError: The file cannot be written.
        """
        try:
            files.write_whole(path, self.to_json(), replace=replace)
        except FileExistsError:
            raise
        except OSError as error:
            raise ResultFileError.unwritable(path, error) from error

    @classmethod
    def read(cls, path: Path) -> ResultFile:
        """Reads and checks a result file.

        Raises:
            ResultFileError: The file is missing, unreadable or contradicts itself; the message states the problem.
        """

        try:
            result = decode(_Stored, read_bytes(path)).to_result()
            result.check()
        except FileNotFoundError as error:
            raise ResultFileError(
                f"There is no result file {path}.", "Measure with `toolchain bench`, which writes a result file."
            ) from error
        except (ValueError, OSError) as error:
            hint = "Delete or move the file, and measure again with `toolchain bench`."
            raise ResultFileError(f"{path} is not a valid result file: {error}.", hint) from error
        return result

    def check(self) -> None:
        """Checks the fields that a comparison needs.

        Raises:
            ValueError: A field is missing, has the wrong type, or contradicts another field.
        """
        names, labels = self.data.get("label_names", []), self.data.get("labels", [])
        if not 0 < self.data["rows"] <= MAX_SENTENCES:
            raise ValueError(f"data.rows is {self.data['rows']}")
        if self.task == TOKENS and not names:
            raise ValueError("data.label_names lacks the label names of the words")
        if labels and (len(labels) != self.data["rows"] or not self._are_answers(labels)):
            raise ValueError("the list `labels` needs one answer for each row of the data")
        self._check_label_counts(labels)
        if len({(row.model, row.cell) for row in self.rows}) < len(self.rows):
            raise ValueError("two rows have the same cell")
        for row in self.rows:
            for score in (row.score, row.score_batched):
                if score and row.status == "ok" and score.count != self.data["rows"]:
                    raise ValueError(f"{row.cell} has {score.count} predictions for {self.data['rows']} sentences")
            for name in ("predictions", "probabilities", "exits"):
                count = len(getattr(row, name))
                if labels and count not in (0, self.data["rows"]):
                    raise ValueError(f"{row.cell} has {count} {name} for {self.data['rows']} sentences")
            if not self._are_answers(row.predictions):
                raise ValueError(f"{row.cell} has a prediction that is no answer of its task")
            if not (labels and row.predictions and row.score):
                continue
            if row.score != score_answers(
                row.predictions, labels, LabelSet(tuple(names), self.task), row.score.batch_size
            ):
                raise ValueError(f"{row.cell}: the score does not follow from the predictions")

    def _check_label_counts(self, labels: Sequence[Answer]) -> None:
        """Requires that the answers and probabilities of each model, and the labels, have the same number of labels."""
        names = self.data.get("label_names", [])
        counts: dict[str, int] = {}
        for row in self.rows:
            sizes = {len(chances) for chances in row.probabilities if chances is not None}
            if names and self.task in (SINGLE, MULTI):
                sizes.add(len(names))
            if (sizes and sizes != {counts.setdefault(row.model, min(sizes))}) or 0 in sizes:
                raise ValueError(f"{row.cell} has another number of probabilities than labels")
            if (count := counts.get(row.model)) is None or self.task not in (SINGLE, MULTI):
                continue
            limit = 1 << count if self.task == MULTI else count
            if not all(isinstance(answer, int) and answer < limit for answer in (*row.predictions, *labels)):
                raise ValueError(f"{row.cell} has a prediction or a label without a probability")

    def _are_answers(self, values: Sequence[Answer]) -> bool:
        """Returns whether all values can be answers of the task, as in `toolchain.data.labels`."""
        if self.task == REGRESSION:
            return all(not isinstance(value, tuple) and abs(value) <= MAX_SCORE for value in values)
        if self.task == TOKENS:
            count = len(self.data["label_names"])
            return all(isinstance(value, tuple) and all(0 <= label < count for label in value) for value in values)
        return all(isinstance(value, int) and value >= 0 for value in values)


@strict
@dataclass(frozen=True)
class _StoredSamples:
    unit: Literal["us"]
    rounds: tuple[tuple[int, ...], ...]
    sentences: tuple[tuple[int, ...], ...]
    count: Count

    def __post_init__(self) -> None:
        if not self.rounds or not all(self.rounds):
            raise ValueError("there is a round without a time")
        if not all(0 < value <= MAX_TIME_US for row in (*self.rounds, *self.sentences) for value in row):
            raise ValueError(f"a time or a number of sentences is not positive, or is above {MAX_TIME_US}")
        sizes = [len(row) for row in self.rounds]
        # Intervals of the median use tables of shape [rounds, longest round].
        if not sum(sizes) <= self.count or sum(sizes) > MAX_SAMPLES or len(sizes) * max(sizes) > 16 * MAX_SAMPLES:
            raise ValueError("there are too many times, or one round has far more times than the others")
        if [len(row) for row in self.rounds] != [len(row) for row in self.sentences]:
            raise ValueError("a round does not have one number of sentences for each time")

    def to_samples(self) -> Samples:
        return Samples(self.rounds, self.sentences, self.count)


@strict
@dataclass(frozen=True)
class _StoredAccuracy:
    value: float
    correct: Count
    count: Count
    batch_size: Count

    def __post_init__(self) -> None:
        if not (self.count and self.correct <= self.count and round(self.correct / self.count, 6) == self.value):
            raise ValueError(
                f"the accuracy {self.value} does not follow from {self.correct} correct predictions of {self.count}"
            )

    def to_score(self) -> Accuracy:
        return Accuracy(self.correct, self.count, self.batch_size)


@strict
@dataclass(frozen=True)
class _StoredRegression:
    r2: float
    mean_absolute_error: Amount
    root_mean_squared_error: Amount
    count: Count
    batch_size: Count

    def __post_init__(self) -> None:
        if not -MAX_SCORE <= self.r2 <= 1 or self.root_mean_squared_error < self.mean_absolute_error:
            raise ValueError("the errors of the regression contradict each other")

    def to_score(self) -> RegressionScore:
        return RegressionScore(**vars(self))


@strict
@dataclass(frozen=True)
class _StoredEntities:
    value: float
    found: Count
    predicted: Count
    labelled: Count
    count: Count
    batch_size: Count

    def __post_init__(self) -> None:
        score = self.to_score()
        if not 0 <= self.found <= min(self.predicted, self.labelled) or round(score.value, 6) != self.value:
            raise ValueError("the numbers of entities contradict each other")

    def to_score(self) -> EntityScore:
        return EntityScore(self.found, self.predicted, self.labelled, self.count, self.batch_size)


@strict
@dataclass(frozen=True)
class _StoredRow:
    """The stored form of a `Measurement` in a result file."""

    cell: Line
    model: Name
    variant: Name
    provider: Name
    artifact_id: Line | None
    status: Literal["ok", "failed", "unavailable", "reported"]
    reason: Note = ""
    mend: Note = ""
    accuracy: _StoredAccuracy | None = None
    accuracy_batched: _StoredAccuracy | None = None
    regression: _StoredRegression | None = None
    regression_batched: _StoredRegression | None = None
    entities: _StoredEntities | None = None
    entities_batched: _StoredEntities | None = None
    latency_ms: dict[Line, Amount] = field(default_factory=dict)
    with_tokenizing_ms: dict[Line, Amount] = field(default_factory=dict)
    resident_ms: dict[Line, Amount] = field(default_factory=dict)
    cold_start_ms: dict[Line, Amount] = field(default_factory=dict)
    load_ms: dict[Line, Amount] = field(default_factory=dict)
    server_ms: dict[Line, Amount] = field(default_factory=dict)
    throughput_per_s: Amount | None = None
    memory_bytes: StoredMemory = field(default_factory=lambda: Memory())
    size_bytes: StoredSize = field(default_factory=lambda: Size())
    facts: StoredFacts = field(default_factory=lambda: CellFacts())
    noise: dict[Line, Amount] = field(default_factory=dict)
    samples: dict[Line, _StoredSamples] = field(default_factory=dict)
    by_length: dict[Count, _StoredSamples] = field(default_factory=dict)
    after_pause: dict[Count, _StoredSamples] = field(default_factory=dict)
    predictions: tuple[Answer, ...] = ()
    probabilities: tuple[tuple[int, ...] | None, ...] = ()
    exits: tuple[Count | None, ...] = ()
    batch_changed: Count | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.samples) - set(SAMPLES):
            raise ValueError(f"there are samples with an unknown name: {', '.join(sorted(unknown))}")

    def to_measurement(self) -> Measurement:
        values: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in fields(Measurement) if hasattr(self, item.name)
        }
        values |= {name: samples.to_samples() for name, samples in self.samples.items()}
        for field_name, ending in (("score", ""), ("score_batched", BATCHED)):
            stored = [score for kind in SCORES if (score := getattr(self, kind.key + ending))]
            if len(stored) > 1:
                raise ValueError(f"{self.cell} has the scores of two tasks")
            values[field_name] = stored[0].to_score() if stored else None
        for name in ("by_length", "after_pause"):
            values[name] = {key: samples.to_samples() for key, samples in getattr(self, name).items()}
        row = Measurement(**values)
        if row.cell != self.cell:
            raise ValueError(f"the cell {self.cell!r} does not match its variant and provider {row.cell!r}")
        row.check()
        return row


def _check_row_count(rows: tuple[_StoredRow, ...]) -> tuple[_StoredRow, ...]:
    if len(rows) > MAX_ROWS:
        raise ValueError(f"there are more than {MAX_ROWS} rows")
    return rows


@strict
@dataclass(frozen=True)
class _Stored:
    """The form of a `ResultFile` on disk."""

    schema: Literal[1, 2]
    created: Line
    toolchain: Line
    machine: StoredMachine
    run: StoredRun
    data: StoredData
    rows: Annotated[tuple[_StoredRow, ...], Check(_check_row_count)]
    labels: tuple[Answer, ...] = ()

    def __post_init__(self) -> None:
        if "labels" in self.data:
            raise ValueError("the labels are in the wrong place")

    def to_result(self) -> ResultFile:
        data: DataFacts = {**self.data, "labels": list(self.labels)} if self.labels else self.data
        rows = tuple(row.to_measurement() for row in self.rows)
        return ResultFile(self.created, self.toolchain, self.machine, self.run, data, rows)
