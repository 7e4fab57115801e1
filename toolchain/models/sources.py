"""Resolves revisions and fetches files, for a checkpoint to import and for the base of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.artifacts.steps import Import, Step
from toolchain.errors import CheckpointError, HubError
from toolchain.models import adapters, checkpoints
from toolchain.models.locations import FOLDER_PREFIX, Source


@dataclass(frozen=True)
class ImportFiles:
    """The checked files of a checkpoint that the toolchain imports.

    Attributes:
        folder: Folder of the checkpoint.
        base: Folder of the base if the checkpoint is an adapter, else None.
        step: The `Import` step with the exact revisions of checkpoint and base.
    """

    folder: Path
    base: Path | None
    step: Import


def pin_revisions(source: Source, request: Import, last_step: Step | None) -> Import:
    """Returns the `Import` step with the exact revisions of the checkpoint and its base.

    For a folder that no longer exists, the function keeps the revision of the last import. For a hub model, the
    function keeps the revision of the last import unless the user requests another revision.

    Args:
        source: Source of the checkpoint.
        request: The requested `Import` step.
        last_step: The step of the model's last import; None if the model is not imported yet.

    Raises:
        HubError: The hub cannot resolve a revision.
        CheckpointError: The checkpoint or its base is unusable.
    """
    last_import = last_step if isinstance(last_step, Import) else None
    is_missing = source.kind == "folder" and _is_missing_folder(source.ref)
    keeps_revision = (
        source.kind == "hub" and last_import is not None and request.revision in (None, last_import.revision)
    )
    if last_import and (is_missing or keeps_revision):
        revision = last_import.revision
    else:
        revision_name = request.revision if source.kind == "hub" or request != last_step else None
        revision = checkpoints.pin(source, revision_name).revision
    last_import = last_import if last_import and last_import.revision == revision else None
    if is_missing or (last_import and not source.base):
        return last_import or Import(revision)  # the same adapter files always name the same base
    base = _pin_base(replace(source, revision=revision), last_import.base if last_import else None)
    return Import(revision, base)


def fetch_files(source: Source, step: Import) -> ImportFiles:
    """Downloads the files of the checkpoint and of its base if necessary, and checks them."""
    folder, exact_source = checkpoints.fetch(source, step.revision if source.kind == "hub" else None)
    if step.base is None:
        return ImportFiles(folder, None, Import(exact_source.revision))
    name, _, commit = step.base.rpartition("@")
    base_source = _locate_base(source.base) if source.base else Source("hub", name)
    base, exact_base = checkpoints.fetch(base_source, commit if base_source.kind == "hub" else None, head=False)
    return ImportFiles(folder, base, Import(exact_source.revision, _exact_name(exact_base)))


def _pin_base(source: Source, last_base: str | None) -> str | None:
    """Returns an adapter's base with its exact revision, as `Import.base` stores it; None if the source is a model.

    `last_base` is the adapter's base in the model's last import.
    """
    is_folder = Path(source.base).is_absolute() or source.base.startswith(FOLDER_PREFIX)
    if last_base and (last_base.startswith(f"{source.base}@") or (is_folder and _is_missing_folder(source.base))):
        return last_base
    folder = checkpoints.adapter_folder(source)
    if folder and source.base:
        return _exact_name(checkpoints.pin(_locate_base(source.base), head=False))
    if source.base:
        hint = "Run the command without --base, or choose another name for this model: --as NAME."
        raise CheckpointError(f"{source.ref} is a model, not an adapter.", hint)
    if folder is None:
        return None
    name, revision = adapters.base(folder)
    try:
        return _exact_name(checkpoints.pin(Source("hub", name), revision, head=False))
    except HubError as error:
        raise HubError(
            f"The base of the adapter is unavailable. {error.cause}", f"{error.hint} {adapters.NAME_BASE}"
        ) from error


def _locate_base(base: str) -> Source:
    """Returns the source of an adapter's base, as `checkpoints.locate` does."""
    if base.startswith(FOLDER_PREFIX):
        raise CheckpointError(
            f"The base {base.removeprefix(FOLDER_PREFIX)} of the adapter was imported on another machine.",
            "Name its folder on this machine with --base FOLDER.",
        )
    return checkpoints.locate(base)


def _is_missing_folder(path: str) -> bool:
    """Returns whether a folder is not on this machine; a relative path means that this machine has no record of it."""
    return not Path(path).is_absolute() or not Path(path).is_dir()


def _exact_name(base: Source) -> str:
    return f"{base.ref}@{base.revision}" if base.kind == "hub" else str(base.revision)
