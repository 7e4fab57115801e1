"""Optimize: rewrites the exported graph for speed on one execution provider; fp32 logits change only by rounding."""

from __future__ import annotations

from toolchain.artifacts.steps import Optimize
from toolchain.build.job import Job, StepResult
from toolchain.build.rewriting import rewrite_parent_graph

VERSION = 3


def optimize(job: Job[Optimize]) -> StepResult:
    """Applies the step's passes to the parent's graph; see `rewrite_parent_graph`."""
    return rewrite_parent_graph(job, job.step.passes)
