"""Defines the measurements of a benchmark: raw times, and the rows of a result file that summarise the times."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolchain.data.labels import Answer
from toolchain.results.facts import CellFacts, Memory, Size
from toolchain.results.scores import Score

MAX_SAMPLES = 2000
MAX_TIME_US = 10**12  # about 12 days; the limit for a stored time
STATUSES = ("ok", "failed", "unavailable", "reported")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
# `QUANTILES_OF` maps the name of a figure to the name of the samples from which the figure is computed. Each of these
# figures holds the quantiles and the mean of its samples, in milliseconds.
QUANTILES_OF = {
    "latency_ms": "latency",
    "with_tokenizing_ms": "with_tokenizing",
    "resident_ms": "resident",
    "cold_start_ms": "cold_start",
    "load_ms": "load",
    "server_ms": "server",
}
SAMPLES = (*QUANTILES_OF.values(), "batches", "mixed_batches")
BATCHED = "_batched"  # ending of the key of a score in batches
FIGURES = ("throughput_per_s", "memory_bytes", "size_bytes", "facts", "noise")
PROBABILITY = 10_000  # a result file stores a probability of 1 as this integer


@dataclass(frozen=True)
class Samples:
    """Times of a repeated operation.

    Attributes:
        rounds: Times in whole microseconds, by round. If the measured times are more than `MAX_SAMPLES`, each round
            keeps the same share of its times.
        sentences: For every measured time in `rounds`, the number of sentences that the measured operation processed;
            also 1 for an operation without a sentence, such as loading a model.
        count: Number of measured times, stored or not.
    """

    rounds: tuple[tuple[int, ...], ...]
    sentences: tuple[tuple[int, ...], ...]
    count: int

    @classmethod
    def from_rounds(cls, rounds: list[list[int]], sentences: list[list[int]]) -> Samples:
        """Returns the samples of the rounds, at most `MAX_SAMPLES` in all.

        If there are more than `MAX_SAMPLES` measured times, a random choice keeps the same share of every round's
        times. The random seed depends only on the number of measured times. The choice is random because every
        repetition of a benchmark measures the sentences in the same order. A choice of every n-th measured time could
        select the same few sentences in every repetition.

        Args:
            rounds: Times in whole microseconds, by round.
            sentences: For every measured time in `rounds`, the number of sentences that the measured operation
                processed.
        """
        count = sum(map(len, rounds))
        limit = min(count, MAX_SAMPLES)
        rng = random.Random(count)
        times: list[tuple[int, ...]] = []
        sizes: list[tuple[int, ...]] = []
        offset = 0
        for row, counts in zip(rounds, sentences, strict=True):
            quota = (offset + len(row)) * limit // count - offset * limit // count
            chosen = sorted(rng.sample(range(len(row)), quota))
            times.append(tuple(row[i] for i in chosen))
            sizes.append(tuple(counts[i] for i in chosen))
            offset += len(row)
        return cls(tuple(times), tuple(sizes), count)

    @classmethod
    def from_single(cls, rounds: list[list[int]]) -> Samples:
        """Returns the samples of `rounds`, with 1 sentence for every measured time; see `from_rounds`."""
        return cls.from_rounds(rounds, [[1] * len(row) for row in rounds])

    def medians(self) -> list[float]:
        """Returns the median time of each round, in microseconds."""
        return [_quantile(sorted(row), 0.5) for row in self.rounds]

    def means(self) -> list[float]:
        """Returns the mean time of each round, in microseconds."""
        return [sum(row) / len(row) for row in self.rounds]

    def sentence_times(self) -> list[float]:
        """Returns the mean time per sentence of each round, in microseconds."""
        return [sum(us) / sum(count) for us, count in zip(self.rounds, self.sentences, strict=True)]

    def values(self) -> list[int]:
        """Returns all stored times in order, in microseconds."""
        return [value for row in self.rounds for value in row]

    def milliseconds(self) -> dict[str, float]:
        """Returns the quantiles and the mean of the times, in milliseconds; interpolates quantiles linearly."""
        ordered = sorted(self.values())
        figures = {name: _quantile(ordered, q) / 1000 for name, q in QUANTILES.items()}
        figures["mean"] = sum(ordered) / len(ordered) / 1000
        return {name: round(value, 4) for name, value in figures.items()}

    def per_second(self) -> float:
        """Returns the number of sentences per second of measured time."""
        return round(sum(map(sum, self.sentences)) / sum(self.values()) * 1e6, 2)


def _quantile(ordered: list[int], q: float) -> float:
    position = (len(ordered) - 1) * q
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Measurement:
    """One row of a result file: the measurement of a variant on a provider, or the reason why there is none.

    A row with the status ``reported`` has no samples. In a ``reported`` row, `latency_ms` and `throughput_per_s` are
    figures that somebody else published.

    Attributes:
        status: Status of the measurement, one of `STATUSES`.
        reason: Why there is no measurement; empty for a measured row.
        mend: Hint that tells the user how to get a measurement; may be empty.
        latency: Times of the scenario ``single-stream``: batch 1, each sentence at its own length.
        with_tokenizing: Times of the scenario ``single-stream`` with tokenisation included.
        batches: Times of the scenario ``offline``: the sentences are sorted by length and run in batches.
        mixed_batches: Times of batches of random sentences with tokenisation included, as a server receives them; the
            benchmark measures them only with `--service-times`.
        resident: Times at batch 1 on a GPU, without the copies to and from the GPU.
        cold_start: Times from the start of a process to its first result.
        load: Times to load a session from its files.
        server: Latencies of the scenario ``server``: queries arrive at random, and waiting counts.
        by_length: Number of tokens → times at batch 1 with a sentence of this length.
        after_pause: Microseconds of a pause → times at batch 1 after such a pause, with tokenisation included, from the
            planned end of the pause. All pauses have the same sentences in the same order. The benchmark measures them
            only with `--service-times`.
        predictions: Answer to each sentence, as in `toolchain.data.labels`.
        probabilities: Probabilities of the labels for each sentence, as integers from 0 to `PROBABILITY`; None for a
            sentence that was not run at batch 1. Empty for regression and token classification.
        exits: Number of exits that each sentence passes at batch 1: 0 for the first exit, and the number of exits for a
            sentence that uses none; None for a sentence that was not run at batch 1. Empty for a variant without exits.
        batch_changed: Number of sentences whose predicted label in a larger batch differs from the label at batch 1;
            None for regression, whose scores may differ by rounding.
    """

    model: str
    variant: str
    provider: str
    artifact_id: str | None
    status: str
    reason: str = ""
    mend: str = ""
    score: Score | None = None
    score_batched: Score | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    with_tokenizing_ms: Mapping[str, float] = field(default_factory=dict)
    resident_ms: Mapping[str, float] = field(default_factory=dict)
    cold_start_ms: Mapping[str, float] = field(default_factory=dict)
    load_ms: Mapping[str, float] = field(default_factory=dict)
    server_ms: Mapping[str, float] = field(default_factory=dict)
    throughput_per_s: float | None = None
    memory_bytes: Memory = field(default_factory=lambda: Memory())
    size_bytes: Size = field(default_factory=lambda: Size())
    facts: CellFacts = field(default_factory=lambda: CellFacts())
    noise: Mapping[str, float] = field(default_factory=dict)
    latency: Samples | None = None
    with_tokenizing: Samples | None = None
    batches: Samples | None = None
    mixed_batches: Samples | None = None
    resident: Samples | None = None
    cold_start: Samples | None = None
    load: Samples | None = None
    server: Samples | None = None
    by_length: Mapping[int, Samples] = field(default_factory=dict)
    after_pause: Mapping[int, Samples] = field(default_factory=dict)
    predictions: tuple[Answer, ...] = ()
    probabilities: tuple[tuple[int, ...] | None, ...] = ()
    exits: tuple[int | None, ...] = ()
    batch_changed: int | None = None

    @property
    def cell(self) -> str:
        """Name of the cell, in the form ``variant@provider``."""
        return f"{self.variant}@{self.provider}"

    @property
    def exit_shares(self) -> tuple[float, ...]:
        """Returns the share of the sentences that uses each exit, and last the share that uses none; may be empty."""
        passed = [number for number in self.exits if number is not None]
        numbers = range(len(self.facts["exits"]["layers"]) + 1) if passed else ()
        return tuple(round(passed.count(number) / len(passed), 4) for number in numbers)

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
        for score, ending in ((self.score, ""), (self.score_batched, BATCHED)):
            if score:
                row[score.key + ending] = score.to_json()
        row["samples"] = {name: _samples_json(s) for name in SAMPLES if (s := getattr(self, name))}
        for name in ("by_length", "after_pause"):
            if tables := getattr(self, name):
                row[name] = {str(key): _samples_json(samples) for key, samples in tables.items()}
        for name in ("predictions", "probabilities", "exits"):
            if values := getattr(self, name):
                row[name] = list(values)
        return row

    def check(self) -> None:
        """Requires that each figure has a possible value and follows from its samples.

        Raises:
            ValueError: A figure is missing, has an impossible value, or does not follow from its samples. The error
                message names the cell.
        """
        if self.status == "ok" and not (self.latency and self.batches and self.score and self.artifact_id):
            raise ValueError(f"{self.cell} has the status ok, but lacks samples, score or artifact")
        for name, source in QUANTILES_OF.items():
            samples = getattr(self, source)
            if samples and samples.milliseconds() != dict(getattr(self, name)):
                raise ValueError(f"{self.cell}: {name} does not follow from its samples")
        if self.batches and self.batches.per_second() != self.throughput_per_s:
            raise ValueError(f"{self.cell}: throughput_per_s does not follow from its samples")
        served = self.facts.get("server", {"qps": 0.0, "mean_batch": 0.0})
        if served["qps"] and not self.server:
            raise ValueError(f"{self.cell} has a rate of the scenario server, but lacks its samples")
        if served["qps"] and self.server_ms["p99"] > served.get("p99_limit_ms", math.inf):
            raise ValueError(f"{self.cell}: the rate of the scenario server exceeds the limit of its p99")
        if any(chances and not all(0 <= p <= PROBABILITY for p in chances) for chances in self.probabilities):
            raise ValueError(f"{self.cell} has a probability outside the range from 0 to {PROBABILITY}")
        count = len(self.facts["exits"]["layers"]) if "exits" in self.facts else -1
        if not all(number is None or number <= count for number in self.exits):
            raise ValueError(f"{self.cell} has a sentence with an unknown exit")


def _samples_json(samples: Samples) -> dict[str, Any]:
    return {"unit": "us", **vars(samples)}
