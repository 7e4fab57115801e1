"""What every step that rewrites a graph does around its passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolchain.artifacts import copy_companions
from toolchain.jobs import Built, Job
from toolchain.passes import Attention, facts, read, rewrite, write


def rewrite_into(job: Job, passes: Sequence[str]) -> Built:
    """The parent's graph rewritten by `passes` into the job's folder, config and tokenizer beside it.

    The counts each pass made stand in the facts. Raises `GraphError` for a file that is no ONNX model.
    """
    given = job.given
    graph, counts = rewrite(read(given.onnx_path), passes, _attention(given.path))
    write(graph, job.folder / given.onnx_path.name)
    copy_companions(given, job.folder)
    return Built.like(job, {**facts(graph), "rewrites": counts})


def _attention(folder: Path) -> Attention:
    from transformers import AutoConfig

    # Architectures spell these differently in config.json; transformers knows each one's spelling.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Attention(config.num_attention_heads, config.hidden_size)
