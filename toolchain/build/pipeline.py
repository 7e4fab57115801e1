"""The pipeline, which builds, validates and publishes the artifacts of named variants and skips fresh artifacts.

An artifact is fresh if the current version of its step built it from the parent's current artifact. If the command
requests settings for a variant, the artifact is fresh only if it has these settings. If the command requests no
settings for a variant, the pipeline keeps the settings in the variant's manifest. For example, a command usually
requests no settings for the ancestors of a variant.
"""

from __future__ import annotations

import dataclasses
import datetime
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.artifacts import fact_summaries, publishing, store
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.steps import (
    Compile,
    Exits,
    Export,
    Import,
    Optimize,
    Prune,
    Quantize,
    Recover,
    Step,
    settings_of,
    uses_training_data,
)
from toolchain.artifacts.store import ONNX, Artifact
from toolchain.artifacts.variants import Variant
from toolchain.backends.ort import saturates
from toolchain.build import alternatives, onnx_metadata, trimming
from toolchain.build.job import Job, StepResult
from toolchain.build.steps import compiling, exits, export, importing, optimize, prune, quantize, recover
from toolchain.build.steps.validate import validation_summary
from toolchain.build.validating import validate_artifact
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.errors import ArtifactError, DataError, TamperedError, VerdictError
from toolchain.exporters import default_exporter, unmet_requirement
from toolchain.models import checkpoints, locations, sources
from toolchain.models.sources import ImportFiles
from toolchain.progress import Bar, Progress, Say, no_bar
from toolchain.system import hardware

# Step class → the function that performs the step, and the version of the function's results.
STEPS: dict[type[Step], tuple[Callable[[Job[Any]], StepResult], int]] = {
    Import: (importing.import_checkpoint, importing.VERSION),
    Prune: (prune.prune, prune.VERSION),
    Recover: (recover.recover, recover.VERSION),
    Export: (export.export, export.VERSION),
    Optimize: (optimize.optimize, optimize.VERSION),
    Quantize: (quantize.quantize, quantize.VERSION),
    Exits: (exits.add_exits, exits.VERSION),
    Compile: (compiling.keep_model, compiling.VERSION),
}


@dataclass(frozen=True)
class VariantPlan:
    """The pipeline's decision about one variant: the step, and the reason to build.

    Attributes:
        variant: The variant.
        step: The step with the settings that the build uses.
        reason: Reason to build the variant; empty if its artifact is fresh.
        artifact: The existing artifact of the variant; None if it is missing or unreadable.
        folder_error: Error that makes the variant's existing folder unusable; None if the pipeline can use or replace
            the folder.
    """

    variant: Variant
    step: Step
    reason: str
    artifact: Artifact | None
    folder_error: ArtifactError | None = None


def plan(workspace: Workspace, names: Iterable[str], requested_steps: Mapping[str, Step]) -> list[VariantPlan]:
    """Returns the plan for the named variants and their ancestors, parents first.

    Args:
        workspace: The model's workspace.
        names: Names of the variants to plan.
        requested_steps: Steps with the user's settings, by variant name.

    Raises:
        TamperedError: A manifest, or a file of a fresh artifact, changed after the build. For a variant in
            `requested_steps`, the function does not raise this error. Instead, the plan builds the variant again.
        ArtifactError: A variant's folder exists and is not an artifact.
    """
    plans = inspect_variants(workspace, names, requested_steps)
    for item in plans:
        if item.folder_error:
            raise item.folder_error
    return plans


def inspect_variants(
    workspace: Workspace, names: Iterable[str], requested_steps: Mapping[str, Step]
) -> list[VariantPlan]:
    """Returns the same plan as `plan`, but stores the error of a variant in `folder_error` instead of raising it."""
    lineage_variants = {variant.name: variant for name in names for variant in workspace.lineage(name, requested_steps)}
    plans: dict[str, VariantPlan] = {}
    for variant in lineage_variants.values():
        artifact, folder_error = None, None
        try:
            artifact = workspace.load(variant.name)
        except ArtifactError as error:
            folder_error = error
        recorded_step = artifact.manifest.step if artifact else None
        step = requested_steps.get(variant.name, recorded_step or variant.step)
        if isinstance(step, Import):
            step = sources.pin_revisions(workspace.source, step, recorded_step)
        elif uses_training_data(step) and not step.train:
            step = dataclasses.replace(step, train=workspace.train.digest)
        elif isinstance(step, Export) and isinstance(recorded_step, Export) and step.exporter is None:
            step = dataclasses.replace(step, exporter=recorded_step.exporter)
        reason = _reason_to_build(step, artifact, plans.get(variant.parent or ""))
        if reason and isinstance(step, Export):
            step = _choose_exporter(step, requested_steps.get(variant.name))
        if artifact and not reason:
            try:
                artifact.verify()
            except TamperedError as error:
                folder_error = error
        if isinstance(folder_error, TamperedError) and variant.name in requested_steps:
            reason, folder_error = "the files were modified after the build", None
        plans[variant.name] = VariantPlan(variant, step, reason, artifact, folder_error)
    return list(plans.values())


def _choose_exporter(step: Export, requested_step: Step | None) -> Export:
    """Chooses the exporter for an export, and returns the export step with this exporter in its settings.

    The function chooses the exporter that the user requests. If the user requests no exporter, the function chooses the
    exporter in the manifest. If the manifest names no installed exporter, the function chooses the default exporter.
    """
    if isinstance(requested_step, Export) and requested_step.exporter:
        return step
    if step.exporter and not unmet_requirement(step.exporter):
        return step
    return dataclasses.replace(step, exporter=default_exporter())


def _reason_to_build(step: Step, artifact: Artifact | None, parent: VariantPlan | None) -> str:
    """Returns the reason to build the variant, in a few words; empty if it is fresh."""
    if artifact is None:
        return "missing"
    manifest = artifact.manifest
    if manifest.step != step:
        old_settings, new_settings = ({**vars(each), **settings_of(each)} for each in (manifest.step, step))
        keys = [key for key in {**old_settings, **new_settings} if old_settings.get(key) != new_settings.get(key)]
        changes = ", ".join(f"{key} {old_settings.get(key)} → {new_settings.get(key)}" for key in keys)
        return "the checkpoint changed" if isinstance(step, Import) else f"other settings: {changes}"
    if manifest.step_version != STEPS[type(step)][1]:
        return "the version of its build step changed"
    if parent and parent.reason:
        return f"{parent.variant.name} is built again"
    if parent and parent.artifact and parent.artifact.manifest.id != manifest.parent_id:
        return f"{parent.variant.name} changed"
    return ""


def ensure(
    workspace: Workspace, names: Iterable[str], requested_steps: Mapping[str, Step], say: Say, bar: Bar = no_bar
) -> dict[str, Artifact]:
    """Builds the named variants and their ancestors unless they are fresh, and returns all their artifacts by name.

    Args:
        workspace: The model's workspace.
        names: Names of the variants to build.
        requested_steps: Steps with the user's settings, by variant name.
        say: Called with each event; see `progress.Say`.
        bar: Opens a progress bar for each build.

    Raises:
        VerdictError: A new artifact fails validation, so it is not published, and the previous artifact stays.
        ArtifactError: `plan` finds an unusable folder, or a parent or checkpoint changed during the build.
        DataError: A rebuild needs other training data, or another corpus, than the workspace has.
    """
    artifacts: dict[str, Artifact] = {}
    for item in plan(workspace, names, requested_steps):
        name = item.variant.name
        if item.artifact and not item.reason:
            say(FreshVariant(name))
            artifacts[name] = item.artifact
            _record_location(workspace, item.step)
            continue
        say(f"{name}: building ({item.reason})")
        start = time.monotonic()
        with bar(name) as progress:
            artifacts[name] = _build(workspace, item, artifacts, say, progress)
        manifest = artifacts[name].manifest
        verb = "replaced" if item.artifact else "built"
        say(
            f"{name}: {verb} in {time.monotonic() - start:.1f} s, {manifest.size_bytes / 1e6:.1f} MB; "
            f"valid: {validation_summary(dict(manifest.validation))}"
        )
        if summary := fact_summaries.summarize_step(item.step, manifest.facts):
            say(f"{name}: {summary}")
    return artifacts


@dataclass(frozen=True)
class FreshVariant:
    """The event that the pipeline skips a variant, because its artifact is fresh."""

    variant: str

    def __str__(self) -> str:
        return f"{self.variant}: fresh, skipped"


def skip_fresh_events(say: Say) -> Say:
    """Returns a callback that ignores `FreshVariant` events, for commands that visit the same ancestors many times."""

    def say_unless_fresh(event: object) -> None:
        if not isinstance(event, FreshVariant):
            say(event)

    return say_unless_fresh


def _build(
    workspace: Workspace, item: VariantPlan, artifacts: Mapping[str, Artifact], say: Say, progress: Progress
) -> Artifact:
    name, target = item.variant.name, workspace.path(item.variant.name)
    parent = artifacts.get(item.variant.parent or "")
    with publishing.lock(target, lambda: say(f"{name}: waiting for another run that builds this variant")):
        concurrent_artifact = workspace.load(name) if item.reason == "missing" else None
        if (
            concurrent_artifact
            and concurrent_artifact.manifest.step == item.step
            and concurrent_artifact.manifest.parent_id == (parent and parent.manifest.id)
        ):
            return concurrent_artifact  # another process built the variant while this process waited
        origin, source = _find_origin(workspace, item.step, parent)
        run, version = STEPS[type(item.step)]
        _require_same_data(workspace, item)
        resume = publishing.work_folder(target) / "training"
        with publishing.scratch_folder(target) as scratch:
            result = run(
                Job(
                    step=item.step,
                    parent=parent,
                    checkpoint=origin.folder if origin else None,
                    base=origin.base if origin else None,
                    folder=scratch,
                    root=artifacts.get(checkpoints.ROOT_VARIANT),
                    train=workspace.train,
                    cache=workspace.cache,
                    resume=resume,
                    progress=progress,
                    corpus=workspace.corpus,
                )
            )
            if parent and item.variant.runtime == "onnx":
                onnx_metadata.write_metadata(scratch / ONNX, result, version, workspace.model, name, parent.manifest.id)
            manifest = Manifest(
                model=workspace.model,
                variant=name,
                source=source,
                parent=parent.manifest.variant if parent else None,
                parent_id=parent.manifest.id if parent else None,
                step=result.step,
                step_version=version,
                files=store.list_files(scratch),
                inputs=result.inputs,
                outputs=result.outputs,
                labels=result.labels,
                max_length=result.max_length,
                facts=result.facts,
                environment={"versions": hardware.versions()},
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            )
            report = validate_artifact(workspace, item.variant, Artifact(scratch, manifest), origin)
            if not report["passed"]:
                raise _validation_error(workspace, name, manifest, parent, report)
            _require_parent_unchanged(workspace, item.step, parent)
            artifact = store.publish(scratch, target, dataclasses.replace(manifest, validation=report))
            _record_location(workspace, item.step)
        shutil.rmtree(resume, ignore_errors=True)
        return artifact


def _record_location(workspace: Workspace, step: Step) -> None:
    if isinstance(step, Import):
        locations.record(workspace.exported / workspace.model, workspace.source)


def _validation_error(
    workspace: Workspace, name: str, manifest: Manifest, parent: Artifact | None, report: Mapping[str, Any]
) -> VerdictError:
    """Returns the error for an artifact that failed validation; suggests other settings if it is quantised."""
    step, advice = manifest.step, "The previous artifact is unchanged."
    if isinstance(step, Quantize) and parent:
        layers = len(manifest.facts.get("sensitivity", [])) or None
        suggestion = alternatives.hint(workspace, manifest.variant, step, parent, report, saturates(exact=True), layers)
        advice = f"{suggestion} {advice}".strip()
    return VerdictError(f"{name} failed validation and was not published: {validation_summary(dict(report))}.", advice)


def _require_same_data(workspace: Workspace, item: VariantPlan) -> None:
    """Raises `DataError` if the step's training data or corpus differs from that of the workspace."""
    name, step = item.variant.name, item.step
    if uses_training_data(step) and step.train and step.train != workspace.train.digest:
        raise DataError(
            f"{name} must be built again. The training data of {name} is {inputs.data_name(step.train)}, but this "
            f"command uses {inputs.data_name(workspace.train.digest)}.",
            f"Run the command that builds {name}, with --train-data FILE. Omit --train-data for the embedded SST-2.",
        )
    corpus = step.trim_vocab if isinstance(step, Quantize) else None
    if corpus and corpus != trimming.TRAIN and corpus != (workspace.corpus and workspace.corpus.digest):
        raise DataError(
            f"{name} must be built again. The corpus of {name} is {inputs.data_name(corpus)}, which this command does "
            "not name.",
            f"Run the command that builds {name}, with --trim-vocab CORPUS.",
        )


def _find_origin(
    workspace: Workspace, step: Step, parent: Artifact | None
) -> tuple[ImportFiles | None, Mapping[str, Any]]:
    """Returns the files of the checkpoint, and a dictionary that says where the checkpoint comes from.

    The manifest stores this dictionary as its `source`. If the step is no import, the function returns None for the
    files, and copies the dictionary from the parent's manifest.
    """
    if isinstance(step, Import):
        source = dataclasses.replace(workspace.source, revision=step.revision)
        return sources.fetch_files(workspace.source, step), source.to_manifest()
    return None, parent.manifest.source if parent else {}


def _require_parent_unchanged(workspace: Workspace, step: Step, parent: Artifact | None) -> None:
    """Raises `ArtifactError` if the parent, or an import's checkpoint, changed since the build began."""
    if isinstance(step, Import):
        is_changed, name = sources.fetch_files(workspace.source, step).step != step, "The checkpoint"
    elif parent:
        current_parent = store.load(parent.path)
        is_changed, name = (
            current_parent is None or current_parent.manifest.id != parent.manifest.id,
            parent.manifest.variant,
        )
    else:
        return
    if is_changed:
        raise ArtifactError(f"{name} changed during a build that reads it.", "Run the command again.")


def validate_variant(workspace: Workspace, name: str, say: Say) -> dict[str, Any]:
    """Validates a variant and returns the report of `steps.validate`; first builds it if it is not fresh."""
    artifact = ensure(workspace, [name], {}, say)[name]
    origin = None
    if artifact.manifest.parent is None:
        origin, _ = _find_origin(workspace, artifact.manifest.step, None)
    return validate_artifact(workspace, workspace.lineage(name)[-1], artifact, origin)
