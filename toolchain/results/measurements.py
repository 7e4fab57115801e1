"""Measurements: raw samples, the rows that summarise them, and the result file that stores the rows.

The result file stores each percentile and rate together with its samples. Reading a file fails if samples are missing,
or if a figure does not follow from its samples.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.errors import ResultFileError
from toolchain.system import files

SCHEMA = 2
READABLE = (1, SCHEMA)  # schema 1 has no probabilities, start times or labels
MAX_SAMPLES = 2000
STATUSES = ("ok", "failed", "unavailable", "reported")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
# Figure (quantiles in milliseconds) → the samples from which it is computed.
QUANTILES_OF = {
    "latency_ms": "latency",
    "with_tokenizing_ms": "with_tokenizing",
    "resident_ms": "resident",
    "cold_start_ms": "cold_start",
    "load_ms": "load",
}
SAMPLES = (*QUANTILES_OF.values(), "batches")
FIGURES = ("throughput_per_s", "memory_bytes", "size_bytes", "facts", "noise")
PROBABILITY = 10_000  # the stored integer for a probability of 1


@dataclass(frozen=True)
class Samples:
    """Times of a repeated operation.

    Attributes:
        rounds: Times in whole microseconds, by round. If there are too many times to store, each round holds the same
            share of its times.
        sentences: Number of sentences of each time in `rounds`.
        count: Number of times that were measured.
    """

    rounds: tuple[tuple[int, ...], ...]
    sentences: tuple[tuple[int, ...], ...]
    count: int

    @classmethod
    def of(cls, rounds: list[list[int]], sentences: list[list[int]]) -> Samples:
        """Returns the samples, reduced to `MAX_SAMPLES` by a random choice of the same share of every round.

        The seed depends only on the number of samples. Every n-th sample would be a biased choice: it would keep the
        same sentences in every repetition and lose the others.

        Args:
            rounds: Times in whole microseconds, by round.
            sentences: Number of sentences of each time, by round.
        """
        count = sum(map(len, rounds))
        most = min(count, MAX_SAMPLES)
        rng = random.Random(count)
        times: list[tuple[int, ...]] = []
        sizes: list[tuple[int, ...]] = []
        seen = 0
        for row, taken in zip(rounds, sentences, strict=True):
            quota = (seen + len(row)) * most // count - seen * most // count
            chosen = sorted(rng.sample(range(len(row)), quota))
            times.append(tuple(row[i] for i in chosen))
            sizes.append(tuple(taken[i] for i in chosen))
            seen += len(row)
        return cls(tuple(times), tuple(sizes), count)

    @classmethod
    def ones(cls, rounds: list[list[int]]) -> Samples:
        """Returns the samples of times that belong to one sentence each; see `of`."""
        return cls.of(rounds, [[1] * len(row) for row in rounds])

    def medians(self) -> list[float]:
        """Returns the median of each round, in microseconds."""
        return [_quantile(sorted(row), 0.5) for row in self.rounds]

    def spent_each(self) -> list[float]:
        """Returns the mean time per sentence of each round, in microseconds."""
        return [sum(us) / sum(count) for us, count in zip(self.rounds, self.sentences, strict=True)]

    def values(self) -> list[int]:
        """Returns all stored times in order, in microseconds."""
        return [value for row in self.rounds for value in row]

    def milliseconds(self) -> dict[str, float]:
        """Returns quantiles (linear between order statistics) and the mean, in milliseconds."""
        ordered = sorted(self.values())
        figures = {name: _quantile(ordered, q) / 1000 for name, q in QUANTILES.items()}
        figures["mean"] = sum(ordered) / len(ordered) / 1000
        return {name: round(value, 4) for name, value in figures.items()}

    def per_second(self) -> float:
        """Returns the number of sentences per second of measured time."""
        return round(sum(map(sum, self.sentences)) / sum(self.values()) * 1e6, 2)


def _quantile(ordered: list[int], q: float) -> float:
    at = (len(ordered) - 1) * q
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Accuracy:
    """The number of correct predictions on the data set, at one batch size.

    Attributes:
        correct: Number of correct predictions.
        count: Number of predictions.
        batch_size: Number of sentences in a batch.
    """

    correct: int
    count: int
    batch_size: int

    @property
    def value(self) -> float:
        """Share of correct predictions, 0 to 1."""
        return self.correct / self.count


@dataclass(frozen=True)
class Measurement:
    """One row: the measurement of a variant on a provider, or the reason why there is none.

    A row with the status ``reported`` has no samples. Its `latency_ms` and `throughput_per_s` are figures that somebody
    else published.

    Attributes:
        status: One of `STATUSES`.
        reason: Why there is no measurement.
        mend: An instruction that fixes this.
        latency: Times of the scenario ``single-stream``: batch 1, each sentence at its own length.
        with_tokenizing: The same times including tokenisation.
        batches: Times of the scenario ``offline``: batches of sentences, sorted by length.
        resident: Times at batch 1 on a GPU, without the copies to and from it.
        cold_start: Times from the start of a process to its first result.
        load: Times from the file to a session.
        by_length: Number of tokens → times at batch 1 with a sentence of this length.
        predictions: Predicted label of each sentence.
        probabilities: Probabilities of the labels for each sentence, as integers from 0 to `PROBABILITY`. The entry is
            None if the sentence was not run at batch 1.
        batch_changed: Number of these sentences whose predicted label differs in a batch.
    """

    model: str
    variant: str
    provider: str
    artifact_id: str | None
    status: str
    reason: str = ""
    mend: str = ""
    accuracy: Accuracy | None = None
    accuracy_batched: Accuracy | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    with_tokenizing_ms: Mapping[str, float] = field(default_factory=dict)
    resident_ms: Mapping[str, float] = field(default_factory=dict)
    cold_start_ms: Mapping[str, float] = field(default_factory=dict)
    load_ms: Mapping[str, float] = field(default_factory=dict)
    throughput_per_s: float | None = None
    memory_bytes: Mapping[str, Any] = field(default_factory=dict)
    size_bytes: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)
    latency: Samples | None = None
    with_tokenizing: Samples | None = None
    batches: Samples | None = None
    resident: Samples | None = None
    cold_start: Samples | None = None
    load: Samples | None = None
    by_length: Mapping[int, Samples] = field(default_factory=dict)
    predictions: tuple[int, ...] = ()
    probabilities: tuple[tuple[int, ...] | None, ...] = ()
    batch_changed: int | None = None

    @property
    def cell(self) -> str:
        """Name of the cell: ``variant@provider``."""
        return f"{self.variant}@{self.provider}"

    def to_json(self) -> dict[str, Any]:
        """Returns the row as a result file stores it, without empty fields."""
        row: dict[str, Any] = {"cell": self.cell}
        for name in ("model", "variant", "provider", "artifact_id", "status"):
            row[name] = getattr(self, name)
        for name in ("reason", "mend", *QUANTILES_OF, *FIGURES):
            if value := getattr(self, name):
                row[name] = value
        if self.batch_changed is not None:
            row["batch_changed"] = self.batch_changed
        for name in ("accuracy", "accuracy_batched"):
            if score := getattr(self, name):
                row[name] = {"value": round(score.value, 6), **vars(score)}
        row["samples"] = {name: _samples_json(s) for name in SAMPLES if (s := getattr(self, name))}
        if self.by_length:
            row["by_length"] = {str(tokens): _samples_json(s) for tokens, s in self.by_length.items()}
        for name in ("predictions", "probabilities"):
            if values := getattr(self, name):
                row[name] = list(values)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Measurement:
        """Reads and checks a row from the output of `to_json`.

        Raises:
            ValueError: A figure is impossible or does not follow from its samples.
            KeyError: A field is missing.
            TypeError: A field is unknown or has another type.
        """
        body = dict(row)
        cell, samples = body.pop("cell"), body.pop("samples", {})
        for name in ("accuracy", "accuracy_batched"):
            if score := body.get(name):
                body[name] = Accuracy(score["correct"], score["count"], score["batch_size"])
                if round(body[name].value, 6) != score["value"]:
                    raise ValueError(f"{cell}: {name} does not follow from its right answers")
        body |= {name: _samples(kept) for name, kept in samples.items()}
        body["by_length"] = {int(tokens): _samples(kept) for tokens, kept in body.get("by_length", {}).items()}
        body["predictions"] = tuple(body.get("predictions", ()))
        body["probabilities"] = tuple(p if p is None else tuple(p) for p in body.get("probabilities", ()))
        found = cls(**body)
        if found.status not in STATUSES:
            raise ValueError(f"status {found.status!r}")
        if found.cell != cell:
            raise ValueError(f"cell {cell!r} of variant {found.variant!r}")
        _check(found)
        return found


def _samples_json(samples: Samples) -> dict[str, Any]:
    return {"unit": "us", **vars(samples)}


def _samples(kept: Mapping[str, Any]) -> Samples:
    return Samples(_tuples(kept["rounds"]), _tuples(kept["sentences"]), kept["count"])


def _tuples(rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _check(row: Measurement) -> None:
    """Raises `ValueError` if a figure of the row is impossible or does not follow from its samples."""
    if row.status == "ok" and not (row.latency and row.batches and row.accuracy and row.artifact_id):
        raise ValueError(f"{row.cell} is said to be measured and lacks samples, accuracy or artifact")
    gpu = row.memory_bytes.get("gpu", {})
    quantiles = [getattr(row, name) for name in QUANTILES_OF]
    for figures in (*quantiles, row.memory_bytes, gpu, row.size_bytes, row.noise):
        for name, value in figures.items():
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{row.cell}: {name} is {value}")
    if not isinstance(row.model, str) or not isinstance(row.memory_bytes.get("peak", 0), int):
        raise ValueError(f"{row.cell}: a field has a value of another kind")
    for samples in (*(getattr(row, name) for name in SAMPLES), *row.by_length.values()):
        if samples and not all(isinstance(v, int) and v > 0 for v in samples.values()):
            raise ValueError(f"{row.cell} has a time that is not a positive whole number of microseconds")
        if samples and not all(map(len, samples.rounds)):
            raise ValueError(f"{row.cell} has a round without a time")
    for score in (row.accuracy, row.accuracy_batched):
        if score and not 0 <= score.correct <= score.count:
            raise ValueError(f"{row.cell} has {score.correct} right answers of {score.count}")
    for name, kept in QUANTILES_OF.items():
        samples = getattr(row, kept)
        if samples and samples.milliseconds() != dict(getattr(row, name)):
            raise ValueError(f"{row.cell}: {name} does not follow from its samples")
    if row.batches and row.batches.per_second() != row.throughput_per_s:
        raise ValueError(f"{row.cell}: throughput_per_s does not follow from its samples")
    if any(chances and not all(0 <= p <= PROBABILITY for p in chances) for chances in row.probabilities):
        raise ValueError(f"{row.cell} has a probability that is none")


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class ResultFile:
    """The result file of one benchmark run.

    Attributes:
        created: Time of the run.
        toolchain: Release of the toolchain.
        machine: Description of the machine; see `hardware.machine`.
        run: Settings of the run.
        data: Name, digest and number of rows of the data, and the label of each sentence as ``labels``.
        rows: The measurements.
    """

    created: str
    toolchain: str
    machine: Mapping[str, Any]
    run: Mapping[str, Any]
    data: Mapping[str, Any]
    rows: tuple[Measurement, ...]

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

        def refuse(constant: str) -> Any:
            raise ValueError(f"{constant} is no figure")

        try:
            body = json.loads(path.read_text(), parse_constant=refuse)
            schema = body.pop("schema")
            if schema not in READABLE:
                raise ValueError(f"it has schema {schema}, this release reads {SCHEMA}: another release wrote it")
            if labels := body.pop("labels", []):
                body["data"]["labels"] = labels
            found = cls(rows=tuple(Measurement.from_json(row) for row in body.pop("rows")), **body)
            found.check()
            return found
        except FileNotFoundError as error:
            raise ResultFileError(f"There is no result file {path}.", "`toolchain bench` writes one.") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            hint = "Delete or move it, and measure again with `toolchain bench`."
            raise ResultFileError(f"{path} is no result file: {what}.", hint) from error

    def check(self) -> None:
        """Checks the fields that a comparison needs.

        Raises:
            ValueError: A field has another type, or contradicts another field.
            KeyError: A field is missing.
        """
        for key, kind in (("id", str), ("cpu", str), ("cores", int), ("ram_gib", int), ("isa", list), ("gpu", list)):
            if not isinstance(self.machine[key], kind):
                raise ValueError(f"machine.{key} is {self.machine[key]!r}")
        if not all(isinstance(gpu, dict) and "name" in gpu for gpu in self.machine["gpu"]):
            raise ValueError("machine.gpu has an entry without a name")
        if not isinstance(self.run, dict) or not isinstance(self.created, str):
            raise ValueError("run or created is of another kind")
        if not (isinstance(self.data["name"], str) and self.data["sha256"] and self.data["rows"] > 0):
            raise ValueError("data has no name, rows or digest")
        labels = self.data.get("labels", [])
        if labels and (len(labels) != self.data["rows"] or not all(isinstance(v, int) and v >= 0 for v in labels)):
            raise ValueError("data.labels are not one label a row")
        if len({(row.model, row.cell) for row in self.rows}) < len(self.rows):
            raise ValueError("a cell stands there twice")
        for row in self.rows:
            for score in (row.accuracy, row.accuracy_batched):
                if score and row.status == "ok" and score.count != self.data["rows"]:
                    raise ValueError(f"{row.cell} has {score.count} answers to {self.data['rows']} sentences")
            for name in ("predictions", "probabilities"):
                count = len(getattr(row, name))
                if labels and count not in (0, self.data["rows"]):
                    raise ValueError(f"{row.cell} has {count} {name} for {self.data['rows']} sentences")
            pairs = [(a, len(c)) for a, c in zip(row.predictions, row.probabilities, strict=False) if c is not None]
            if not all(0 <= a < (1 << n if self.data.get("multi_label") else n) for a, n in pairs):
                raise ValueError(f"{row.cell} has an answer that none of its probabilities is of")
            if labels and row.predictions and row.accuracy:
                right = sum(mine == its for mine, its in zip(row.predictions, labels, strict=True))
                if right != row.accuracy.correct:
                    raise ValueError(f"{row.cell}: accuracy does not follow from its answers")
