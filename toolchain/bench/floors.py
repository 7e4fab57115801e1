"""The floor of a row: its lower bound on the time of a sentence, from its artifact's lineage and its sentences."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.artifacts.store import Artifact
from toolchain.bench import roofline
from toolchain.bench.roofline import Work
from toolchain.build.workspace import Workspace
from toolchain.results.measurements import Measurement


def floor_fact(
    workspace: Workspace, row: Measurement, rates: Mapping[str, Mapping[str, float]], token_counts: Sequence[int]
) -> dict[str, Any]:
    """Returns the fact ``roofline``; empty for a GPU row, or if the model's parameter counts are unknown.

    The fact ``roofline`` holds the median number of multiply-accumulates per sentence and the bytes of weights. If the
    runtime's rates are known, it also holds the floor (the median lower bound on the time of a sentence, in
    milliseconds), and the floor divided by the row's p50.

    In a variant with exits, the work of a sentence ends at the exit that it uses, and only the sentences whose exit is
    known count. The floor of a sentence that uses an exit is its arithmetic time: the weights of the first layers may
    stay in the processor's caches, which are faster than the measured rate of reading weights.

    Args:
        workspace: The folder of the artifacts.
        row: The row.
        rates: Rates of each runtime, as `roofline.rates` returns them.
        token_counts: Number of tokens of each sentence.
    """
    artifact = workspace.load(row.variant)
    if row.provider != "cpu" or artifact is None:
        return {}
    lineage = [workspace.load(variant.name) for variant in workspace.lineage(row.variant)]
    torch = [ancestor for ancestor in lineage if ancestor and ancestor.manifest.variant.parts.is_torch_fp32]
    model_work = roofline.read_work(torch[-1].path) if torch else None
    bytes_read = roofline.weight_bytes(artifact.manifest.facts)
    if model_work is None or bytes_read is None:
        return {}
    works = _sentence_works(model_work, lineage, row, token_counts, bytes_read)
    if not works:
        return {}
    parts = artifact.manifest.variant.parts
    runtime_rates = rates.get(parts.runtime.split("-")[0], {})
    facts: dict[str, Any] = {"macs": round(statistics.median(macs for macs, _ in works)), "weight_bytes": bytes_read}
    floors = [roofline.floor_ms(macs, read, runtime_rates, parts.scheme) for macs, read in works]
    known_floors = [ms for ms in floors if ms is not None]
    if known_floors:
        median_floor = statistics.median(known_floors)
        facts |= {"floor_ms": round(median_floor, 4), "share": round(median_floor / row.latency_ms["p50"], 4)}
    return {"roofline": facts}


def _sentence_works(
    model_work: Work, lineage: Sequence[Artifact | None], row: Measurement, token_counts: Sequence[int], bytes_read: int
) -> list[tuple[int, int]]:
    """Returns the multiply-accumulates and the bytes of weights that bound each sentence's time; empty if unknown."""
    rewrites = Counter[str]()
    for ancestor in lineage:
        rewrites.update((ancestor.manifest.facts.get("rewrites") if ancestor else None) or {})

    def full_macs(tokens: int) -> int:
        return model_work.macs(tokens, rewrites["first-token"] > 0, rewrites["first-query"] > 0)

    if "exits" not in row.facts:
        return [(full_macs(tokens), bytes_read) for tokens in token_counts]
    layers = row.facts["exits"]["layers"]
    works = []
    for tokens, passed in zip(token_counts, row.exits, strict=False):
        if passed is not None and passed < len(layers):
            macs = model_work.macs_before_exit(layers[passed], tokens)
            if macs is None:
                return []
            works.append((macs, 0))
        elif passed is not None:
            works.append((full_macs(tokens), bytes_read))
    return works
