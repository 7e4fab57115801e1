"""The pipeline: it builds the artifacts of named variants, validates and publishes them, and skips fresh ones.

An artifact is fresh if this release's version of its step built it from the current artifact of its parent. The
variants that a command names must also have the requested settings. Their ancestors keep their recorded settings.
"""

from __future__ import annotations

import dataclasses
import datetime
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifacts import fact_summaries, publishing, store, variants
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.steps import Export, Import, Optimize, Prune, Quantize, Recover, Step, learns, settings_of
from toolchain.artifacts.store import ONNX, Artifact
from toolchain.artifacts.variants import Variant
from toolchain.backends import Place, open_session
from toolchain.backends.lora import LoraSession
from toolchain.backends.ort import saturates
from toolchain.build import alternatives, onnx_metadata, trimming
from toolchain.build.job import Built, Job
from toolchain.build.steps import export, importing, optimize, prune, quantize, recover
from toolchain.build.steps.validate import SEED, SENTENCES, sentence, validate
from toolchain.build.workspace import Workspace
from toolchain.data import encoding, inputs
from toolchain.errors import ArtifactError, DataError, TamperedError, VerdictError
from toolchain.models import checkpoints, sources
from toolchain.models.sources import ImportFiles
from toolchain.progress import Bar, Progress, Say, no_bar
from toolchain.system import hardware

# Step class → the step's function, and the version of its results.
STEPS: dict[type[Step], tuple[Callable[[Job[Any]], Built], int]] = {
    Import: (importing.import_checkpoint, importing.VERSION),
    Prune: (prune.prune, prune.VERSION),
    Recover: (recover.recover, recover.VERSION),
    Export: (export.export, export.VERSION),
    Optimize: (optimize.optimize, optimize.VERSION),
    Quantize: (quantize.quantize, quantize.VERSION),
}


@dataclass(frozen=True)
class Planned:
    """The plan for one variant.

    Attributes:
        variant: The variant.
        step: The step with its effective settings.
        reason: Why the pipeline builds the variant; empty if it is fresh.
        artifact: The existing artifact; None if there is no readable one.
        trouble: Error that makes the existing folder unusable; None otherwise.
    """

    variant: Variant
    step: Step
    reason: str
    artifact: Artifact | None
    trouble: ArtifactError | None = None


def plan(workspace: Workspace, names: Iterable[str], asked: Mapping[str, Step]) -> list[Planned]:
    """Returns the plan for the named variants and their ancestors, parents first.

    Args:
        workspace: The model's workspace.
        names: Names of the variants.
        asked: Steps with the user's settings, by variant name.

    Raises:
        TamperedError: A manifest, or a file of a fresh artifact, changed. For a variant in `asked` the
            pipeline builds it again and raises nothing.
        ArtifactError: A variant's folder exists and is not an artifact.
    """
    planned = examine(workspace, names, asked)
    for item in planned:
        if item.trouble:
            raise item.trouble
    return planned


def examine(workspace: Workspace, names: Iterable[str], asked: Mapping[str, Step]) -> list[Planned]:
    """Returns the same as `plan`, but stores the error of a variant in `trouble` instead of raising it."""
    wanted = {variant.name: variant for name in names for variant in workspace.lineage(name, asked)}
    planned: dict[str, Planned] = {}
    for variant in wanted.values():
        artifact, trouble = None, None
        try:
            artifact = workspace.load(variant.name)
        except ArtifactError as error:
            trouble = error
        recorded = artifact.manifest.step if artifact else None
        step = asked.get(variant.name, recorded or variant.step)
        if isinstance(step, Import):
            step = sources.pin_revisions(workspace.source, step, recorded)
        elif learns(step) and not step.train:
            step = dataclasses.replace(step, train=workspace.train.digest)
        reason = _reason_to_build(step, artifact, planned.get(variant.parent or ""))
        if artifact and not reason:
            try:
                artifact.verify()
            except TamperedError as error:
                trouble = error
        if isinstance(trouble, TamperedError) and variant.name in asked:
            reason, trouble = "it was changed after it was sealed", None
        planned[variant.name] = Planned(variant, step, reason, artifact, trouble)
    return list(planned.values())


def _reason_to_build(step: Step, artifact: Artifact | None, parent: Planned | None) -> str:
    """Returns the reason to build the variant, in a few words; empty if it is fresh."""
    if artifact is None:
        return "missing"
    manifest = artifact.manifest
    if manifest.step != step:
        old, new = settings_of(manifest.step), settings_of(step)
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        changed = ", ".join(f"{key} {old.get(key)} → {new.get(key)}" for key in keys)
        return "the checkpoint changed" if isinstance(step, Import) else f"other settings: {changed}"
    if manifest.step_version != STEPS[type(step)][1]:
        return "this release builds it differently"
    if parent and parent.reason:
        return f"{parent.variant.name} is built anew"
    if parent and parent.artifact and parent.artifact.manifest.id != manifest.parent_id:
        return f"{parent.variant.name} changed"
    return ""


def ensure(
    workspace: Workspace, names: Iterable[str], asked: Mapping[str, Step], say: Say, bar: Bar = no_bar
) -> dict[str, Artifact]:
    """Builds the variants that are not fresh, and returns every artifact of `plan` by name.

    Args:
        workspace: The model's workspace.
        names: Names of the variants.
        asked: Steps with the user's settings, by variant name.
        say: Called with a line of text for each event.
        bar: Opens a progress bar for each build.

    Raises:
        VerdictError: A new artifact fails validation. It is not published, and the previous artifact stays.
        ArtifactError: `plan` raises it, or a parent or checkpoint changed during the build.
        DataError: A rebuild needs other training data, or another corpus, than the workspace has.
    """
    ready: dict[str, Artifact] = {}
    for item in plan(workspace, names, asked):
        name = item.variant.name
        if item.artifact and not item.reason:
            say(Fresh(name))
            ready[name] = item.artifact
            continue
        say(f"{name}: building ({item.reason})")
        started = time.monotonic()
        with bar(name) as progress:
            ready[name] = _build(workspace, item, ready, say, progress)
        manifest = ready[name].manifest
        verb = "replaced" if item.artifact else "built"
        say(
            f"{name}: {verb} in {time.monotonic() - started:.1f} s, {manifest.size_bytes / 1e6:.1f} MB; "
            f"valid: {sentence(dict(manifest.validation))}"
        )
        if summary := _step_summary(item.step, manifest.facts):
            say(f"{name}: {summary}")
    return ready


@dataclass(frozen=True)
class Fresh:
    """The event that the pipeline skips a variant, because its artifact is fresh."""

    variant: str

    def __str__(self) -> str:
        return f"{self.variant}: fresh, skipped"


def without_fresh(say: Say) -> Say:
    """Returns `say` without `Fresh` events, for commands that visit the same ancestors many times."""

    def filtered(event: object) -> None:
        if not isinstance(event, Fresh):
            say(event)

    return filtered


def _step_summary(step: Step, facts: Mapping[str, Any]) -> str:
    """Returns a summary of pruning, recovery or vocabulary trimming; empty for other steps."""
    if isinstance(step, Prune):
        return fact_summaries.summarize_pruning(facts["pruning"])
    if isinstance(step, Recover):
        return fact_summaries.summarize_recovery(facts["recovery"])
    trimmed = isinstance(step, Quantize) and step.trim_vocab
    return fact_summaries.summarize_vocabulary(facts["vocabulary"]) if trimmed else ""


def _build(
    workspace: Workspace, item: Planned, ready: Mapping[str, Artifact], say: Say, progress: Progress
) -> Artifact:
    name, target = item.variant.name, workspace.path(item.variant.name)
    parent = ready.get(item.variant.parent or "")
    with publishing.lock(target, lambda: say(f"{name}: another run is building it, waiting")):
        lies = workspace.load(name) if item.reason == "missing" else None
        if lies and lies.manifest.step == item.step and lies.manifest.parent_id == (parent and parent.manifest.id):
            return lies  # another process built it while this process waited for the lock
        origin, source = _origin(workspace, item.step, parent)
        run, version = STEPS[type(item.step)]
        _require_same_data(workspace, item)
        resume = publishing.work_folder(target) / "training"
        with publishing.building(target) as scratch:
            built = run(
                Job(
                    step=item.step,
                    parent=parent,
                    checkpoint=origin.folder if origin else None,
                    base=origin.base if origin else None,
                    folder=scratch,
                    root=ready.get(checkpoints.ROOT_VARIANT),
                    train=workspace.train,
                    cache=workspace.cache,
                    resume=resume,
                    progress=progress,
                    corpus=workspace.corpus,
                )
            )
            if parent and item.variant.runtime == "onnx":
                onnx_metadata.stamp(scratch / ONNX, built, version, workspace.model, name, parent.manifest.id)
            manifest = Manifest(
                model=workspace.model,
                variant=name,
                source=source,
                parent=parent.manifest.variant if parent else None,
                parent_id=parent.manifest.id if parent else None,
                step=built.step,
                step_version=version,
                files=store.list_files(scratch),
                inputs=built.inputs,
                outputs=built.outputs,
                labels=built.labels,
                max_length=built.max_length,
                facts=built.facts,
                environment={"versions": hardware.versions()},
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            )
            report = _validate(workspace, item.variant, Artifact(scratch, manifest), origin)
            if not report["passed"]:
                raise _refusal(workspace, name, manifest, parent, report)
            _require_parent_unchanged(workspace, item.step, parent)
            published = store.publish(scratch, target, dataclasses.replace(manifest, validation=report))
        shutil.rmtree(resume, ignore_errors=True)
        return published


def _refusal(
    workspace: Workspace, name: str, manifest: Manifest, parent: Artifact | None, report: Mapping[str, Any]
) -> VerdictError:
    """Returns the error for an artifact that failed validation, with alternatives if it is quantised."""
    step, kept = manifest.step, "What was there before is unchanged."
    if isinstance(step, Quantize) and parent:
        layers = len(manifest.facts.get("sensitivity", [])) or None
        found = alternatives.hint(workspace, manifest.variant, step, parent, report, saturates(exact=True), layers)
        kept = f"{found} {kept}".strip()
    return VerdictError(f"{name} failed validation and was not published: {sentence(dict(report))}.", kept)


def _require_same_data(workspace: Workspace, item: Planned) -> None:
    """Raises `DataError` if the step's training data or corpus differs from those of the workspace."""
    name, step = item.variant.name, item.step
    if learns(step) and step.train and step.train != workspace.train.digest:
        raise DataError(
            f"{name} must be built again with its training data {inputs.name_in(step.train)}, and this command has "
            f"{inputs.name_in(workspace.train.digest)}.",
            "Build it by its own command with --train-data FILE, or without for the embedded sentences.",
        )
    corpus = step.trim_vocab if isinstance(step, Quantize) else None
    if corpus and corpus != trimming.TRAIN and corpus != (workspace.corpus and workspace.corpus.digest):
        raise DataError(
            f"{name} must be built again with its corpus {inputs.name_in(corpus)}, which this command does not name.",
            "Build it by its own command with --trim-vocab CORPUS.",
        )


def _origin(workspace: Workspace, step: Step, parent: Artifact | None) -> tuple[ImportFiles | None, Mapping[str, Any]]:
    """Returns the checkpoint's files for an import, else None, and the source in the form of a manifest."""
    if isinstance(step, Import):
        source = dataclasses.replace(workspace.source, revision=step.revision)
        return sources.fetch_files(workspace.source, step), source.to_manifest()
    return None, parent.manifest.source if parent else {}


def _require_parent_unchanged(workspace: Workspace, step: Step, parent: Artifact | None) -> None:
    """Raises `ArtifactError` if the parent, or an import's checkpoint, changed since the build began."""
    if isinstance(step, Import):
        changed, name = sources.fetch_files(workspace.source, step).step != step, "The checkpoint"
    elif parent:
        now = store.load(parent.path)
        changed, name = now is None or now.manifest.id != parent.manifest.id, parent.manifest.variant
    else:
        return
    if changed:
        raise ArtifactError(f"{name} was replaced while something was built from it.", "Run the command again.")


def validate_variant(workspace: Workspace, name: str, say: Say) -> dict[str, Any]:
    """Validates a variant and returns the report of `steps.validate`; first builds it if it is not fresh."""
    artifact = ensure(workspace, [name], {}, say)[name]
    origin = None
    if artifact.manifest.parent is None:
        origin, _ = _origin(workspace, artifact.manifest.step, None)
    return _validate(workspace, workspace.lineage(name)[-1], artifact, origin)


def _validate(workspace: Workspace, variant: Variant, artifact: Artifact, origin: ImportFiles | None) -> dict[str, Any]:
    """Compares an artifact with its nearest PyTorch ancestor, or an import with its checkpoint."""
    reference = origin.folder if origin else _torch_ancestor(workspace, variant)
    manifest, place = artifact.manifest, Place("cpu", hardware.cores())
    names = [spec.name for spec in manifest.inputs]
    encoder = encoding.Encoder.open(artifact.path, names, manifest.max_length)
    data, other = inputs.embedded(), None
    if getattr(manifest.step, "trim_vocab", None):
        # Sentences of another domain contain tokens that trimming removed.
        data = trimming.judged_by(workspace.train, artifact)
        other = encoding.Encoder.open(reference, names, manifest.max_length)
    sentences = data.sample(SENTENCES, SEED)
    contender = open_session(artifact.path, variant.runtime, place)
    adapted = origin.base if origin else None
    original = LoraSession(reference, adapted, place) if adapted else open_session(reference, "torch", place)
    try:
        return validate(contender, original, encoder, sentences, variant.agreement, other)
    finally:
        contender.close()
        original.close()


def _torch_ancestor(workspace: Workspace, variant: Variant) -> Path:
    """Returns the folder of the nearest PyTorch ancestor."""
    ancestors = workspace.lineage(variant.parent) if variant.parent else []
    return workspace.path([ancestor.name for ancestor in ancestors if ancestor.runtime == "torch"][-1])


def states(workspace: Workspace) -> list[tuple[Variant, Artifact | None, str]]:
    """Returns the state of all default variants, all variants with a folder, and their ancestors.

    Returns:
        Each variant with its artifact, None if there is none, and its state. The state is ``built`` or ``missing``, or
        begins with ``stale``, ``tampered`` or ``unusable``, followed by the reason.
    """
    names = [name for cells in variants.DEFAULT_CELLS.values() for name in cells]
    names += sorted(folder.name for folder in (workspace.exported / workspace.model).glob("[!.]*") if folder.is_dir())
    found = []
    for item in examine(workspace, [name for name in names if variants.is_variant(name)], {}):
        state = "built"
        if item.trouble:
            state = f"{'tampered' if isinstance(item.trouble, TamperedError) else 'unusable'}: {item.trouble.cause}"
        elif item.reason:
            state = item.reason if item.artifact is None else f"stale: {item.reason}"
        found.append((item.variant, item.artifact, state))
    return found
