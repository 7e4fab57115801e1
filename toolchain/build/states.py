"""The states of a model's variants: built, missing, stale, tampered or unusable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.artifacts import variants
from toolchain.artifacts.steps import settings_of, step_name
from toolchain.build.pipeline import inspect_variants
from toolchain.build.workspace import Workspace
from toolchain.errors import TamperedError


@dataclass(frozen=True)
class VariantState:
    """The state of a variant of a model.

    Attributes:
        variant: Name of the variant.
        parent: Name of its parent; None for the imported checkpoint.
        step: Name of the step that builds it.
        settings: Settings of the step; those of the existing artifact if there is one.
        state: ``built`` or ``missing``; or ``stale``, ``tampered`` or ``unusable``, followed by the reason.
        size_bytes: Size of the artifact; None if it is missing or unreadable.
        id: Id of the artifact; None if it is missing or unreadable.
        sealed: Whether the manifest has a valid seal; None if the artifact is missing or unreadable.
    """

    variant: str
    parent: str | None
    step: str
    settings: Mapping[str, Any]
    state: str
    size_bytes: int | None
    id: str | None
    sealed: bool | None


def list_states(workspace: Workspace) -> list[VariantState]:
    """Returns the states of all default variants, all variants with a folder, and their ancestors."""
    names = [name for cells in variants.DEFAULT_CELLS.values() for name in cells]
    names += sorted(folder.name for folder in (workspace.exported / workspace.model).glob("[!.]*") if folder.is_dir())
    rows = []
    for item in inspect_variants(workspace, [name for name in names if variants.is_variant(name)], {}):
        state = "built"
        if item.folder_error:
            kind = "tampered" if isinstance(item.folder_error, TamperedError) else "unusable"
            state = f"{kind}: {item.folder_error.cause}"
        elif item.reason:
            state = item.reason if item.artifact is None else f"stale: {item.reason}"
        manifest = item.artifact.manifest if item.artifact else None
        step = manifest.step if manifest else item.variant.step
        rows.append(
            VariantState(
                variant=item.variant.name,
                parent=item.variant.parent,
                step=step_name(step),
                settings=settings_of(step),
                state=state,
                size_bytes=manifest.size_bytes if manifest else None,
                id=manifest.id if manifest else None,
                sealed=manifest.sealed if manifest else None,
            )
        )
    return rows
