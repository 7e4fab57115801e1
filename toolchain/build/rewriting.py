"""The common work of all steps that rewrite an ONNX graph with passes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from toolchain.artifacts.steps import Step
from toolchain.artifacts.store import copy_companions
from toolchain.build.job import Built, Job
from toolchain.passes import facts, read, rewrite, write
from toolchain.passes.model_shape import context_of
from toolchain.passes.quantize_static import Activation


def rewrite_into(
    job: Job[Step],
    passes: Sequence[str],
    keep: Collection[str] = (),
    activations: Mapping[str, Activation] = MappingProxyType({}),
    tokens: Sequence[int] = (),
) -> Built:
    """Rewrites the parent's graph, and writes it with config and tokenizer into the job's folder.

    Args:
        job: The job of the step.
        passes: Names of the passes, in order.
        keep: As in `Context`.
        activations: As in `Context`.
        tokens: As in `Context`.

    Returns:
        The result. Its fact ``rewrites`` holds the number of times each pass applied.

    Raises:
        GraphError: The parent's file is no ONNX model, or a pass cannot rewrite it.
    """
    given = job.given
    known = context_of(given.path)
    context = replace(known, keep=frozenset(keep), activations=activations, tokens=tuple(tokens))
    graph, counts = rewrite(read(given.onnx_path), passes, context)
    write(graph, job.folder / given.onnx_path.name)
    copy_companions(given, job.folder)
    return Built.like(job, {**facts(graph), "rewrites": counts})
