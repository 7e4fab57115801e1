"""The records of a journal: one result of a cell each, and the checks that make it safe to resume from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from toolchain import errors
from toolchain.bench.scenarios import LENGTHS, MIXED, OFFLINE, PAUSED, PAUSES_US, SERVER, SINGLE, Turn, length_kind
from toolchain.data.labels import MULTI, REGRESSION, TOKENS, Answer, LabelSet
from toolchain.results.facts import GpuMemory, Memory, SessionFacts
from toolchain.results.measurements import MAX_TIME_US, PROBABILITY
from toolchain.results.result_file import MAX_SCORE
from toolchain.system.decoding import Amount, Check, Count, Note, Plain, decode, decode_object, strict


def _check_time(time_us: int) -> int:
    if not 0 < time_us <= MAX_TIME_US:
        raise ValueError(f"the time is not positive, or is above {MAX_TIME_US}")
    return time_us


def _check_error(name: str) -> str:
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.ToolchainError)):
        raise ValueError("this is not an error of the toolchain")
    return name


Time = Annotated[int, Check(_check_time)]  # microseconds


@strict
class Start(TypedDict):
    """The reply of a process that has loaded its session, and the seconds per sentence of its warm-up."""

    load_us: Time
    cold_start_us: Time
    sentence_s: Amount
    facts: Annotated[SessionFacts, Plain]
    memory: Annotated[Memory, Plain]


@strict
class Peak(TypedDict):
    """The memory peaks of a process in bytes."""

    peak: Count
    gpu: NotRequired[Annotated[GpuMemory, Plain]]


@strict
class Exactness(TypedDict):
    """Microseconds of each round with exact and with saturating 8-bit products."""

    exact: list[Time]
    saturating: list[Time]


@strict
class Exits(TypedDict):
    """The number of exits that each sentence of the scenario ``single-stream`` passes."""

    exits: list[Count]
    answered: list[Count]


@strict
class Failure(TypedDict):
    """The error that ended the measurement of a cell."""

    type: Annotated[str, Check(_check_error)]
    cause: Note
    mend: Note


@strict
class TurnReply(TypedDict):
    """The reply to one turn; `toolchain.bench.worker` describes its times, answers and probabilities."""

    us: list[list[Time]]
    tokenizing_us: list[Count]
    resident_us: list[Time]
    answers: list[list[Answer]]
    probabilities: list[list[list[Count]]]
    answered: NotRequired[list[Count]]
    sizes: NotRequired[list[Count]]


@strict
class ServerReply(TypedDict):
    """The reply to one turn of the scenario ``server``; see `toolchain.bench.server.Turn`."""

    qps: Amount
    is_search: bool
    planned: Count
    us: list[Time]
    sizes: list[Count]


@strict
@dataclass(frozen=True)
class _Record:
    """One result of a cell; `cells.Running.add_record` reads it."""

    cell: Count
    turn: Count | None


@strict
@dataclass(frozen=True)
class _StartRecord(_Record):
    kind: Literal["start"]
    reply: Start

    def __post_init__(self) -> None:
        if "load" not in self.reply["memory"]:
            raise ValueError("the memory after loading is unknown")


@strict
@dataclass(frozen=True)
class _PeakRecord(_Record):
    kind: Literal["peak"]
    reply: Peak


@strict
@dataclass(frozen=True)
class _ExactnessRecord(_Record):
    kind: Literal["exactness"]
    reply: Exactness

    def __post_init__(self) -> None:
        if not self.reply["exact"] or len(self.reply["exact"]) != len(self.reply["saturating"]):
            raise ValueError("the rounds with exact and with saturating products differ in number")


@strict
@dataclass(frozen=True)
class _ExitsRecord(_Record):
    kind: Literal["exits"]
    reply: Exits

    def __post_init__(self) -> None:
        if not self.reply["exits"] or len(self.reply["exits"]) != len(self.reply["answered"]):
            raise ValueError("the numbers of exits and of sentences contradict each other")


@strict
@dataclass(frozen=True)
class _FailureRecord(_Record):
    kind: Literal["failure"]
    reply: Failure


@strict
@dataclass(frozen=True)
class _ServerRecord(_Record):
    kind: Literal["server"]
    reply: ServerReply

    def __post_init__(self) -> None:
        count, sizes = len(self.reply["us"]), self.reply["sizes"]
        if not (0 < count <= self.reply["planned"] and all(sizes) and sum(sizes) == count):
            raise ValueError("the numbers of queries contradict each other")


@strict
@dataclass(frozen=True)
class _TurnRecord(_Record):
    kind: str
    reply: TurnReply

    def __post_init__(self) -> None:
        if self.turn is None or self.kind not in (SINGLE, OFFLINE, MIXED, PAUSED, *map(length_kind, LENGTHS)):
            raise ValueError("the kind or the number of a turn is unknown")


Record = _StartRecord | _PeakRecord | _ExactnessRecord | _ExitsRecord | _FailureRecord | _ServerRecord | _TurnRecord
_TYPES: dict[str, type[Record]] = {
    "start": _StartRecord,
    "peak": _PeakRecord,
    "exactness": _ExactnessRecord,
    "exits": _ExitsRecord,
    "failure": _FailureRecord,
    SERVER: _ServerRecord,
}


def decode_record(line: bytes) -> Record:
    """Converts a line of a journal to a record.

    Raises:
        ValueError: The line is not JSON, or is not a record.
    """
    kind = decode_object(line).get("kind")
    return decode(_TYPES.get(kind, _TurnRecord) if isinstance(kind, str) else _TurnRecord, line)


def fits_plan(reply: TurnReply, work: Turn, label_set: LabelSet, labels: Sequence[Answer], on_gpu: bool) -> bool:
    """Returns whether a recorded reply can be the reply to a turn.

    Args:
        reply: The recorded reply.
        work: The planned turn.
        label_set: Labels and task of the model.
        labels: Correct answer to each sentence.
        on_gpu: Whether the cell runs on a GPU.
    """
    sizes = [len(batch) for batch in work.batches]
    if not reply["us"] or any(len(row) != len(sizes) for row in reply["us"]):
        return False
    if work.kind == PAUSED:
        return len(reply["us"]) == len(PAUSES_US)
    if work.kind == MIXED:
        return reply.get("sizes") == sizes and len(reply["tokenizing_us"]) == len(reply["us"]) * len(sizes)
    if work.kind not in (SINGLE, OFFLINE):
        return True
    sentences = [index for batch in work.batches for index in batch]
    if reply.get("answered") != sentences or [len(batch) for batch in reply["answers"]] != sizes:
        return False
    answers = zip(_flatten(reply["answers"]), (labels[index] for index in sentences), strict=True)
    if not all(_is_answer(answer, label, label_set) for answer, label in answers):
        return False
    if work.kind == OFFLINE:
        return reply.get("sizes") == sizes and not reply["probabilities"]
    count = len(label_set.names) if label_set.labels_texts else 0
    return (
        [len(batch) for batch in reply["probabilities"]] == sizes
        and all(not count or _are_probabilities(row, count) for row in _flatten(reply["probabilities"]))
        and len(reply["tokenizing_us"]) == len(reply["us"]) * len(sizes)
        and len(reply["resident_us"]) == (len(sizes) if on_gpu else 0)
    )


def _are_probabilities(row: Sequence[int], count: int) -> bool:
    return len(row) == count and all(value <= PROBABILITY for value in row)


def _is_answer(answer: Answer, label: Answer, label_set: LabelSet) -> bool:
    count = len(label_set.names)
    if label_set.task == TOKENS:
        is_list = isinstance(answer, tuple) and isinstance(label, tuple) and len(answer) == len(label)
        return is_list and all(0 <= index < count for index in answer)  # type: ignore[union-attr]
    if isinstance(answer, tuple):
        return False
    if label_set.task == REGRESSION:
        return abs(answer) <= MAX_SCORE
    return isinstance(answer, int) and 0 <= answer < (1 << count if label_set.task == MULTI else count)


def _flatten(rows: Iterable[Iterable[Any]]) -> list[Any]:
    return [value for row in rows for value in row]
