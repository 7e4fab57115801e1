"""Finds the exact files of an import: resolves its revision, and fetches the checkpoint and the base of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.artifacts.variants import Import, Step
from toolchain.errors import CheckpointError, HubError
from toolchain.models import adapters, checkpoints
from toolchain.models.checkpoints import Source


@dataclass(frozen=True)
class Origin:
    """The checked files of an import.

    Attributes:
        folder: Folder of the checkpoint.
        base: Folder of the base if the checkpoint is an adapter, else None.
        step: The import with the exact revisions of both.
    """

    folder: Path
    base: Path | None
    step: Import


def pinned(source: Source, asked: Import, recorded: Step | None) -> Import:
    """Returns the import with exact revisions of the checkpoint and its base.

    The recorded revision stays valid for a folder that no longer exists. It also stays valid for a hub model, unless
    the user requests another revision.

    Args:
        source: Source of the checkpoint.
        asked: The requested import.
        recorded: The step of the last import; None if there was none.

    Raises:
        HubError: The hub cannot resolve a revision.
        CheckpointError: The checkpoint or its base is unusable.
    """
    known = recorded if isinstance(recorded, Import) else None
    gone = source.kind == "folder" and not Path(source.ref).is_dir()
    kept = source.kind == "hub" and known is not None and asked.revision in (None, known.revision)
    if known and (gone or kept):
        revision = known.revision
    else:
        named = asked.revision if source.kind == "hub" or asked != recorded else None
        revision = checkpoints.pin(source, named).revision
    known = known if known and known.revision == revision else None
    if gone or (known and not source.base):
        return known or Import(revision)  # the same adapter files always name the same base
    base = _base(replace(source, revision=revision), known.base if known else None)
    return Import(revision, base)


def fetched(source: Source, step: Import) -> Origin:
    """Downloads the files of an import if necessary, and checks them."""
    folder, found = checkpoints.fetch(source, step.revision if source.kind == "hub" else None)
    if step.base is None:
        return Origin(folder, None, Import(found.revision))
    name, _, commit = step.base.rpartition("@")
    origin = checkpoints.locate(source.base) if source.base else Source("hub", name)
    base, exact = checkpoints.fetch(origin, commit if origin.kind == "hub" else None, head=False)
    return Origin(folder, base, Import(found.revision, _said(exact)))


def _base(source: Source, known: str | None) -> str | None:
    """Returns the exact base of an adapter, as in `Import`, or None for a model; `known` is the recorded base."""
    if known and (known.startswith(f"{source.base}@") or _gone(source.base)):
        return known
    folder = checkpoints.adapter(source)
    if folder and source.base:
        return _said(checkpoints.pin(checkpoints.locate(source.base), head=False))
    if source.base:
        hint = "Leave --base out, or give this model a name of its own: --as NAME."
        raise CheckpointError(f"{source.ref} is a whole model and no adapter.", hint)
    if folder is None:
        return None
    name, revision = adapters.base(folder)
    try:
        return _said(checkpoints.pin(Source("hub", name), revision, head=False))
    except HubError as error:
        raise HubError(f"The adapter's base: {error.cause}", f"{error.hint} {adapters.NAME_BASE}") from error


def _gone(base: str) -> bool:
    return Path(base).is_absolute() and not Path(base).is_dir()


def _said(base: Source) -> str:
    return f"{base.ref}@{base.revision}" if base.kind == "hub" else str(base.revision)
