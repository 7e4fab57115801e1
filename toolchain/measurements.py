"""What was measured: raw samples, the rows they make, and the result file rows are kept in.

Every percentile and rate is derived from the samples that stand beside it; a file whose figures do not follow from its
samples, or that lacks them, is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.errors import ResultFileError

SCHEMA = 1
MAX_SAMPLES = 2000
STATUSES = ("ok", "failed", "unavailable", "reported")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Samples:
    """Times of one thing done again and again: whole microseconds by round, and how many sentences each took in.

    `count` is how many were taken; where that was too many to keep, `rounds` holds an even choice of them.
    """

    rounds: tuple[tuple[int, ...], ...]
    sentences: tuple[tuple[int, ...], ...]
    count: int

    @classmethod
    def of(cls, rounds: list[list[int]], sentences: list[list[int]]) -> Samples:
        """All samples of a cell, thinned to `MAX_SAMPLES`: the same share of every round, drawn by a fixed seed.

        Drawn and not every n-th, which would keep the same sentences of every repetition and lose the others.
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

    def values(self) -> list[int]:
        """All kept times, in order, in microseconds."""
        return [value for row in self.rounds for value in row]

    def milliseconds(self) -> dict[str, float]:
        """Quantiles (linear between order statistics) and mean, in milliseconds."""
        ordered = sorted(self.values())
        figures = {name: _quantile(ordered, q) / 1000 for name, q in QUANTILES.items()}
        figures["mean"] = sum(ordered) / len(ordered) / 1000
        return {name: round(value, 4) for name, value in figures.items()}

    def per_second(self) -> float:
        """Sentences per second of the time spent on them."""
        return round(sum(map(sum, self.sentences)) / sum(self.values()) * 1e6, 2)


def _quantile(ordered: list[int], q: float) -> float:
    at = (len(ordered) - 1) * q
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Accuracy:
    """Right answers over the whole set, asked in batches of `batch_size`."""

    correct: int
    count: int
    batch_size: int

    @property
    def value(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count


@dataclass(frozen=True)
class Measurement:
    """One row: a variant on a provider, or why it could not be measured.

    `latency` is batch 1, one sentence at its own length; `resident` the same on a GPU without the copies to and from
    it; `batches` are of many sentences sorted by length. A row of status ``reported`` has no samples but the figures
    somebody else published, in `latency_ms` and `throughput_per_s`.
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
    resident_ms: Mapping[str, float] = field(default_factory=dict)
    throughput_per_s: float | None = None
    memory_bytes: Mapping[str, Any] = field(default_factory=dict)
    size_bytes: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    latency: Samples | None = None
    batches: Samples | None = None
    resident: Samples | None = None
    predictions: tuple[int, ...] = ()

    @property
    def cell(self) -> str:
        """``variant@provider``."""
        return f"{self.variant}@{self.provider}"

    def to_json(self) -> dict[str, Any]:
        """The row as a result file holds it; what it does not have is left out."""
        row: dict[str, Any] = {"cell": self.cell}
        for name in ("model", "variant", "provider", "artifact_id", "status"):
            row[name] = getattr(self, name)
        figures = ("latency_ms", "resident_ms", "throughput_per_s", "memory_bytes", "size_bytes")
        for name in ("reason", "mend", *figures, "facts"):
            if value := getattr(self, name):
                row[name] = value
        for name in ("accuracy", "accuracy_batched"):
            if score := getattr(self, name):
                row[name] = {"value": round(score.value, 6), **vars(score)}
        kept = ("latency", "resident", "batches")
        row["samples"] = {name: _samples_json(s) for name in kept if (s := getattr(self, name))}
        if self.predictions:
            row["predictions"] = list(self.predictions)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Measurement:
        """Reads `to_json`; `ValueError`, `KeyError` or `TypeError` says what does not fit."""
        body = dict(row)
        cell, samples = body.pop("cell"), body.pop("samples", {})
        for name in ("accuracy", "accuracy_batched"):
            if score := body.get(name):
                body[name] = Accuracy(score["correct"], score["count"], score["batch_size"])
                if round(body[name].value, 6) != score["value"]:
                    raise ValueError(f"{cell}: {name} does not follow from its right answers")
        for name, kept in samples.items():
            body[name] = Samples(_tuples(kept["rounds"]), _tuples(kept["sentences"]), kept["count"])
        body["predictions"] = tuple(body.get("predictions", ()))
        found = cls(**body)
        if found.status not in STATUSES:
            raise ValueError(f"status {found.status!r}")
        if found.cell != cell:
            raise ValueError(f"cell {cell!r} of variant {found.variant!r}")
        _check(found)
        return found


def _samples_json(samples: Samples) -> dict[str, Any]:
    return {"unit": "us", **vars(samples)}


def _tuples(rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _check(row: Measurement) -> None:
    """A time is a positive whole number, an accuracy a share, and every figure follows from the samples."""
    if row.status == "ok" and not (row.latency and row.batches and row.accuracy and row.artifact_id):
        raise ValueError(f"{row.cell} is said to be measured and lacks samples, accuracy or artifact")
    gpu = row.memory_bytes.get("gpu", {})
    for figures in (row.latency_ms, row.resident_ms, row.memory_bytes, gpu, row.size_bytes):
        for name, value in figures.items():
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{row.cell}: {name} is {value}")
    if not isinstance(row.model, str) or not isinstance(row.memory_bytes.get("peak", 0), int):
        raise ValueError(f"{row.cell}: a field has a value of another kind")
    for samples in (row.latency, row.resident, row.batches):
        if samples and not all(isinstance(v, int) and v > 0 for v in samples.values()):
            raise ValueError(f"{row.cell} has a time that is not a positive whole number of microseconds")
    for score in (row.accuracy, row.accuracy_batched):
        if score and not 0 <= score.correct <= score.count:
            raise ValueError(f"{row.cell} has {score.correct} right answers of {score.count}")
    for name, samples, figures in (
        ("latency_ms", row.latency, row.latency_ms),
        ("resident_ms", row.resident, row.resident_ms),
    ):
        if samples and samples.milliseconds() != dict(figures):
            raise ValueError(f"{row.cell}: {name} does not follow from its samples")
    if row.batches and row.batches.per_second() != row.throughput_per_s:
        raise ValueError(f"{row.cell}: throughput_per_s does not follow from its samples")


@dataclass(frozen=True)
class ResultFile:
    """One run: when, by which release, on which machine, how, on which data, and its rows."""

    created: str
    toolchain: str
    machine: Mapping[str, Any]
    run: Mapping[str, Any]
    data: Mapping[str, Any]
    rows: tuple[Measurement, ...]

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all, one row a line; `ResultFileError` where that cannot be done."""
        head = {name: getattr(self, name) for name in ("created", "toolchain", "machine", "run", "data")}
        text = json.dumps({"schema": SCHEMA, **head}, indent=1, allow_nan=False)[:-2]
        rows = ",\n".join("  " + json.dumps(r.to_json(), separators=(",", ":"), allow_nan=False) for r in self.rows)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(f'{text},\n "rows": [\n{rows}\n ]\n}}\n')
            scratch.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise ResultFileError(
                f"{path} cannot be written: {error.strerror or error}.", "Free the space or the permission."
            ) from error

    @classmethod
    def read(cls, path: Path) -> ResultFile:
        """Reads and checks a result file; `ResultFileError` says what is wrong with it."""

        def refuse(constant: str) -> Any:
            raise ValueError(f"{constant} is no figure")

        try:
            body = json.loads(path.read_text(), parse_constant=refuse)
            schema = body.pop("schema")
            if schema != SCHEMA:
                raise ValueError(f"it has schema {schema}, this release reads {SCHEMA}: another release wrote it")
            found = cls(rows=tuple(Measurement.from_json(row) for row in body.pop("rows")), **body)
            found.check()
            return found
        except FileNotFoundError as error:
            raise ResultFileError(f"There is no result file {path}.", "`toolchain bench` writes one.") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            mend = "Delete or move it, and measure again with `toolchain bench`."
            raise ResultFileError(f"{path} is no result file: {what}.", mend) from error

    def check(self) -> None:
        """`ValueError` or `KeyError` where what a comparison needs to know of the run is missing or of another kind."""
        for key, kind in (("id", str), ("cpu", str), ("cores", int), ("ram_gib", int), ("isa", list), ("gpu", list)):
            if not isinstance(self.machine[key], kind):
                raise ValueError(f"machine.{key} is {self.machine[key]!r}")
        if not all(isinstance(gpu, dict) and "name" in gpu for gpu in self.machine["gpu"]):
            raise ValueError("machine.gpu has an entry without a name")
        if not isinstance(self.run, dict) or not isinstance(self.created, str):
            raise ValueError("run or created is of another kind")
        if not (isinstance(self.data["name"], str) and self.data["sha256"] and self.data["rows"] > 0):
            raise ValueError("data has no name, rows or digest")
        keys = [(row.model, row.cell) for row in self.rows]
        if len(set(keys)) < len(keys):
            raise ValueError("a cell stands there twice")
        for row in self.rows:
            for score in (row.accuracy, row.accuracy_batched):
                if score and row.status == "ok" and score.count != self.data["rows"]:
                    raise ValueError(f"{row.cell} has {score.count} answers to {self.data['rows']} sentences")
