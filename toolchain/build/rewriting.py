"""The common work of all steps that rewrite an ONNX graph with passes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from toolchain.artifacts.steps import Step
from toolchain.artifacts.store import copy_companions
from toolchain.build.job import Job, StepResult
from toolchain.passes import facts, read, rewrite, write
from toolchain.passes.exits import ExitHead
from toolchain.passes.model_shape import context_of
from toolchain.passes.quantize_static import Activation


def rewrite_parent_graph(
    job: Job[Step],
    passes: Sequence[str],
    keep: Collection[str] = (),
    activations: Mapping[str, Activation] = MappingProxyType({}),
    tokens: Sequence[int] = (),
    exits: Sequence[ExitHead] = (),
) -> StepResult:
    """Rewrites the parent's graph, and writes it with config and tokenizer into the job's folder.

    Args:
        job: The job of the step.
        passes: Names of the passes, in order.
        keep: Names of the linear layers that stay fp32.
        activations: Fixed quantisation of the inputs of linear layers, by the name of the input.
        tokens: Token ids that stay in a trimmed vocabulary, ascending; empty without trimming.
        exits: Heads for the pass ``exits``, by ascending layer.

    Returns:
        The result. The fact ``rewrites`` of the result holds the number of rewrites that each pass made.

    Raises:
        GraphError: The parent's file is no ONNX model, or a pass cannot rewrite it.
    """
    parent = job.parent_artifact
    parent_context = context_of(parent.path)
    context = replace(
        parent_context, keep=frozenset(keep), activations=activations, tokens=tuple(tokens), exits=tuple(exits)
    )
    graph, counts = rewrite(read(parent.onnx_path), passes, context)
    write(graph, job.folder / parent.onnx_path.name)
    copy_companions(parent, job.folder)
    return StepResult.from_parent(job, {**facts(graph), "rewrites": counts})
