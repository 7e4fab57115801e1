"""The benchmark loop: all cells answer the same sentences in interleaved rounds, in random order within a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from toolchain.backends import BACKENDS, Backend
from toolchain.bench import scenarios, server
from toolchain.bench.cells import Cell, Running, make_row, make_row_without_figures
from toolchain.bench.journal import Journal, invalid_journal
from toolchain.bench.journal_records import TurnReply, fits_plan
from toolchain.bench.process import Worker
from toolchain.bench.scenarios import LENGTHS, MIXED, OFFLINE, PAUSED, SERVER, SINGLE, Protocol, Turn
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import ToolchainError
from toolchain.results.measurements import Measurement

# Pause in seconds between the turns of two cells, because the threads of ONNX Runtime and OpenMP spin for about 20 ms
# after a job.
SETTLE_S = 0.05
LOAD_TIMEOUT_S = 300.0
TURN_TIMEOUT_S = 120.0
# Number of warm-up sentences of a new process. If the warm-up shows that a cell is slow, all cells answer fewer
# sentences at batch 1.
WARM_UP_SENTENCES = 12
EXACTNESS_ROUNDS = 20
TYPICAL_SERVER_TURNS = 14  # typical number of turns of a cell in the scenario server, for the progress bar
SPARE_TIME = 1.1  # factor that makes a cell's first round longer than the required time of a round; see `_run_turn`
SPARE_SHARE = 0.1  # share of the machine's memory that must stay free


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
    """Measures the cells that have an artifact.

    All cells answer the same texts in the same batches, and each cell uses its own tokenizer. If a cell cannot be
    loaded, crashes, hangs or is killed, its row states the failure, and the benchmark continues with the next cell.

    Args:
        cells: The cells.
        data: The sentences and their labels.
        encoder: The shared `Encoder`, for every cell without its own `Encoder`. The token counts of the shared
            `Encoder` determine the batches of all cells.
        protocol: The settings of the measurement.
        progress: Callback with the number of loaded cells, the number of all cells, and a text. After all cells are
            loaded, the callback receives the numbers of finished turns and of all turns.
        backends: Maps each runtime tag, such as ``onnx``, to its `Backend`.
        journal: Journal that receives each result. The benchmark does not repeat turns that are already in the journal.

    Returns:
        One row for each cell in the order of `cells`, and the facts of the run.
    """
    run = _Bench(cells, data, encoder, protocol, progress, backends, journal)
    try:
        run.measure()
    finally:
        for item in run.running.values():
            if item.worker:
                item.worker.close()
    rows = [run.row(index) for index in range(len(cells))]
    return rows, {**asdict(protocol), "rounds": protocol.rounds, **run.facts()}


class _Bench:
    """One benchmark run."""

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
        self._token_counts = list(map(len, self._ids))
        self._order = random.Random(protocol.seed).sample(range(len(self._ids)), len(self._ids))
        self._lengths = [n for n in LENGTHS if protocol.by_length and n <= encoder.max_length]
        self._singles: list[int] = []
        self.running = {i: Running(cell, cell.artifact) for i, cell in enumerate(cells) if cell.artifact}
        for record in journal.records if journal else ():
            if journal and record["cell"] not in self.running:
                raise invalid_journal(journal.path, "a record belongs to a cell without an artifact")
            self.running[record["cell"]].add_record(record)

    def measure(self) -> None:
        """Measures all rounds of all cells."""
        for count, (index, item) in enumerate(self.running.items()):
            self._progress(count, len(self.running), f"loading {item.cell.name}")
            if not item.starts and not item.failure:
                self._run_action(index, self._start_process)
        slowest = max((item.sentence_s for item in self.running.values()), default=0.0)
        self._singles = scenarios.choose_sentences(len(self._ids), slowest, self._protocol)
        batches = scenarios.offline_batches(self._token_counts, self._protocol.batch_size)
        self._check_records(batches)
        kinds = 2 + len(self._lengths) + 2 * self._protocol.service_times
        done, total = 0, self._protocol.rounds * kinds * len(self.running)
        for turn in range(self._protocol.rounds):
            # The seed contains the number of the round, so a resumed run measures the cells in the same order as the
            # interrupted run.
            rng = random.Random(f"{self._protocol.seed} {turn}")
            if self._protocol.needs_fresh_process(turn):
                for index in self._shuffle(rng):
                    if not any(turn in replies for replies in self.running[index].turns.values()):
                        self._run_action(index, self._start_process)
            for work in self._plan_turns(turn, batches):
                for index in self._shuffle(rng):
                    item = self.running[index]
                    if item.failure is None and turn not in item.turns.get(work.kind, {}):
                        round_text = f"round {turn + 1} of {self._protocol.rounds}"
                        self._progress(done, total, f"{item.cell.name}, {work.kind}, {round_text}")
                        self._run_action(index, self._run_turn, turn, work)
                    done += 1
        self._measure_server()
        for index in self.running:
            self._run_action(index, self._stop_process)
            self._run_action(index, self._require_peak, batches)
            self._run_action(index, self._time_exactness)
            self._run_action(index, self._find_exits)

    def _plan_turns(self, turn: int, batches: Sequence[list[int]]) -> list[Turn]:
        return scenarios.turns(turn, self._singles, batches, self._lengths, self._token_counts, self._protocol)

    def _measure_server(self) -> None:
        """Measures all turns of the scenario ``server``, in which the cells also alternate."""
        total = TYPICAL_SERVER_TURNS * len(self.running)
        while rates := self._server_rates():
            turn = min(len(self.running[index].server) for index in rates)
            for index in self._shuffle(random.Random(f"{self._protocol.seed} {SERVER} {turn}")):
                item = self.running[index]
                if index in rates and len(item.server) == turn:
                    qps, is_search = rates[index]
                    done = min(total, sum(len(item.server) for item in self.running.values()))
                    self._progress(done, total, f"{item.cell.name}, {SERVER}, {qps:.4g} queries/s")
                    self._run_action(index, self._run_server_turn, qps, is_search)

    def _server_rates(self) -> dict[int, tuple[float, bool]]:
        """Returns the rate of the next turn of each cell whose scenario ``server`` has not ended."""
        rates = {
            index: server.next_rate(item.server, self._protocol, item.single_qps)
            for index, item in self.running.items()
            if item.failure is None
        }
        return {index: rate for index, rate in rates.items() if rate}

    def _run_server_turn(self, index: int, item: Running, qps: float, is_search: bool) -> None:
        worker = self._ensure_worker(index, item)
        work = server.plan(len(item.server), qps, is_search, self._singles, self._protocol)
        count = len(work.sentences)
        timeout_s = TURN_TIMEOUT_S + work.arrivals_us[-1] / 1e6 + 10 * item.sentence_s * count
        with item.noise.watch([worker.pid]):
            reply = worker.ask(work.message(self._protocol.batch_size), timeout_s)
        time.sleep(SETTLE_S)
        self._record(index, SERVER, {"qps": qps, "is_search": is_search, "planned": count, **reply}, len(item.server))

    def _check_records(self, batches: Sequence[list[int]]) -> None:
        """Requires that each record of an interrupted run belongs to a turn of this run.

        Raises:
            ResultFileError: A record does not fit the plan, so the journal is invalid.
        """
        planned = {
            (work.kind, turn): work for turn in range(self._protocol.rounds) for work in self._plan_turns(turn, batches)
        }
        label_set, labels = self._data.label_set, self._data.labels
        for item in self.running.values():
            on_gpu = item.cell.provider != "cpu"
            fits = all(
                (kind, turn) in planned
                and fits_plan(cast(TurnReply, reply), planned[kind, turn], label_set, labels, on_gpu)
                for kind, replies in item.turns.items()
                for turn, reply in replies.items()
            )
            fits = fits and self._fits_server(item)
            fits = fits and (item.needs_option or not item.exactness) and self._fits_exits(item)
            if self._journal and not fits:
                raise invalid_journal(self._journal.path, f"a record of {item.cell.name} does not fit the run")

    def _fits_server(self, item: Running) -> bool:
        """Returns whether the recorded turns of the scenario ``server`` are those that this run plans."""
        if item.server and len(item.turns.get(SINGLE, {})) < self._protocol.rounds:
            return False
        for number, turn in enumerate(item.server):
            rate = server.next_rate(item.server[:number], self._protocol, item.single_qps)
            if rate != (turn.qps, turn.is_search):
                return False
            if len(server.plan(number, *rate, self._singles, self._protocol).sentences) != turn.planned:
                return False
        return True

    def _fits_exits(self, item: Running) -> bool:
        """Returns whether the recorded exits can be those of the sentences at batch 1."""
        is_complete = not item.exits or (item.exit_count > 0 and list(item.exits) == self._singles)
        return is_complete and all(passed <= item.exit_count for passed in item.exits.values())

    def _require_peak(self, index: int, item: Running, batches: Sequence[list[int]]) -> None:
        """Measures the memory peak if the interrupted run ended after the last turn and before this measurement."""
        if not item.peaks:
            self._start_process(index, item)
            assert item.worker is not None
            item.worker.ask({"do": "run", "batches": batches, "warmup": 0}, LOAD_TIMEOUT_S)
            self._stop_process(index, item)

    def _shuffle(self, rng: random.Random) -> Iterator[int]:
        return iter(rng.sample(sorted(self.running), len(self.running)))

    def _run_action(self, index: int, action: Callable[..., None], *arguments: Any) -> None:
        """Runs an action unless the cell has failed, and records a `ToolchainError` as the failure of the cell."""
        item = self.running[index]
        if item.failure is not None:
            return
        try:
            action(index, item, *arguments)
        except ToolchainError as error:
            if item.worker:
                item.worker.close()
                item.worker = None
            reply = {"type": type(error).__name__, "cause": error.cause, "mend": error.hint}
            self._record(index, "failure", reply)

    def _record(self, index: int, kind: str, reply: Mapping[str, Any], turn: int | None = None) -> None:
        record = {"cell": index, "kind": kind, "turn": turn, "reply": dict(reply)}
        self.running[index].add_record(record)
        if self._journal:
            self._journal.append(record)

    def _start_process(self, index: int, item: Running) -> None:
        """Replaces the cell's process by a new process, and records its load time and its warm-up time per sentence."""
        self._stop_process(index, item)
        self._free_memory(item)
        item.worker = self._open_worker(item)
        ready = item.worker.load(LOAD_TIMEOUT_S)
        item.worker.ask({"do": "data", "texts": self._data.texts, "lengths": self._lengths}, LOAD_TIMEOUT_S)
        chosen = [[i] for i in self._order[:WARM_UP_SENTENCES]]
        message = {"do": "run", "batches": chosen, "warmup": len(chosen)}
        reply = item.worker.ask(message, LOAD_TIMEOUT_S)
        time.sleep(SETTLE_S)
        self._record(index, "start", {**ready, "sentence_s": statistics.mean(reply["us"][0]) / 1e6})

    def _ensure_worker(self, index: int, item: Running) -> Worker:
        """Returns the cell's process; starts one if none runs."""
        if item.worker is None:
            self._start_process(index, item)
        assert item.worker is not None
        return item.worker

    def _open_worker(self, item: Running) -> Worker:
        """Returns a new process for the cell; the process has not loaded the session yet."""
        backend = self._backends[item.cell.runtime]
        place = self._protocol.place(item.cell.provider)
        text = self._data.texts[self._order[0]]
        encoder = item.cell.encoder or self._encoder
        session = backend.session_on(place.provider)
        return Worker(session, item.artifact.path, place, encoder, text, backend.imports, backend.python)

    def _stop_process(self, index: int, item: Running) -> None:
        """Records the memory peaks of the cell's process, if there is one, and ends the process."""
        if item.worker:
            peak = item.worker.ask({"do": "peak"}, TURN_TIMEOUT_S)
            item.worker.close()
            item.worker = None
            self._record(index, "peak", peak)

    def _time_exactness(self, index: int, item: Running) -> None:
        """Compares the times of exact and of saturating 8-bit products, if exact products need a session option."""
        if item.exactness or not item.needs_option:
            return
        chosen = [[i] for i in self._order[:WARM_UP_SENTENCES]]
        message = {"do": "exactness", "batches": chosen, "rounds": EXACTNESS_ROUNDS}
        self._record(index, "exactness", self._ask_separately(item, message, TURN_TIMEOUT_S))

    def _find_exits(self, index: int, item: Running) -> None:
        """Finds the exit that each sentence uses at batch 1, for a cell with exits."""
        if item.exits or not item.exit_count:
            return
        message = {"do": "exits", "sentences": self._singles}
        timeout_s = LOAD_TIMEOUT_S + 10 * item.sentence_s * len(self._singles)
        reply = self._ask_separately(item, message, timeout_s)
        self._record(index, "exits", {**reply, "answered": self._singles})

    def _ask_separately(self, item: Running, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Returns the reply of a separate process, whose second session must not count as memory of the cell."""
        worker = self._open_worker(item)
        try:
            worker.load(LOAD_TIMEOUT_S)
            worker.ask({"do": "data", "texts": self._data.texts, "lengths": []}, LOAD_TIMEOUT_S)
            return worker.ask(message, timeout_s)
        finally:
            worker.close()

    def _free_memory(self, item: Running) -> None:
        """Ends processes of cells until the model of the cell `item` fits in memory.

        A cell whose process has ended starts a new process at its next turn.
        """
        import psutil

        memory = psutil.virtual_memory
        load_sizes = [start["memory"]["load"] for start in item.starts]
        needed = 2 * (max(load_sizes) if load_sizes else item.artifact.manifest.size_bytes)
        for index in self.running:
            if memory().available - needed >= SPARE_SHARE * memory().total:
                return
            self._run_action(index, self._stop_process)

    def _run_turn(self, index: int, item: Running, turn: int, work: Turn) -> None:
        worker = self._ensure_worker(index, item)
        single = work.kind == SINGLE
        earlier_replies = item.turns.get(work.kind, {})
        message = {
            "do": "run",
            "batches": work.batches,
            "warmup": 2,
            # In the first round, `repeats` is 0, so the worker repeats the batches until `min_s` seconds are over. In
            # every later round, the worker repeats the batches as often as in the first round. A later round may run
            # slightly faster than the first round, but must still take `work.min_s` seconds. `SPARE_TIME` therefore
            # makes the first round 10 % longer than `work.min_s`.
            "repeats": len(earlier_replies[min(earlier_replies)]["us"]) if earlier_replies else 0,
            "min_s": work.min_s * SPARE_TIME,
            "tokenizing": single or work.kind == MIXED,
            "resident": single and item.cell.provider != "cpu",
        }
        if work.kind == PAUSED:
            message = {"do": "pauses", "batches": work.batches, "pauses_us": scenarios.PAUSES_US}
        expected_s = item.sentence_s * sum(map(len, work.batches))
        with item.noise.watch([worker.pid]):
            reply = worker.ask(message, TURN_TIMEOUT_S + 10 * (expected_s + work.min_s))
        time.sleep(SETTLE_S)
        if single:
            reply["answered"] = [i for batch in work.batches for i in batch]
        elif work.kind == OFFLINE:
            reply |= {"answered": [i for batch in work.batches for i in batch], "probabilities": []}
        if work.kind in (OFFLINE, MIXED):
            reply["sizes"] = [len(batch) for batch in work.batches]
        self._record(index, work.kind, reply, turn)

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the run that are not settings of the benchmark."""
        return {
            "single_sentences": len(self._singles),
            "seconds": round(time.monotonic() - self._started, 1),
            "taken_up": bool(self._journal and self._journal.records),
        }

    def row(self, index: int) -> Measurement:
        """Returns the row of the cell with this index."""
        item = self.running.get(index)
        return make_row(item, self._data, self._protocol) if item else make_row_without_figures(self._cells[index])
