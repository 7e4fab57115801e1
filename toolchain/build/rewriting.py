"""One graph rewritten into another artifact: the work that every ONNX step does around its passes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from toolchain.artifacts.store import copy_companions
from toolchain.build.job import Built, Job
from toolchain.passes import facts, read, rewrite, write
from toolchain.passes.model_shape import context_of
from toolchain.passes.quantize_static import Activation


def rewrite_into(
    job: Job,
    passes: Sequence[str],
    keep: Collection[str] = (),
    activations: Mapping[str, Activation] = MappingProxyType({}),
    tokens: Sequence[int] = (),
) -> Built:
    """The parent's graph rewritten by `passes` into the job's folder, config and tokenizer beside it; `keep`,
    `activations` and `tokens` as a `Context` has them.

    The counts each pass made stand in the facts. Raises `GraphError` for a file that is no ONNX model.
    """
    given = job.given
    known = context_of(given.path)
    context = replace(known, keep=frozenset(keep), activations=activations, tokens=tuple(tokens))
    graph, counts = rewrite(read(given.onnx_path), passes, context)
    write(graph, job.folder / given.onnx_path.name)
    copy_companions(given, job.folder)
    return Built.like(job, {**facts(graph), "rewrites": counts})
