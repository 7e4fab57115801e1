"""Variants: lists the variants of a model and their states."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from toolchain.cli.options import json_option, model_options, open_workspace
from toolchain.cli.output import echo, echo_json


@click.command()
@json_option
@model_options
def variants(model: str, exported: Path, folder_name: str | None, as_json: bool) -> None:
    """List every variant with its parent, its step and its state: built, stale, missing, tampered or unusable.

    \b
    Example:
      toolchain variants --model ./my-checkpoint
    """
    from toolchain.build.states import list_states

    states = list_states(open_workspace(model, exported, folder_name))
    if as_json:
        echo_json([asdict(state) for state in states])
        return
    for state in states:
        size = f"{state.size_bytes / 1e6:.1f} MB" if state.size_bytes else "–"
        origin = f"{state.step} of {state.parent}" if state.parent else state.step
        seal = ", unsealed" if state.sealed is False else ""
        echo(f"{state.variant:12} {origin:24} {size:>9}  {state.state}{seal}")
