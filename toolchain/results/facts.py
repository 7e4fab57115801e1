"""The parts of a result file that describe a run: its settings, its data, and the facts and figures of a cell.

Each type is a typed dict, so the values keep the form of the file. `decode` checks every known key. A key that this
release does not know keeps its value, because other releases and scripts add keys; `Plain` checks such a value.
"""

from __future__ import annotations

from typing import Annotated, NotRequired

from typing_extensions import TypedDict

from toolchain.data.labels import TASKS, Answer
from toolchain.system.decoding import Amount, Check, Count, Line, Plain, open_record

# Limits for the fact `exits` of a file.
MOST_EXITS = 1000
MOST_POINTS = 1000


def _check_task(task: str) -> str:
    if task not in TASKS:
        raise ValueError("the task is unknown")
    return task


Task = Annotated[str, Check(_check_task)]


@open_record
class RunSettings(TypedDict):
    """The settings of a run, as `toolchain.bench.scenarios.Protocol` names them, and its facts.

    The keys ``source`` and ``method`` describe published figures. ``rates`` maps each runtime to the highest rates that
    the machine probe measured.
    """

    id: NotRequired[Line]
    threads: NotRequired[Count]
    batch_size: NotRequired[Count]
    single_sentences: NotRequired[Count]
    device_id: NotRequired[Count]
    source: NotRequired[Line]
    method: NotRequired[Line]
    rates: NotRequired[dict[Line, dict[Line, Amount]]]
    server_p99_ms: NotRequired[Amount | None]
    server_qps: NotRequired[Amount | None]


@open_record
class DataFacts(TypedDict):
    """The data of a run: its name, its number of rows and its digest.

    ``multi_label`` is the form in which older releases stated the task. In memory, ``labels`` holds the correct answer
    to each row; a file stores the labels outside this record.
    """

    name: Line
    rows: Count
    sha256: Line
    task: NotRequired[Task]
    multi_label: NotRequired[bool]
    label_names: NotRequired[list[Line]]
    max_length: NotRequired[Count]
    labels: NotRequired[list[Answer]]


@open_record
class GpuMemory(TypedDict):
    """GPU memory of a cell in bytes, and the method that measured it."""

    peak: Count
    load: NotRequired[Count]
    allocator_peak: NotRequired[Count]
    method: NotRequired[Line]


@open_record
class Memory(TypedDict):
    """Memory of a cell in bytes after each stage of loading, its peak, and the method that measured the peak."""

    bare: NotRequired[Count]
    imports: NotRequired[Count]
    load: NotRequired[Count]
    peak: NotRequired[Count]
    method: NotRequired[Line]
    gpu: NotRequired[GpuMemory]


@open_record
class Size(TypedDict):
    """Size of an artifact in bytes: of all files, of the compressed files, and of each part of the model."""

    total: NotRequired[Count]
    gzip: NotRequired[Count]
    parts: NotRequired[dict[Line, Count]]


def _check_option(option: list[str]) -> list[str]:
    if len(option) != 2:
        raise ValueError("an option is not a name and a value")
    return option


SessionOption = Annotated[list[Line], Check(_check_option)]  # name and value


@open_record
class SessionFacts(TypedDict):
    """Facts that a session reports, such as its provider and its threads."""

    provider: NotRequired[Line]
    threads: NotRequired[Count | None]
    nodes: NotRequired[dict[Line, Count]]
    note: NotRequired[Line]
    fallback: NotRequired[Line]
    option: NotRequired[SessionOption]
    graph_lengths: NotRequired[list[Count]]


@open_record
class Change(TypedDict):
    """A number before and after pruning."""

    before: Count
    after: Count


@open_record
class Prediction(TypedDict):
    """A predicted speed-up, and the cost that predicts it."""

    value: Amount
    by: Line


@open_record
class Pruning(TypedDict):
    """The parts of the encoder that pruning kept; the method ``mask`` keeps all, and sets some to zero."""

    method: Line
    zeroed: NotRequired[float]
    achieved: NotRequired[float]
    heads: NotRequired[list[Count]]
    ffn: NotRequired[list[Count]]
    encoder_parameters: NotRequired[Change]
    embedding_rank: NotRequired[Count]
    embedding_parameters: NotRequired[Change]
    predicted_speedup: NotRequired[Prediction]


def _check_pruning(pruning: Pruning) -> Pruning:
    kept = ("achieved", "heads", "ffn", "encoder_parameters", "predicted_speedup")
    keys = ("zeroed",) if pruning["method"] == "mask" else kept
    if missing := [key for key in keys if key not in pruning]:
        raise ValueError(f"there is no {missing[0]}")
    if ("embedding_rank" in pruning) != ("embedding_parameters" in pruning):
        raise ValueError("embedding_rank and embedding_parameters belong together")
    return pruning


PruningFact = Annotated[Pruning, Check(_check_pruning)]


@open_record
class Answers(TypedDict):
    """Numbers of right answers, or scores, on the same rows before and after trimming of the vocabulary."""

    rows: Count
    flips: NotRequired[Count]
    right_before: NotRequired[Count]
    right_after: NotRequired[Count]
    score: NotRequired[Line]
    before: NotRequired[float]
    after: NotRequired[float]


def _check_answers(answers: Answers) -> Answers:
    keys = ("score", "before", "after") if "before" in answers else ("flips", "right_before", "right_after")
    if answers["rows"] and (missing := [key for key in keys if key not in answers]):
        raise ValueError(f"there is no {missing[0]}")
    return answers


@open_record
class Vocabulary(TypedDict):
    """The fact ``vocabulary``: the tokens that trimming kept, and its effect on held-out rows."""

    kept: Count
    of: Count
    bytes_saved: int
    held_out: Annotated[Answers, Check(_check_answers)]
    out_of_domain: Annotated[Answers, Check(_check_answers)]


@open_record
class ExitPoint(TypedDict):
    """The effect of one confidence threshold on held-out rows."""

    confidence: Amount
    drop: float
    shares: list[Amount]
    work: Amount


@open_record
class ExitsFact(ExitPoint):
    """The fact ``exits``: the layers of the exits, the chosen threshold, and the effect of all thresholds."""

    layers: list[Count]
    held_out_rows: Count
    curve: list[ExitPoint]


def _check_exits(fact: ExitsFact) -> ExitsFact:
    if any(len(point["shares"]) != len(fact["layers"]) for point in (fact, *fact["curve"])):
        raise ValueError("the exits have another number of shares than layers")
    if len(fact["layers"]) > MOST_EXITS or len(fact["curve"]) > MOST_POINTS:
        raise ValueError("there are too many exits, or too many points of the curve")
    return fact


CheckedExits = Annotated[ExitsFact, Check(_check_exits)]


@open_record
class Roofline(TypedDict):
    """The fact ``roofline``: the work of a sentence, and the least time that it takes on the machine."""

    macs: NotRequired[Amount]
    weight_bytes: NotRequired[Amount]
    floor_ms: NotRequired[Amount]
    share: NotRequired[Amount]


@open_record
class TimeRatio(TypedDict):
    """A ratio of times, with the bounds of its confidence interval if there are enough rounds."""

    value: Amount
    low: NotRequired[Amount]
    high: NotRequired[Amount]


def _check_ratio(ratio: TimeRatio) -> TimeRatio:
    if ("low" in ratio) != ("high" in ratio):
        raise ValueError("the interval of a ratio has only one bound")
    return ratio


@open_record
class Exactness(TypedDict):
    """The fact ``exactness``: the session option that makes 8-bit products exact, and its cost in time."""

    option: SessionOption
    time: Annotated[TimeRatio, Check(_check_ratio)]


@open_record
class Server(TypedDict):
    """The fact ``server``: the rate of the scenario, and the mean number of sentences in a batch at this rate.

    ``qps`` is queries per second. With ``p99_limit_ms``, the rate is the highest that keeps this p99, or 0 if no rate
    keeps it; without, the user chose the rate.
    """

    qps: Amount
    mean_batch: Amount
    p99_limit_ms: NotRequired[Amount]


@open_record
class CellFacts(TypedDict):
    """Facts of a cell that are not figures."""

    session: NotRequired[SessionFacts]
    rewrites: NotRequired[dict[Line, Count] | None]
    pruning: NotRequired[PruningFact]
    vocabulary: NotRequired[Vocabulary]
    exits: NotRequired[CheckedExits]
    roofline: NotRequired[Roofline]
    exactness: NotRequired[Exactness]
    server: NotRequired[Server]
    note: NotRequired[Line]


# The forms of these records in a file: the checks of `Plain` also cover the keys that this release does not know.
StoredRun = Annotated[RunSettings, Plain]
StoredData = Annotated[DataFacts, Plain]
StoredMemory = Annotated[Memory, Plain]
StoredSize = Annotated[Size, Plain]
StoredFacts = Annotated[CellFacts, Plain]
