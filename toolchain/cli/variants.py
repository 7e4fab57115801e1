"""Variants: lists the variants of a model and their states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.options import json_option, model_options, open_workspace
from toolchain.cli.output import echo, echo_json

if TYPE_CHECKING:
    pass


@click.command()
@json_option
@model_options
def variants(model: str, exported: Path, folder_name: str | None, as_json: bool) -> None:
    """List every variant with its parent, its step and its state: built, stale, missing, tampered or unusable.

    \b
    Example:
      toolchain variants --model ./my-checkpoint
    """
    from toolchain.artifacts.steps import settings_of, step_name
    from toolchain.build.pipeline import list_states

    rows: list[dict[str, Any]] = []
    for variant, artifact, state in list_states(open_workspace(model, exported, folder_name)):
        step = artifact.manifest.step if artifact else variant.step
        rows.append(
            {
                "variant": variant.name,
                "parent": variant.parent,
                "step": step_name(step),
                "settings": settings_of(step),
                "state": state,
                "size_bytes": artifact.manifest.size_bytes if artifact else None,
                "id": artifact.manifest.id if artifact else None,
                "sealed": artifact.manifest.sealed if artifact else None,
            }
        )
    if as_json:
        echo_json(rows)
        return
    for row in rows:
        size = f"{row['size_bytes'] / 1e6:.1f} MB" if row["size_bytes"] else "–"
        origin = f"{row['step']} of {row['parent']}" if row["parent"] else str(row["step"])
        seal = ", unsealed" if row["sealed"] is False else ""
        echo(f"{row['variant']:12} {origin:24} {size:>9}  {row['state']}{seal}")
