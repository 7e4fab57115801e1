"""Optimize: rewrites the exported graph for speed on one execution provider; fp32 logits change only by rounding."""

from __future__ import annotations

from toolchain.artifacts.steps import Optimize
from toolchain.build.job import Built, Job
from toolchain.build.rewriting import rewrite_into

VERSION = 3


def optimize(job: Job[Optimize]) -> Built:
    """Applies the step's passes to the parent's graph; see `rewrite_into`."""
    return rewrite_into(job, job.step.passes)
