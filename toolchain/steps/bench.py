"""Bench: every cell in a process of its own, asked the same sentences in the same rounds, in random order."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from toolchain.artifacts import Artifact
from toolchain.backends import BACKENDS, Backend, Place
from toolchain.errors import BenchError, ProviderError, ToolchainError
from toolchain.inputs import Data, Encoder
from toolchain.measurements import Accuracy, Measurement, Samples
from toolchain.worker import Worker

# ONNX Runtime's and OpenMP's threads spin up to some 20 ms after their last job; the next cell waits that out.
SETTLE_S = 0.05
LOAD_TIMEOUT_S = 300.0
TURN_TIMEOUT_S = 120.0
CALIBRATION = 12  # sentences run untimed-for-the-record, to warm up and to size the rounds
SLICES = 8  # the set is spread over this many rounds; a pass is over when each had its turn
MOST_SENTENCES = 2000  # at batch 1; a larger set is sampled


@dataclass(frozen=True)
class Protocol:
    """How long and how: `passes` over the sentences, about `turn_s` seconds a cell and turn, batches of `batch_size`.

    `pass_s` caps one batch-1 pass of the slowest cell: a larger set is sampled, the same sentences for all. CUDA cells
    run on the GPU `device_id`; `allow_fallback` measures a session that runs on the CPU in part, as what it is.
    """

    passes: int
    turn_s: float
    pass_s: float
    threads: int
    batch_size: int = 32
    seed: int = 20
    device_id: int = 0
    allow_fallback: bool = False

    @classmethod
    def quick(cls, threads: int, device_id: int = 0, allow_fallback: bool = False) -> Protocol:
        """About 20 s a cell."""
        return cls(1, 0.5, 40, threads, device_id=device_id, allow_fallback=allow_fallback)

    @classmethod
    def full(cls, threads: int, device_id: int = 0, allow_fallback: bool = False) -> Protocol:
        """About 60 s a cell."""
        return cls(3, 0.8, 60, threads, device_id=device_id, allow_fallback=allow_fallback)

    def place(self, provider: str) -> Place:
        """Where a cell on that provider runs."""
        return Place(provider, self.threads, self.device_id, self.allow_fallback)


@dataclass(frozen=True)
class Cell:
    """A variant on a provider: its artifact, or why there is none to measure (`status`, `reason`, `mend`)."""

    model: str
    variant: str
    runtime: str
    provider: str
    artifact: Artifact | None
    status: str = "ok"
    reason: str = ""
    mend: str = ""


@dataclass
class _Running:
    """A cell under measurement."""

    cell: Cell
    artifact: Artifact
    worker: Worker
    ready: dict[str, Any]
    sentence_s: float = 0.0
    singles: list[tuple[list[int], list[int]]] = field(default_factory=list)
    batches: list[tuple[list[int], list[int]]] = field(default_factory=list)
    resident: list[list[int]] = field(default_factory=list)
    single_answers: dict[int, int] = field(default_factory=dict)
    batch_answers: dict[int, int] = field(default_factory=dict)
    failure: ToolchainError | None = None


Progress = Callable[[int, int, str], None]


def bench(
    cells: Sequence[Cell],
    data: Data,
    encoder: Encoder,
    protocol: Protocol,
    progress: Progress,
    backends: Mapping[str, Backend] = BACKENDS,
) -> tuple[list[Measurement], dict[str, Any]]:
    """Measures the cells that have an artifact; a row for every cell, in the order given, and how it was done.

    A cell that cannot be loaded, crashes, hangs or is killed becomes a row that says so; the others go on. `backends`
    maps a runtime to what serves it.
    """
    before = _processor_times()
    started = time.monotonic()
    ids = encoder.encode(data.texts)
    running: dict[int, _Running] = {}
    rows: dict[int, Measurement] = {}
    try:
        for index, cell in enumerate(cells):
            if cell.artifact:
                progress(index, len(cells), f"loading {cell.variant}@{cell.provider}")
            try:
                running[index] = _start(cell, ids, encoder, protocol, backends)
            except ToolchainError as error:
                rows[index] = _unmeasured(cell, error)
        sentences = _choose(len(ids), running.values(), protocol)
        _rounds(list(running.values()), ids, sentences, protocol, progress)
        rows |= {index: _row(item, data, protocol) for index, item in running.items()}
    finally:
        for item in running.values():
            item.worker.close()
    done = {
        **asdict(protocol),
        "rounds": SLICES * protocol.passes,
        "single_sentences": len(sentences),
        "seconds": round(time.monotonic() - started, 1),
        **_noise(before),
    }
    return [rows[index] for index in range(len(cells))], done


def _start(
    cell: Cell, ids: list[list[int]], encoder: Encoder, protocol: Protocol, backends: Mapping[str, Backend]
) -> _Running:
    if cell.artifact is None:
        raise BenchError(cell.reason, cell.mend)
    backend = backends[cell.runtime]
    worker = Worker(backend.session, cell.artifact.path, protocol.place(cell.provider), backend.imports)
    try:
        item = _Running(cell, cell.artifact, worker, worker.load(LOAD_TIMEOUT_S))
        names = [spec.name for spec in cell.artifact.manifest.inputs]
        worker.ask({"do": "data", "ids": ids, "names": names, "pad_id": encoder.pad_id}, LOAD_TIMEOUT_S)
        order = random.Random(protocol.seed).sample(range(len(ids)), min(CALIBRATION, len(ids)))
        reply = _run(worker, [[i] for i in order], warmup=len(order), repeat=1, timeout_s=LOAD_TIMEOUT_S)
        item.sentence_s = statistics.mean(reply["us"][0]) / 1e6
    except BaseException:
        worker.close()
        raise
    return item


def _choose(count: int, running: Iterable[_Running], protocol: Protocol) -> list[int]:
    """The sentences asked at batch 1: all, or as many as the slowest cell can answer in time; in seeded order."""
    slowest = max((item.sentence_s for item in running), default=0.0)
    limit = min(count, MOST_SENTENCES, max(100, int(protocol.pass_s / slowest)) if slowest else count)
    return random.Random(protocol.seed).sample(range(count), limit)


def _rounds(
    running: list[_Running], ids: list[list[int]], sentences: list[int], protocol: Protocol, progress: Progress
) -> None:
    by_length = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    batches = [by_length[i : i + protocol.batch_size] for i in range(0, len(by_length), protocol.batch_size)]
    rng = random.Random(protocol.seed)
    total = SLICES * protocol.passes
    for turn in range(total):
        part = turn % SLICES
        for kind, work in (("singles", [[i] for i in sentences[part::SLICES]]), ("batches", batches[part::SLICES])):
            alive = [item for item in running if item.failure is None]
            for item in rng.sample(alive, len(alive)):
                progress(turn, total, f"{item.cell.variant}@{item.cell.provider}, {kind}")
                if work:
                    _turn(item, kind, work, protocol)


def _turn(item: _Running, kind: str, work: list[list[int]], protocol: Protocol) -> None:
    """One cell's turn of a round: the same work again until `turn_s` is filled, by the estimate made at the start."""
    expected = item.sentence_s * sum(map(len, work)) * (1.0 if kind == "singles" else 0.6)
    repeat = max(1, min(20, round(protocol.turn_s / expected)))
    try:
        timeout_s = TURN_TIMEOUT_S + 10 * expected * repeat
        resident = kind == "singles" and item.cell.provider != "cpu"
        reply = _run(item.worker, work, warmup=2, repeat=repeat, timeout_s=timeout_s, resident=resident)
    except ToolchainError as error:
        item.failure = error
        return
    finally:
        time.sleep(SETTLE_S)
    sizes = [len(batch) for batch in work]
    times = [us for spent in reply["us"] for us in spent]
    (item.singles if kind == "singles" else item.batches).append((times, sizes * repeat))
    if resident:
        item.resident.append(reply["resident_us"])
    answers = item.single_answers if kind == "singles" else item.batch_answers
    for batch, found in zip(work, reply["answers"], strict=True):
        answers.update(zip(batch, found, strict=True))


def _run(
    worker: Worker, work: list[list[int]], warmup: int, repeat: int, timeout_s: float, resident: bool = False
) -> dict[str, Any]:
    message = {"do": "run", "batches": work, "warmup": warmup, "repeat": repeat, "resident": resident}
    return worker.ask(message, timeout_s)


def _row(item: _Running, data: Data, protocol: Protocol) -> Measurement:
    if item.failure is None:
        try:
            peak = item.worker.ask({"do": "peak"}, TURN_TIMEOUT_S)
        except ToolchainError as error:
            item.failure = error
    if item.failure is not None:
        return _unmeasured(item.cell, item.failure)
    latency = Samples.of([times for times, _ in item.singles], [sizes for _, sizes in item.singles])
    batches = Samples.of([times for times, _ in item.batches], [sizes for _, sizes in item.batches])
    resident = Samples.of(item.resident, [[1] * len(row) for row in item.resident]) if item.resident else None
    single = _accuracy(item.single_answers, data, 1)
    batched = _accuracy(item.batch_answers, data, protocol.batch_size)
    manifest = item.artifact.manifest
    answers = item.single_answers if single else item.batch_answers
    return Measurement(
        model=item.cell.model,
        variant=item.cell.variant,
        provider=item.cell.provider,
        artifact_id=manifest.id,
        status="ok",
        accuracy=single or batched,
        accuracy_batched=batched,
        latency_ms=latency.milliseconds(),
        resident_ms=resident.milliseconds() if resident else {},
        throughput_per_s=batches.per_second(),
        memory_bytes={**item.ready["memory"], **peak},
        size_bytes={"total": manifest.size_bytes, "parts": manifest.facts.get("bytes_by_part", {})},
        facts={
            "load_s": item.ready["load_s"],
            "session": item.ready["facts"],
            "rewrites": manifest.facts.get("rewrites"),
            **({"pruning": manifest.facts["pruning"]} if "pruning" in manifest.facts else {}),
        },
        latency=latency,
        batches=batches,
        resident=resident,
        predictions=tuple(answers[i] for i in range(len(data.labels))),
    )


def _accuracy(answers: dict[int, int], data: Data, batch_size: int) -> Accuracy | None:
    """None where not every sentence was asked."""
    if len(answers) < len(data.labels):
        return None
    correct = sum(answers[i] == label for i, label in enumerate(data.labels))
    return Accuracy(correct, len(data.labels), batch_size)


def _unmeasured(cell: Cell, error: ToolchainError) -> Measurement:
    missing = isinstance(error, ProviderError) or cell.status == "unavailable"
    artifact_id = cell.artifact.manifest.id if cell.artifact else None
    status = "unavailable" if missing else "failed"
    return Measurement(cell.model, cell.variant, cell.provider, artifact_id, status, error.cause, error.mend)


def _processor_times() -> dict[str, float]:
    import psutil

    return dict(psutil.cpu_times()._asdict())


def _noise(before: Mapping[str, float]) -> dict[str, Any]:
    """What else the machine did meanwhile: share of processor time stolen by its host, load average."""
    after = _processor_times()
    spent = {name: value - before[name] for name, value in after.items()}
    share = spent.get("steal", 0.0) / max(sum(spent.values()), 1e-9)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"steal_share": round(share, 4), "load_1m": load and round(load, 2)}
