"""Bench: every cell in processes of its own, asked the same sentences in the same rounds, in random order."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from toolchain.backends import BACKENDS, Backend
from toolchain.bench import scenarios
from toolchain.bench.cells import Cell, Running, measurement, unmeasured
from toolchain.bench.journal import Journal
from toolchain.bench.process import Worker
from toolchain.bench.scenarios import LENGTHS, OFFLINE, SINGLE, Protocol, Turn
from toolchain.data.inputs import Data, Encoder
from toolchain.errors import ToolchainError
from toolchain.results.measurements import Measurement

# ONNX Runtime's and OpenMP's threads spin up to some 20 ms after their last job; the next cell waits that out.
SETTLE_S = 0.05
LOAD_TIMEOUT_S = 300.0
TURN_TIMEOUT_S = 120.0
CALIBRATION = 12  # sentences every new process answers first: warm-up, and what the rounds are sized by
EXACTNESS_ROUNDS = 20
SPARE_TIME = 1.1
SPARE_SHARE = 0.1  # of the machine's memory is left alone


Progress = Callable[[int, int, str], None]


def bench(
    cells: Sequence[Cell],
    data: Data,
    encoder: Encoder,
    protocol: Protocol,
    progress: Progress,
    backends: Mapping[str, Backend] = BACKENDS,
    journal: Journal | None = None,
) -> tuple[list[Measurement], dict[str, Any]]:
    """Measures the cells that have an artifact; a row for every cell, in the order given, and how it was done.

    All are asked the same texts in the same batches, each by its own tokens; `encoder` makes those of the cells that
    have none of their own, and its lengths make the batches.

    A cell that cannot be loaded, crashes, hangs or is killed becomes a row that says so; the others go on. `backends`
    maps a runtime to what serves it. Each turn goes to the `journal` when it is over, and what that holds of an
    interrupted run is not done again.
    """
    run = _Bench(cells, data, encoder, protocol, progress, backends, journal)
    try:
        run.measure()
    finally:
        for item in run.running.values():
            if item.worker:
                item.worker.close()
    rows = [run.row(index) for index in range(len(cells))]
    return rows, {**asdict(protocol), "rounds": protocol.rounds, **run.how()}


class _Bench:
    """One run."""

    def __init__(
        self,
        cells: Sequence[Cell],
        data: Data,
        encoder: Encoder,
        protocol: Protocol,
        progress: Progress,
        backends: Mapping[str, Backend],
        journal: Journal | None,
    ) -> None:
        self._cells, self._data, self._encoder, self._protocol = cells, data, encoder, protocol
        self._progress, self._backends, self._journal = progress, backends, journal
        self._started = time.monotonic()
        self._ids = encoder.encode(data.texts)
        self._order = random.Random(protocol.seed).sample(range(len(self._ids)), len(self._ids))
        self._lengths = [n for n in LENGTHS if protocol.by_length and n <= encoder.max_length]
        self._singles: list[int] = []
        self.running = {i: Running(cell, cell.artifact) for i, cell in enumerate(cells) if cell.artifact}
        for record in journal.records if journal else ():
            self.running[record["cell"]].take(record)

    def measure(self) -> None:
        """All rounds of all cells."""
        for count, (index, item) in enumerate(self.running.items()):
            self._progress(count, len(self.running), f"loading {item.cell.name}")
            if not item.starts and not item.failure:
                self._guarded(index, self._start)
        slowest = max((item.sentence_s for item in self.running.values()), default=0.0)
        self._singles = scenarios.choose(len(self._ids), slowest, self._protocol)
        batches = scenarios.offline_batches(list(map(len, self._ids)), self._protocol.batch_size)
        done, total = 0, self._protocol.rounds * (2 + len(self._lengths)) * len(self.running)
        for turn in range(self._protocol.rounds):
            # By the turn: an interrupted run goes on in the order it would have had.
            rng = random.Random(f"{self._protocol.seed} {turn}")
            if self._protocol.starts_anew(turn):
                for index in self._shuffled(rng):
                    if not any(turn in told for told in self.running[index].turns.values()):
                        self._guarded(index, self._start)
            for work in scenarios.turns(turn, self._singles, batches, self._lengths, self._protocol):
                for index in self._shuffled(rng):
                    item = self.running[index]
                    if item.failure is None and turn not in item.turns.get(work.kind, {}):
                        which = f"round {turn + 1} of {self._protocol.rounds}"
                        self._progress(done, total, f"{item.cell.name}, {work.kind}, {which}")
                        self._guarded(index, self._turn, turn, work)
                    done += 1
        for index in self.running:
            self._guarded(index, self._stop)
            self._guarded(index, self._time_exactness)

    def _shuffled(self, rng: random.Random) -> Iterator[int]:
        return iter(rng.sample(sorted(self.running), len(self.running)))

    def _guarded(self, index: int, action: Callable[..., None], *about: Any) -> None:
        """Whatever a cell fails with is its own failure."""
        item = self.running[index]
        if item.failure is not None:
            return
        try:
            action(index, item, *about)
        except ToolchainError as error:
            if item.worker:
                item.worker.close()
                item.worker = None
            reply = {"type": type(error).__name__, "cause": error.cause, "mend": error.mend}
            self._keep(index, "failure", reply)

    def _keep(self, index: int, kind: str, reply: Mapping[str, Any], turn: int | None = None) -> None:
        record = {"cell": index, "kind": kind, "turn": turn, "reply": dict(reply)}
        self.running[index].take(record)
        if self._journal:
            self._journal.append(record)

    def _start(self, index: int, item: Running) -> None:
        """A fresh process, in place of the one that is up."""
        self._stop(index, item)
        self._make_room(item)
        item.worker = self._open(item)
        ready = item.worker.load(LOAD_TIMEOUT_S)
        item.worker.ask({"do": "data", "texts": self._data.texts, "lengths": self._lengths}, LOAD_TIMEOUT_S)
        chosen = [[i] for i in self._order[:CALIBRATION]]
        message = {"do": "run", "batches": chosen, "warmup": len(chosen)}
        reply = item.worker.ask(message, LOAD_TIMEOUT_S)
        time.sleep(SETTLE_S)
        self._keep(index, "start", {**ready, "sentence_s": statistics.mean(reply["us"][0]) / 1e6})

    def _open(self, item: Running) -> Worker:
        """A fresh process for a cell."""
        backend = self._backends[item.cell.runtime]
        place = self._protocol.place(item.cell.provider)
        text = self._data.texts[self._order[0]]
        encoder = item.cell.encoder or self._encoder
        return Worker(backend.session, item.artifact.path, place, encoder, text, backend.imports)

    def _stop(self, index: int, item: Running) -> None:
        """Asks for the peaks of the process that is up, and ends it."""
        if item.worker:
            peak = item.worker.ask({"do": "peak"}, TURN_TIMEOUT_S)
            item.worker.close()
            item.worker = None
            self._keep(index, "peak", peak)

    def _time_exactness(self, index: int, item: Running) -> None:
        """Where the processor needs an option for exact 8-bit products, times them against saturating ones, in a
        process of its own: a second session would count as memory of the cell."""
        if item.exactness or not item.needs_option:
            return
        worker = self._open(item)
        try:
            worker.load(LOAD_TIMEOUT_S)
            worker.ask({"do": "data", "texts": self._data.texts, "lengths": []}, LOAD_TIMEOUT_S)
            chosen = [[i] for i in self._order[:CALIBRATION]]
            message = {"do": "exactness", "batches": chosen, "rounds": EXACTNESS_ROUNDS}
            self._keep(index, "exactness", worker.ask(message, TURN_TIMEOUT_S))
        finally:
            worker.close()

    def _make_room(self, item: Running) -> None:
        """Ends other processes, which start again at their next turn, until this one's model fits in memory."""
        import psutil

        memory = psutil.virtual_memory
        known = [start["memory"]["load"] for start in item.starts]
        needed = 2 * (max(known) if known else item.artifact.manifest.size_bytes)
        for index in self.running:
            if memory().available - needed >= SPARE_SHARE * memory().total:
                return
            self._guarded(index, self._stop)

    def _turn(self, index: int, item: Running, turn: int, work: Turn) -> None:
        if item.worker is None:
            self._start(index, item)
        assert item.worker is not None
        single = work.kind == SINGLE
        earlier = item.turns.get(work.kind, {})
        message = {
            "do": "run",
            "batches": work.batches,
            "warmup": 2,
            # Every sentence equally often: as often as the first round had time for, and that with some to spare.
            "repeats": len(earlier[min(earlier)]["us"]) if earlier else 0,
            "min_s": work.min_s * SPARE_TIME,
            "tokenizing": single,
            "resident": single and item.cell.provider != "cpu",
        }
        expected_s = item.sentence_s * sum(map(len, work.batches))
        with item.noise.watch([item.worker.pid]):
            reply = item.worker.ask(message, TURN_TIMEOUT_S + 10 * (expected_s + work.min_s))
        time.sleep(SETTLE_S)
        if single:
            reply["answered"] = [i for batch in work.batches for i in batch]
        elif work.kind == OFFLINE:
            reply |= {"answered": [i for batch in work.batches for i in batch], "probabilities": []}
            reply["sizes"] = [len(batch) for batch in work.batches]
        self._keep(index, work.kind, reply, turn)

    def how(self) -> dict[str, Any]:
        """What a reader must know of the run beside its protocol."""
        return {
            "single_sentences": len(self._singles),
            "seconds": round(time.monotonic() - self._started, 1),
            "taken_up": bool(self._journal and self._journal.records),
        }

    def row(self, index: int) -> Measurement:
        """The cell's row, of all it told."""
        item = self.running.get(index)
        return measurement(item, self._data, self._protocol) if item else unmeasured(self._cells[index])
