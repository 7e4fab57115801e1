"""Cells of a benchmark: collects the replies of each cell's processes, and makes each cell's row of the result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from toolchain import errors
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.store import Artifact
from toolchain.bench import server
from toolchain.bench.noise import Noise
from toolchain.bench.process import Worker
from toolchain.bench.scenarios import LENGTHS, MIXED, OFFLINE, PAUSED, PAUSES_US, SERVER, SINGLE, Protocol, length_kind
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.data.labels import REGRESSION, Answer
from toolchain.errors import BenchError, ProviderError, ToolchainError
from toolchain.results.facts import CellFacts, Memory
from toolchain.results.measurements import Measurement, Samples
from toolchain.results.scores import Score, score_answers
from toolchain.results.statistics import ratio


@dataclass(frozen=True)
class Cell:
    """A variant on an execution provider.

    Attributes:
        model: Name of the model.
        variant: Name of the variant.
        runtime: Runtime tag of the variant, such as ``onnx``.
        provider: The execution provider.
        artifact: Artifact of the variant; None if the variant is unavailable or its build failed.
        status: Status of the cell: ``ok``, ``failed`` or ``unavailable``.
        reason: Why the cell has no artifact; empty if it has an artifact.
        hint: How the user can solve the problem that `reason` states; may be empty.
        encoder: The cell's own `Encoder`; None if the cell uses the `Encoder` of the run.
    """

    model: str
    variant: str
    runtime: str
    provider: str
    artifact: Artifact | None
    status: str = "ok"
    reason: str = ""
    hint: str = ""
    encoder: Encoder | None = None

    @property
    def name(self) -> str:
        """Returns ``variant@provider``."""
        return f"{self.variant}@{self.provider}"

    def with_own_encoder(self, root: Manifest) -> Cell:
        """Returns the cell, with its own `Encoder` if the variant's tokenizer differs from the imported checkpoint's.

        Args:
            root: Manifest of the imported checkpoint.
        """
        if self.artifact is None or self.artifact.manifest.tokenizer == root.tokenizer:
            return self
        names = [spec.name for spec in root.inputs]
        return replace(self, encoder=Encoder.open(self.artifact.path, names, root.max_length))


@dataclass
class Running:
    """The state and the results of a cell during a benchmark.

    Attributes:
        cell: The cell.
        artifact: Artifact of the cell.
        worker: The cell's process; None if no process runs.
        starts: For each process of the cell, the reply to `Worker.load` and the seconds per sentence of the warm-up.
        turns: The worker's reply to each turn, by kind of turn and by number of the round.
        server: The turns of the scenario ``server``.
        peaks: Memory peaks of each ended process of the cell.
        exactness: Microseconds of each round with exact and with saturating 8-bit products; empty if the
            benchmark does not compare them.
        exits: Maps each sentence of the scenario ``single-stream`` to the number of exits that it passes; empty for a
            cell without exits.
        failure: The error that ended the measurement of the cell; None without an error.
        noise: Processor time that other processes and the host of a virtual machine used during the cell's turns.
    """

    cell: Cell
    artifact: Artifact
    worker: Worker | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    turns: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    server: list[server.Turn] = field(default_factory=list)
    peaks: list[dict[str, Any]] = field(default_factory=list)
    exactness: dict[str, list[int]] = field(default_factory=dict)
    exits: dict[int, int] = field(default_factory=dict)
    failure: ToolchainError | None = None
    noise: Noise = field(default_factory=Noise)

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Adds one result of this run, or of the interrupted run that this run resumes.

        Args:
            record: One result from the journal, with the keys ``kind``, ``turn`` and ``reply``.
        """
        kind, reply = record["kind"], record["reply"]
        if kind == "start":
            self.starts.append(reply)
        elif kind == "peak":
            self.peaks.append(reply)
        elif kind == "exactness":
            self.exactness = dict(reply)
        elif kind == "exits":
            self.exits = dict(zip(reply["answered"], reply["exits"], strict=True))
        elif kind == "failure":
            self.failure = getattr(errors, reply["type"])(reply["cause"], reply["mend"])
        elif kind == SERVER:
            self.server.append(server.Turn(**reply))
        else:
            self.turns.setdefault(kind, {})[record["turn"]] = reply

    @property
    def needs_option(self) -> bool:
        """Returns whether the cell's 8-bit products are exact on this processor only with a session option."""
        option = self.starts and self.starts[0]["facts"].get("option")
        return bool(option) and self.artifact.manifest.facts.get("int8_headroom", 1) < 1

    @property
    def exit_count(self) -> int:
        """Returns the number of exits of the cell's graph; 0 without exits, and on a GPU."""
        facts = self.artifact.manifest.facts.get("exits")
        return len(facts["layers"]) if facts and self.cell.provider == "cpu" else 0

    @property
    def single_qps(self) -> float:
        """Returns the number of sentences per second in the scenario ``single-stream``, tokenising included."""
        replies = self.turns[SINGLE].values()
        times = [us for reply in replies for us in _flatten(reply["us"])]
        tokenizing = [us for reply in replies for us in reply["tokenizing_us"]]
        return float(1e6 * len(times) / (sum(times) + sum(tokenizing)))

    @property
    def sentence_s(self) -> float:
        """Returns the mean seconds per sentence in the first process's warm-up; 0 before the first process starts."""
        return float(self.starts[0]["sentence_s"]) if self.starts else 0.0


def make_row(item: Running, data: Data, protocol: Protocol) -> Measurement:
    """Returns the row of a cell: its figures, or the reason why it failed."""
    if item.failure:
        return make_row_without_figures(item.cell, item.failure)
    manifest, first = item.artifact.manifest, item.starts[0]
    singles, batches = _sort_replies(item, SINGLE), _sort_replies(item, OFFLINE)
    latency = Samples.from_single([_flatten(reply["us"]) for reply in singles])
    with_tokenizing = Samples.from_single([_add_tokenizing(reply) for reply in singles])
    offline = Samples.from_rounds([_flatten(r["us"]) for r in batches], _sizes_of(batches))
    mixed = _sort_replies(item, MIXED) if MIXED in item.turns else []
    after_pause = {
        pause_us: Samples.from_single([reply["us"][index] for reply in _sort_replies(item, PAUSED)])
        for index, pause_us in enumerate(PAUSES_US if PAUSED in item.turns else ())
    }
    resident = Samples.from_single([r["resident_us"] for r in singles]) if singles[0]["resident_us"] else None
    cold_start, load = (
        Samples.from_single([[start[key]] for start in item.starts]) for key in ("cold_start_us", "load_us")
    )
    single_answers, batched_answers = _collect_answers(singles), _collect_answers(batches)
    probabilities = {
        i: tuple(p) for r in singles for i, p in zip(r["answered"], _flatten(r["probabilities"]), strict=True)
    }
    count = len(data.labels)
    single_score = _score(single_answers, data, 1)
    batched_score = _score(batched_answers, data, protocol.batch_size)
    served = server.outcome(item.server, protocol) if item.server else None
    by_length = {
        n: Samples.from_single([_flatten(reply["us"]) for reply in _sort_replies(item, length_kind(n))])
        for n in LENGTHS
        if length_kind(n) in item.turns
    }
    return Measurement(
        model=item.cell.model,
        variant=item.cell.variant,
        provider=item.cell.provider,
        artifact_id=manifest.id,
        status="ok",
        score=single_score or batched_score,
        score_batched=batched_score,
        latency_ms=latency.milliseconds(),
        with_tokenizing_ms=with_tokenizing.milliseconds(),
        resident_ms=resident.milliseconds() if resident else {},
        cold_start_ms=cold_start.milliseconds(),
        load_ms=load.milliseconds(),
        throughput_per_s=offline.per_second(),
        memory_bytes=cast(Memory, {**first["memory"], **_largest_peaks(item.peaks)}),
        size_bytes={"total": manifest.size_bytes, "parts": manifest.facts.get("bytes_by_part", {})},
        facts=cast(
            CellFacts,
            {
                "session": first["facts"],
                "rewrites": manifest.facts.get("rewrites"),
                **{name: manifest.facts[name] for name in ("pruning", "vocabulary", "exits") if name in manifest.facts},
                **_exactness_fact(item),
                **({"server": served.fact(protocol)} if served else {}),
            },
        ),
        noise=item.noise.shares(),
        latency=latency,
        with_tokenizing=with_tokenizing,
        batches=offline,
        mixed_batches=Samples.from_rounds([_add_tokenizing(r) for r in mixed], _sizes_of(mixed)) if mixed else None,
        resident=resident,
        cold_start=cold_start,
        load=load,
        server_ms=served.samples.milliseconds() if served else {},
        server=served.samples if served else None,
        by_length=by_length,
        after_pause=after_pause,
        predictions=tuple((single_answers if single_score else batched_answers)[i] for i in range(count)),
        probabilities=tuple(probabilities.get(i) for i in range(count)) if data.label_set.labels_texts else (),
        exits=tuple(item.exits.get(i) if i in single_answers else None for i in range(count)) if item.exits else (),
        batch_changed=None
        if data.label_set.task == REGRESSION
        else sum(batched_answers[i] != answer for i, answer in single_answers.items()),
    )


def _exactness_fact(item: Running) -> dict[str, Any]:
    """Returns the session option for exact 8-bit products, and the ratio of the times with and without this option.

    The result is empty for a cell whose 8-bit products need no session option to be exact.
    """
    if not item.exactness:
        return {}
    time_ratio = ratio(item.exactness["exact"], item.exactness["saturating"])
    return {"exactness": {"option": item.starts[0]["facts"]["option"], "time": time_ratio.to_json()}}


def _sort_replies(item: Running, kind: str) -> list[dict[str, Any]]:
    return [reply for _, reply in sorted(item.turns[kind].items())]


def _add_tokenizing(reply: Mapping[str, Any]) -> list[int]:
    """Returns the microseconds of each batch of a reply, tokenising included."""
    return [us + extra for us, extra in zip(_flatten(reply["us"]), reply["tokenizing_us"], strict=True)]


def _sizes_of(replies: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Returns the number of sentences of each measured batch, by reply."""
    return [reply["sizes"] * len(reply["us"]) for reply in replies]


def _flatten(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _collect_answers(replies: Sequence[Mapping[str, Any]]) -> dict[int, Answer]:
    """Returns the answer to each sentence, by the index of the sentence."""
    return {
        i: tuple(answer) if isinstance(answer, list) else answer  # JSON has no tuples
        for reply in replies
        for i, answer in zip(reply["answered"], _flatten(reply["answers"]), strict=True)
    }


def _largest_peaks(peaks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the largest peaks of host memory and of GPU memory over all processes of a cell."""
    largest: dict[str, Any] = {"peak": max(peak["peak"] for peak in peaks)}
    gpu_peaks = [peak["gpu"] for peak in peaks if "gpu" in peak]
    if gpu_peaks:
        largest["gpu"] = max(gpu_peaks, key=lambda gpu: int(gpu["peak"]))
    return largest


def _score(answers: Mapping[int, Answer], data: Data, batch_size: int) -> Score | None:
    """Returns the score of the answers; None if the answers do not cover all sentences."""
    count = len(data.labels)
    if len(answers) < count:
        return None
    return score_answers([answers[i] for i in range(count)], data.labels, data.label_set, batch_size)


def make_row_without_figures(cell: Cell, error: ToolchainError | None = None) -> Measurement:
    """Returns a row without figures, for a cell without a complete measurement.

    Args:
        cell: The cell.
        error: The error that ended the measurement; None to use `cell.reason`. The row's status is ``unavailable`` for
            a `ProviderError` or an unavailable cell, and ``failed`` otherwise.
    """
    error = error or BenchError(cell.reason, cell.hint)
    missing = isinstance(error, ProviderError) or cell.status == "unavailable"
    artifact_id = cell.artifact.manifest.id if cell.artifact else None
    status = "unavailable" if missing else "failed"
    return Measurement(cell.model, cell.variant, cell.provider, artifact_id, status, error.cause, error.hint)
