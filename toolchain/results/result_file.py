"""The result file of one benchmark run: one row for each cell, with raw samples.

A result file stores each percentile and rate together with its samples. Reading a result file fails if samples are
missing, or if a figure does not follow from its samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from toolchain.data.labels import MULTI, REGRESSION, SINGLE, TASKS, TOKENS, Answer, LabelSet
from toolchain.errors import ResultFileError
from toolchain.results.measurements import BATCHED, SAMPLES, Measurement, Samples
from toolchain.results.scores import SCORES, Accuracy, EntityScore, RegressionScore, score_answers
from toolchain.system import files
from toolchain.system.decoding import decode, strict

SCHEMA = 2  # result files of schema 1 have no probabilities, start times or labels


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
    machine: Mapping[str, Any]
    run: Mapping[str, Any]
    data: Mapping[str, Any]
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
            result = decode(_Stored, path.read_bytes()).to_result()
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
        for key, kind in (("id", str), ("cpu", str), ("cores", int), ("ram_gib", int), ("isa", list), ("gpu", list)):
            if not isinstance(self.machine.get(key), kind):
                raise ValueError(f"machine.{key} is {self.machine.get(key)!r}")
        if not all(isinstance(gpu, dict) and "name" in gpu for gpu in self.machine["gpu"]):
            raise ValueError("a GPU in the list machine.gpu has no name")
        for key, kind in (("name", str), ("sha256", str), ("rows", int)):
            if not isinstance(self.data.get(key), kind) or not self.data[key]:
                raise ValueError(f"data.{key} is {self.data.get(key)!r}")
        if self.task not in TASKS:
            raise ValueError(f"data.task is {self.task!r}")
        names = self.data.get("label_names", [])
        if self.task == TOKENS and not (names and isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise ValueError("data.label_names lacks the label names of the words")
        labels = self.data.get("labels", [])
        if labels and (len(labels) != self.data["rows"] or not self._are_answers(labels)):
            raise ValueError("the list `labels` needs one answer for each row of the data")
        if len({(row.model, row.cell) for row in self.rows}) < len(self.rows):
            raise ValueError("two rows have the same cell")
        for row in self.rows:
            for score in (row.score, row.score_batched):
                if score and row.status == "ok" and score.count != self.data["rows"]:
                    raise ValueError(f"{row.cell} has {score.count} predictions for {self.data['rows']} sentences")
            for name in ("predictions", "probabilities"):
                count = len(getattr(row, name))
                if labels and count not in (0, self.data["rows"]):
                    raise ValueError(f"{row.cell} has {count} {name} for {self.data['rows']} sentences")
            chances = zip(row.predictions, row.probabilities, strict=False)
            pairs = [(a, len(c)) for a, c in chances if c is not None and isinstance(a, int)]
            if not all(0 <= a < (1 << n if self.task == MULTI else n) for a, n in pairs):
                raise ValueError(f"{row.cell} has a prediction without a probability")
            if not self._are_answers(row.predictions):
                raise ValueError(f"{row.cell} has a prediction that is no answer of its task")
            if not (labels and row.predictions and row.score):
                continue
            if row.score != score_answers(
                row.predictions, labels, LabelSet(tuple(names), self.task), row.score.batch_size
            ):
                raise ValueError(f"{row.cell}: the score does not follow from the predictions")

    def _are_answers(self, values: Sequence[Answer]) -> bool:
        """Returns whether all values can be answers of the task, as in `toolchain.data.labels`."""
        if self.task == REGRESSION:
            return all(not isinstance(value, tuple) for value in values)
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
    count: int

    def __post_init__(self) -> None:
        if not self.rounds or not all(self.rounds):
            raise ValueError("there is a round without a time")
        if not all(value > 0 for row in (*self.rounds, *self.sentences) for value in row):
            raise ValueError("a time or a number of sentences is not positive")
        if [len(row) for row in self.rounds] != [len(row) for row in self.sentences]:
            raise ValueError("a round does not have one number of sentences for each time")

    def to_samples(self) -> Samples:
        return Samples(self.rounds, self.sentences, self.count)


@strict
@dataclass(frozen=True)
class _StoredAccuracy:
    value: float
    correct: int
    count: int
    batch_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.count or round(self.correct / max(1, self.count), 6) != self.value:
            raise ValueError(
                f"the accuracy {self.value} does not follow from {self.correct} correct predictions of {self.count}"
            )

    def to_score(self) -> Accuracy:
        return Accuracy(self.correct, self.count, self.batch_size)


@strict
@dataclass(frozen=True)
class _StoredRegression:
    r2: float
    mean_absolute_error: float
    root_mean_squared_error: float
    count: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.r2 > 1 or self.mean_absolute_error < 0 or self.root_mean_squared_error < self.mean_absolute_error:
            raise ValueError("the errors of the regression contradict each other")

    def to_score(self) -> RegressionScore:
        return RegressionScore(**vars(self))


@strict
@dataclass(frozen=True)
class _StoredEntities:
    value: float
    found: int
    predicted: int
    labelled: int
    count: int
    batch_size: int

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

    cell: str
    model: str
    variant: str
    provider: str
    artifact_id: str | None
    status: Literal["ok", "failed", "unavailable", "reported"]
    reason: str = ""
    mend: str = ""
    accuracy: _StoredAccuracy | None = None
    accuracy_batched: _StoredAccuracy | None = None
    regression: _StoredRegression | None = None
    regression_batched: _StoredRegression | None = None
    entities: _StoredEntities | None = None
    entities_batched: _StoredEntities | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    with_tokenizing_ms: dict[str, float] = field(default_factory=dict)
    resident_ms: dict[str, float] = field(default_factory=dict)
    cold_start_ms: dict[str, float] = field(default_factory=dict)
    load_ms: dict[str, float] = field(default_factory=dict)
    throughput_per_s: float | None = None
    memory_bytes: dict[str, Any] = field(default_factory=dict)
    size_bytes: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    samples: dict[str, _StoredSamples] = field(default_factory=dict)
    by_length: dict[int, _StoredSamples] = field(default_factory=dict)
    predictions: tuple[Answer, ...] = ()
    probabilities: tuple[tuple[int, ...] | None, ...] = ()
    batch_changed: int | None = None

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
        values["by_length"] = {tokens: samples.to_samples() for tokens, samples in self.by_length.items()}
        row = Measurement(**values)
        if row.cell != self.cell:
            raise ValueError(f"the cell {self.cell!r} does not match its variant and provider {row.cell!r}")
        row.check()
        return row


@strict
@dataclass(frozen=True)
class _Stored:
    """The form of a `ResultFile` on disk."""

    schema: Literal[1, 2]
    created: str
    toolchain: str
    machine: dict[str, Any]
    run: dict[str, Any]
    data: dict[str, Any]
    rows: tuple[_StoredRow, ...]
    labels: tuple[Answer, ...] = ()

    def to_result(self) -> ResultFile:
        data = {**self.data, **({"labels": list(self.labels)} if self.labels else {})}
        rows = tuple(row.to_measurement() for row in self.rows)
        return ResultFile(self.created, self.toolchain, self.machine, self.run, data, rows)
