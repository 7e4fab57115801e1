"""Builds variants for the commands export, prune, quantize and exits, and prints plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.cli.output import echo

if TYPE_CHECKING:
    from toolchain.artifacts.steps import Step
    from toolchain.build.pipeline import VariantPlan
    from toolchain.build.workspace import Workspace


def build(workspace: Workspace, requested_steps: dict[str, Step], dry_run: bool) -> None:
    """Builds variants and prints their folders; for a dry run, prints the plan and builds nothing.

    Args:
        workspace: The model's workspace.
        requested_steps: Steps with the user's settings, by variant name.
        dry_run: Whether to only print the plan.
    """
    from toolchain.build.pipeline import ensure, plan
    from toolchain.cli.progress import bar, say

    if dry_run:
        for item in plan(workspace, requested_steps, requested_steps):
            echo(plan_line(item))
        return
    artifacts = ensure(workspace, requested_steps, requested_steps, say, bar)
    for name in requested_steps:
        echo(artifacts[name].path)


def plan_line(item: VariantPlan) -> str:
    """Returns the line of a dry run about one variant."""
    from toolchain.artifacts.steps import settings_of

    settings = ", ".join(f"{key}={value}" for key, value in settings_of(item.step).items())
    return f"{item.variant.name}: {f'build ({item.reason})' if item.reason else 'skip (fresh)'}; {settings}"
