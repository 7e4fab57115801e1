"""What every step that rewrites a graph does around its passes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from toolchain.artifacts import copy_companions
from toolchain.jobs import Built, Job
from toolchain.passes import Context, facts, read, rewrite, write
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


def context_of(folder: Path) -> Context:
    """What an artifact's config says of its model."""
    config = _config(folder)
    return Context(config.num_attention_heads, config.hidden_size)


def layers_in(folder: Path) -> int:
    """How many layers the encoder has."""
    return int(_config(folder).num_hidden_layers)


def word_width(folder: Path) -> int:
    """The width of a row of the table of words, which ELECTRA, ALBERT and MobileBERT project to the encoder's."""
    config = _config(folder)
    return int(getattr(config, "embedding_size", config.hidden_size))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    # Architectures spell these differently in config.json; transformers knows each one's spelling.
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
