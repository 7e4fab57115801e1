"""Quantize: fewer bits in weights and arithmetic."""

from __future__ import annotations

from toolchain.errors import GraphError
from toolchain.jobs import Built, Job
from toolchain.passes.apply import rewrite_into
from toolchain.variants import Quantize

VERSION = 1

# (backend, scheme) → the passes that make it, and the one that must have found something.
SCHEMES = {("ort", "dynamic"): (("quantize-linear", "quantize-embedding"), "quantize-linear")}


def quantize(job: Job) -> Built:
    """Applies the passes of the step's scheme; raises `GraphError` where the graph has nothing to quantise."""
    assert isinstance(job.step, Quantize)
    passes, needed = SCHEMES[job.step.backend, job.step.scheme]
    built = rewrite_into(job, passes)
    if not built.facts["rewrites"][needed]:
        raise GraphError(
            f"{job.given.manifest.variant} has no linear layer left to quantise.",
            "Quantise the variant it was made from.",
        )
    return built
