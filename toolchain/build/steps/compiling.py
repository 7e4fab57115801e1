"""Compile: keeps a PyTorch model as it is, for a session that compiles the model when it loads it."""

from __future__ import annotations

import shutil

from toolchain.artifacts.steps import Compile
from toolchain.build.job import Job, StepResult

VERSION = 1


def keep_model(job: Job[Compile]) -> StepResult:
    """Copies every file of the parent.

    PyTorch's compiler writes no file that other machines can use, so the artifact holds the parent's weights.
    """
    parent = job.parent_artifact
    for entry in parent.manifest.files:
        shutil.copyfile(parent.path / entry.path, job.folder / entry.path)
    return StepResult.from_parent(job, parent.manifest.facts)
