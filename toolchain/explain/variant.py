"""The explanation of a built variant: its origin, where its bytes and its time go, and its relatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.artifacts import variants
from toolchain.artifacts.store import Artifact
from toolchain.bench import operators
from toolchain.build.workspace import Workspace
from toolchain.data.inputs import Data
from toolchain.errors import ArtifactError, TamperedError
from toolchain.explain.origin import Ancestor, trace_lineage
from toolchain.explain.relatives import MeasuredRun, Relative, find_relatives, find_runs
from toolchain.progress import Progress, Say
from toolchain.results.folder import ResultsFolder
from toolchain.system.files import temporary_folder

PROFILE_TEXTS, PROFILE_ROUNDS, SEED = 200, 3, 20


@dataclass(frozen=True)
class Bytes:
    """The bytes of an artifact.

    Attributes:
        by_part: Bytes of the weights by part of the model, such as ``embeddings``; may be empty.
        by_dtype: Bytes of the weights by element type, such as ``int8``; may be empty.
        files: Bytes of each file.
    """

    by_part: Mapping[str, int]
    by_dtype: Mapping[str, int]
    files: Mapping[str, int]


@dataclass(frozen=True)
class Time:
    """The time of a variant from text to label: the median over the rounds of the mean over the texts.

    Attributes:
        data: Name of the data.
        texts: Number of texts.
        rounds: Number of rounds.
        threads: Number of threads.
        tokenizing_us: Microseconds of tokenising a text.
        graph_us: Microseconds of the graph for a text.
        operator_shares: Share of each kind of operator in the time of all operators, the largest first.
    """

    data: str
    texts: int
    rounds: int
    threads: int
    tokenizing_us: float
    graph_us: float
    operator_shares: Mapping[str, float]


@dataclass(frozen=True)
class Explanation:
    """The explanation of a built variant.

    Attributes:
        model: Name of the model.
        variant: Name of the variant.
        id: Id of the artifact.
        sealed: Whether the manifest has a seal.
        created: UTC time of the build, in ISO 8601.
        size_bytes: Size of all files.
        providers: Execution providers that run the variant.
        lineage: Its ancestors, oldest first, and last the variant.
        bytes: Where its bytes go.
        time: Where its time goes; None without a profile.
        relatives: Variants to compare it with.
        results: Result files that measured it.
    """

    model: str
    variant: str
    id: str
    sealed: bool
    created: str
    size_bytes: int
    providers: tuple[str, ...]
    lineage: tuple[Ancestor, ...]
    bytes: Bytes
    time: Time | None
    relatives: tuple[Relative, ...]
    results: tuple[MeasuredRun, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the explanation as JSON values."""
        return dataclasses.asdict(self)


def load_built(workspace: Workspace, name: str) -> Artifact:
    """Returns the artifact of a variant, and builds nothing.

    Raises:
        UnknownVariantError: No variant has this name.
        ArtifactError: The variant is not built, or its manifest is unreadable.
        TamperedError: A file of the artifact, or its manifest, was modified.
    """
    variants.get(name)
    artifact = workspace.load(name)
    if artifact is None:
        label = name.partition("+")[2]
        hint = f"Build it with --name {label}." if label else f"Build it: `toolchain validate {name}`."
        raise ArtifactError(f"{name} is not built for the model {workspace.model}.", hint)
    try:
        artifact.verify()
    except TamperedError as error:
        raise TamperedError(error.cause, f"Delete the folder {artifact.path}, and build the variant again.") from error
    return artifact


def explain_artifact(
    workspace: Workspace, artifact: Artifact, results: ResultsFolder, time: Time | None, say: Say
) -> Explanation:
    """Returns the explanation of an artifact.

    Args:
        workspace: The model's workspace.
        artifact: The artifact, from `load_built`.
        results: Folder of the result files.
        time: The artifact's time, from `profile`; None for an explanation without it.
        say: Called with the reason if a result file is unreadable.

    Raises:
        ArtifactError: The manifest of an ancestor is unreadable, or was modified.
    """
    manifest = artifact.manifest
    relatives = find_relatives(workspace, artifact)
    return Explanation(
        model=workspace.model,
        variant=manifest.variant,
        id=manifest.id,
        sealed=manifest.sealed,
        created=manifest.created,
        size_bytes=manifest.size_bytes,
        providers=variants.get(manifest.variant).providers,
        lineage=tuple(trace_lineage(workspace, artifact)),
        bytes=Bytes(
            manifest.facts.get("bytes_by_part", {}),
            manifest.facts.get("bytes_by_dtype", {}),
            {entry.path: entry.bytes for entry in manifest.files},
        ),
        time=time,
        relatives=tuple(relatives),
        results=tuple(find_runs(results, artifact, relatives, say)),
    )


def profile(artifact: Artifact, read_data: Callable[[], Data], progress: Progress) -> Time:
    """Measures where the time of an ONNX variant goes, on the CPU with one thread, for single texts.

    Args:
        artifact: The artifact.
        read_data: Returns the texts. If there are more than `PROFILE_TEXTS`, a random sample of them is measured.
        progress: Called with the number of finished rounds.

    Raises:
        SettingsError: ONNX Runtime does not run the variant on the CPU.
        DataError: The data is unusable.
        GraphError: ONNX Runtime cannot load the graph.
    """
    operators.require_profilable(artifact.manifest.variant)
    data = read_data()
    texts = data.sample(PROFILE_TEXTS, SEED)
    rounds: list[operators.Profile] = []
    with temporary_folder() as scratch:
        profiler = operators.OperatorProfiler(artifact, scratch)
        for number in range(PROFILE_ROUNDS):
            progress(number, PROFILE_ROUNDS, "operators")
            rounds.append(profiler.measure(texts))
    profile = operators.median_profile(rounds)
    shares = {name: round(share, 4) for name, share in profile.shares.items()}
    return Time(data.name, len(texts), len(rounds), operators.THREADS, profile.tokenizing_us, profile.graph_us, shares)
