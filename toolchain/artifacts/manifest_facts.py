"""The parts of a manifest that describe an artifact: its facts, its validation report and its environment.

Each type is a typed dict, so the values keep the form of the file; see `toolchain.results.facts`.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from typing_extensions import TypedDict

from toolchain.results.facts import CheckedExits, PruningFact, Task, Vocabulary
from toolchain.system.decoding import Amount, Count, Line, Plain, open_record


@open_record
class Recovery(TypedDict):
    """The fact ``recovery``: how the training of a pruned model went."""

    seconds: Amount
    steps: Count
    best_epoch: Count
    held_out_rows: Count
    held_out_accuracy: list[float]
    precision: Line
    device: Line
    score: NotRequired[Line]


@open_record
class LayerSensitivity(TypedDict):
    """The effect of quantising one layer alone."""

    name: Line
    divergence: float
    flips: int | None


@open_record
class ArtifactFacts(TypedDict):
    """Properties of an artifact, as its step reports them."""

    architecture: NotRequired[Line]
    parameters: NotRequired[Count]
    bytes_by_dtype: NotRequired[dict[Line, Count]]
    bytes_by_part: NotRequired[dict[Line, Count]]
    opset: NotRequired[dict[Line, Count]]
    ir_version: NotRequired[Count | None]
    operators: NotRequired[dict[Line, Count]]
    rewrites: NotRequired[dict[Line, Count] | None]
    int8_headroom: NotRequired[Amount]
    pruning: NotRequired[PruningFact]
    recovery: NotRequired[Recovery]
    exits: NotRequired[CheckedExits]
    vocabulary: NotRequired[Vocabulary]
    sensitivity: NotRequired[list[LayerSensitivity]]
    kept_fp32: NotRequired[list[Line]]
    task: NotRequired[Task]
    multi_label: NotRequired[bool]
    license: NotRequired[Line]
    languages: NotRequired[list[Line]]
    base_model: NotRequired[Line]
    trained_on: NotRequired[Line]


@open_record
class Report(TypedDict):
    """The report of a validation, from `validate` in `toolchain/build/steps/`."""

    passed: NotRequired[bool]
    agreement: NotRequired[Literal["exact", "close", "free"]]
    finite: NotRequired[bool]
    largest_delta: NotRequired[float | None]
    worst_case: NotRequired[Line]
    flips: NotRequired[Count]
    sentences: NotRequired[Count]
    words: NotRequired[Count]
    shift: NotRequired[float | None]


@open_record
class Environment(TypedDict):
    """The environment of a build: versions of the libraries."""

    versions: NotRequired[dict[Line, Line]]


StoredArtifactFacts = Annotated[ArtifactFacts, Plain]
StoredReport = Annotated[Report, Plain]
StoredEnvironment = Annotated[Environment, Plain]
