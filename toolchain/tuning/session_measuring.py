"""Measures settings of ONNX Runtime for `tune --session`: one process for each session, in interleaved rounds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolchain.artifacts.store import Artifact
from toolchain.backends import BACKENDS, Place
from toolchain.bench.process import Worker
from toolchain.bench.runner import LOAD_TIMEOUT_S, SETTLE_S, TURN_TIMEOUT_S
from toolchain.bench.scenarios import LENGTHS, offline_batches
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import ToolchainError
from toolchain.progress import Say
from toolchain.results.session_file import LATENCY, MEMORY, THROUGHPUT
from toolchain.results.session_settings import FIXED, AppSettings, SessionSettings

BATCH_SIZE = 32  # default size of a batch, as in `bench`
MOST_SINGLES, MOST_BATCHED = 64, 256  # largest number of sentences in a turn at batch 1, and in a turn in batches
FEWEST_SINGLES = 4
MOST_WEIGHED = 128  # largest number of sentences that a process runs before it is weighed


@dataclass
class Figures:
    """The figures of an app with certain settings: for each objective, one number for each round; smaller is better.

    The figures of the objectives ``latency`` and ``throughput`` are microseconds for each sentence. The figures of the
    objective ``memory`` are bytes, one for each process.
    """

    values: dict[str, list[float]] = field(default_factory=lambda: {LATENCY: [], THROUGHPUT: [], MEMORY: []})


# Settings → objectives whose figures a measurement needs.
Needs = Mapping[AppSettings, Collection[str]]
# The settings that a process has: its threads, and the settings of its session. The other settings can change.
Process = tuple[int, SessionSettings]


class Meter:
    """Measures settings of one artifact on one set of sentences.

    Args:
        artifact: The artifact.
        encoder: The `Encoder` of the artifact.
        data: The sentences.
        say: Called with the reason if settings cannot be measured.
        make_worker: Function that makes the process of a session; tests replace it.
    """

    def __init__(
        self,
        artifact: Artifact,
        encoder: Encoder,
        data: Data,
        say: Say,
        make_worker: Callable[..., Worker] = Worker,
    ) -> None:
        self._artifact, self._encoder, self._data, self._say = artifact, encoder, data, say
        self._make_worker = make_worker
        self._token_counts = [len(ids) for ids in encoder.encode(data.texts)]
        self._lengths = [n for n in LENGTHS if n <= encoder.max_length]
        self._sentence_s = 0.0  # seconds for a sentence at batch 1 with the slowest settings; 0 if unknown

    def measure(
        self, needs: Needs, sentences: Sequence[int], rounds: int, turn_s: float, rng: random.Random
    ) -> dict[AppSettings, Figures]:
        """Measures settings in new processes; within a round, all settings run the same sentences in random order.

        Args:
            needs: The settings, and the objectives whose figures are needed for each.
            sentences: Indices of the sentences, in random order.
            rounds: Number of rounds.
            turn_s: Minimum seconds of a turn.
            rng: Source of the random order.

        Returns:
            The figures of each settings; settings that cannot be measured are missing.
        """
        workers: dict[Process, Worker] = {}
        figures = {settings: Figures() for settings in needs}

        def shuffle(objective: str) -> list[AppSettings]:
            chosen = [settings for settings in figures if objective in needs[settings]]
            return rng.sample(chosen, len(chosen))

        try:
            for settings in rng.sample(list(needs), len(needs)):
                self._attempt(figures, settings, self._start, workers)
            # Each process is weighed before its first turn, so that all processes have done the same work.
            for settings in shuffle(MEMORY):
                self._attempt(figures, settings, self._weigh, workers, figures[settings], sentences)
            for turn in range(rounds):
                for objective in (LATENCY, THROUGHPUT):
                    chosen = self._choose(objective, sentences, turn, turn_s)
                    for settings in shuffle(objective):
                        arguments = (workers, figures[settings], objective, chosen, turn_s)
                        self._attempt(figures, settings, self._time, *arguments)
        finally:
            for worker in workers.values():
                worker.close()
        return figures

    def _attempt(
        self, figures: dict[AppSettings, Figures], settings: AppSettings, action: Callable[..., None], *arguments: Any
    ) -> None:
        """Calls `action` for the settings, and removes the settings from `figures` if that fails."""
        try:
            action(settings, *arguments)
        except ToolchainError as error:
            summary = settings.summary(AppSettings(settings.threads))
            self._say(f"the settings {summary} cannot be measured: {error.cause}")
            figures.pop(settings)

    def _start(self, settings: AppSettings, workers: dict[Process, Worker]) -> None:
        """Adds a new process to `workers` unless it has one that suits; the process has loaded a session."""
        key = settings.threads, settings.session
        if key in workers:
            return
        place = Place("cpu", settings.threads, settings=settings.session)
        backend = BACKENDS["onnx"]
        text = self._data.texts[0]
        worker = self._make_worker(backend.session, self._artifact.path, place, self._encoder, text, backend.imports)
        workers[key] = worker  # `measure` closes it, even if it cannot load the session
        worker.load(LOAD_TIMEOUT_S)
        worker.ask({"do": "data", "texts": self._data.texts, "lengths": self._lengths}, LOAD_TIMEOUT_S)

    def _choose(self, objective: str, sentences: Sequence[int], turn: int, turn_s: float) -> list[int]:
        """Returns the sentences of a turn; each round has other ones, if there are enough.

        A turn has few sentences if the model is slow, and in the first turn, when its speed is unknown.
        """
        affordable = int(turn_s / self._sentence_s) if self._sentence_s else 0
        fewest, most = (FEWEST_SINGLES, MOST_SINGLES) if objective == LATENCY else (BATCH_SIZE, MOST_BATCHED)
        count = min(most, max(fewest, affordable))
        return [sentences[(turn * count + place) % len(sentences)] for place in range(min(count, len(sentences)))]

    def _time(
        self,
        settings: AppSettings,
        workers: Mapping[Process, Worker],
        figures: Figures,
        objective: str,
        sentences: Sequence[int],
        turn_s: float,
    ) -> None:
        """Runs one turn, and adds the microseconds for each sentence to the figures."""
        batches = [[i] for i in sentences] if objective == LATENCY else self.batches(settings, sentences)
        fixed = objective == THROUGHPUT and settings.padding == FIXED
        # All batches run once before the timing, because ONNX Runtime plans its memory at the first batch of a shape.
        message = {"do": "run", "batches": batches, "warmup": len(batches), "repeats": 0, "min_s": turn_s}
        reply = workers[settings.threads, settings.session].ask(
            {**message, "fixed": fixed}, TURN_TIMEOUT_S + 20 * turn_s
        )
        time.sleep(SETTLE_S)
        repeats = reply["us"]
        figures.values[objective].append(sum(map(sum, repeats)) / (len(repeats) * sum(map(len, batches))))

    def _weigh(
        self,
        settings: AppSettings,
        workers: Mapping[Process, Worker],
        figures: Figures,
        sentences: Sequence[int],
    ) -> None:
        """Runs batches of varied sizes and lengths, and adds the memory of the process to the figures."""
        batches = self.batches(settings, sentences[:MOST_WEIGHED])
        batches += [[len(self._data.texts) + place] for place in range(len(self._lengths))]
        # Every process has the same order, so that equal settings keep equal memory.
        random.Random(0).shuffle(batches)
        worker = workers[settings.threads, settings.session]
        worker.ask({"do": "run", "batches": batches, "warmup": 0}, LOAD_TIMEOUT_S)
        figures.values[MEMORY].append(worker.ask({"do": "memory"}, TURN_TIMEOUT_S)["bytes"])

    def batches(self, settings: AppSettings, sentences: Sequence[int]) -> list[list[int]]:
        """Returns batches of the sentences, sorted by length; a batch has at most the size that the settings state.

        The number of tokens in a batch has a limit, as in `bench`.
        """
        size = settings.batch_size or BATCH_SIZE
        counts = [self._token_counts[i] for i in sentences]
        return [[sentences[place] for place in batch] for batch in offline_batches(counts, size)]


def bytes_needed(artifact: Artifact) -> int:
    """Returns an estimate of the memory that a process with the artifact needs."""
    return 2 * artifact.manifest.size_bytes + (256 << 20)
