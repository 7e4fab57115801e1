"""One benchmark run: the choice of cells, their artifacts, the measurement and the result file."""

from __future__ import annotations

import datetime
import secrets
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import toolchain
from toolchain.artifacts import store, variants
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.steps import PROVIDERS
from toolchain.bench import journal, roofline
from toolchain.bench.cells import Cell
from toolchain.bench.journal import Journal
from toolchain.bench.runner import Progress, bench
from toolchain.bench.scenarios import Protocol
from toolchain.build.pipeline import ensure, plan, skip_fresh_events
from toolchain.build.workspace import Workspace
from toolchain.data import encoding, inputs
from toolchain.data.datasets import DEFAULT_COLUMNS, Columns
from toolchain.data.inputs import Data, TrainingSource
from toolchain.errors import BenchError, DataError, ProviderError, PruningError, ToolchainError
from toolchain.models import checkpoints
from toolchain.progress import Say
from toolchain.results.folder import DEFAULT_FOLDER, ResultsFolder
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile
from toolchain.system import hardware


@dataclass(frozen=True)
class Request:
    """The request for a benchmark.

    Attributes:
        names: Names of variants; empty measures the default cells.
        providers: Execution providers; empty allows all.
        protocol: The settings of the benchmark.
        data: A file or a hub data set; None for the embedded SST-2.
        columns: Columns of the file or data set.
        split: Split of the data set; None for ``validation``.
        resume: Whether to resume the interrupted run of the same request.
        results: The folder of the run's journal.
    """

    names: tuple[str, ...]
    providers: tuple[str, ...]
    protocol: Protocol
    data: str | None = None
    columns: Columns = DEFAULT_COLUMNS
    split: str | None = None
    resume: bool = False
    results: ResultsFolder = DEFAULT_FOLDER


def planned(names: Sequence[str], providers: Sequence[str], allow_fallback: bool = False) -> list[tuple[str, str]]:
    """Returns the (variant, provider) pairs of a request, grouped by provider.

    Args:
        names: Names of variants; empty returns the default cells of the providers.
        providers: Execution providers; empty allows all.
        allow_fallback: Whether the named providers also take all named ONNX variants. ONNX Runtime runs operators
            without a kernel on the provider on the CPU.

    Raises:
        BenchError: A named variant runs on none of the providers.
        UnknownVariantError: There is no variant of a given name.
    """
    wanted = tuple(provider for provider in PROVIDERS if provider in (providers or PROVIDERS))
    if not names:
        return [(name, provider) for provider in wanted for name in variants.DEFAULT_CELLS[provider]]
    pairs = []
    for variant in [variants.get(name) for name in dict.fromkeys(names)]:
        serve = set(variant.providers)
        if allow_fallback and variant.runtime == "onnx":
            serve |= set(providers)
        if not serve & set(wanted):
            where, named = " and ".join(variant.providers), ", ".join(wanted)
            fallback = " With --allow-fallback it is measured as it falls back." if variant.runtime == "onnx" else ""
            raise BenchError(f"{variant.name} is not measured on {named}.", f"It is measured on {where}.{fallback}")
        pairs += [(variant.name, provider) for provider in wanted if provider in serve]
    return sorted(pairs, key=lambda pair: wanted.index(pair[1]))


def outlook(workspace: Workspace, request: Request) -> list[tuple[str, str, str]]:
    """Returns (variant, provider, next steps) of each planned cell, for a dry run.

    The text of the next steps is ``measure``, preceded by the variants to build, or the reason why the cell is
    unavailable.
    """
    no_cuda = hardware.missing_cuda(request.protocol.device_id)
    rows = []
    for name, provider in planned(request.names, request.providers, request.protocol.allow_fallback):
        if provider == "cuda" and no_cuda:
            rows.append((name, provider, f"unavailable: {no_cuda[0]}"))
            continue
        todo = [f"{p.variant.name} ({p.reason})" for p in plan(workspace, [name], {}) if p.reason]
        rows.append((name, provider, f"build {', '.join(todo)}, then measure" if todo else "measure"))
    return rows


def measure(workspace: Workspace, request: Request, say: Say, progress: Progress) -> tuple[ResultFile, Journal]:
    """Builds the missing artifacts and measures every planned cell.

    The row of a cell that cannot be built or measured states the reason.

    Returns:
        The result, and the journal. The caller must end the journal after it has written the result file.

    Raises:
        BenchError: A named variant runs on none of the providers, or the machine probe fails.
        UnknownVariantError: There is no variant of a given name.
        DataError: The data cannot be used. No cell is measured then.
        ResultFileError: The journal cannot be written, or does not belong to this request when `resume` is set.
        ToolchainError: The import of the checkpoint failed, and every cell needs it.
        KeyboardInterrupt: The user interrupts the measurement. The journal remains, so that the run can resume.
    """
    data, cells = prepared(workspace, request, hardware.missing_cuda(request.protocol.device_id), say)
    return measured(workspace, request, cells, data, say, progress)


def prepared(
    workspace: Workspace, request: Request, no_cuda: tuple[str, str] | None, say: Say
) -> tuple[Data, list[Cell]]:
    """Returns the sentences and the planned cells, after building the missing artifacts.

    Args:
        workspace: The workspace of the model.
        request: The request.
        no_cuda: Why CUDA is unavailable and how to fix this, or None. If it is unavailable, CUDA cells are not built.
        say: Prints a message.

    Returns:
        The sentences, and the cells, each with its artifact or with the reason why it has none.
    """
    pairs = planned(request.names, request.providers, request.protocol.allow_fallback)
    _, data = asked(workspace, request, say)
    return data, [_cell(workspace, name, provider, request, no_cuda, say) for name, provider in pairs]


def measured(
    workspace: Workspace, request: Request, cells: Sequence[Cell], data: Data, say: Say, progress: Progress
) -> tuple[ResultFile, Journal]:
    """Measures prepared cells; see `measure` for the result.

    Raises:
        KeyboardInterrupt: The user interrupts the measurement. The journal remains, so that the run can resume.
    """
    imported = workspace.load(checkpoints.ROOT_VARIANT)
    assert imported is not None
    root = imported.manifest
    encoder = encoding.Encoder.open(imported.path, [spec.name for spec in root.inputs], root.max_length)
    cells = [cell.reading_as(root) for cell in cells]
    kept = _journal(workspace, request, cells, data)
    # Before anything is timed.
    sizes = _gzip_sizes(workspace, cells, progress)
    on_cpu = any(cell.artifact and cell.provider == "cpu" for cell in cells)
    rates = roofline.rates(workspace.cache, request.protocol.threads, progress) if on_cpu else {}
    try:
        rows, how = bench(cells, data, encoder, request.protocol, progress, journal=kept)
    except KeyboardInterrupt:
        say(f"kept: {kept.path}; the same command with --resume goes on from there")
        raise
    lengths = _lengths(encoder, data)
    rows = [
        replace(
            row,
            size_bytes={**row.size_bytes, **sizes.get(row.artifact_id, {})},
            facts={**row.facts, **_floor(workspace, row, rates, _lengths(cell.encoder, data) or lengths)},
        )
        if row.status == "ok"
        else row
        for cell, row in zip(cells, rows, strict=True)
    ]
    return result_of(rows, {**how, **({"rates": rates} if rates else {})}, data, root.max_length), kept


def asked(workspace: Workspace, request: Request, say: Say) -> tuple[Manifest, Data]:
    """Returns the imported checkpoint's manifest and the sentences of the evaluation.

    If the data is the model's training data and the request names no split, the sentences are the held-out rows.

    Raises:
        DataError: The data cannot be used with this model.
    """
    root = ensure(workspace, [checkpoints.ROOT_VARIANT], {}, say)[checkpoints.ROOT_VARIANT]
    split, learnt = request.split, root.manifest.facts.get("trained_on")
    if request.data and not split and TrainingSource(request.data, request.columns).digest == learnt:
        say(f"{request.data}: the model was trained on it, so only the rows held out then are asked")
        split = inputs.HELD_OUT_SPLIT
    return root.manifest, inputs.load(request.data, root.label_set, request.columns, split)


def _lengths(encoder: encoding.Encoder | None, data: Data) -> list[int]:
    """Returns the number of tokens of each sentence; empty without an encoder."""
    return [len(ids) for ids in encoder.encode(data.texts)] if encoder else []


def _floor(
    workspace: Workspace, row: Measurement, rates: Mapping[str, Mapping[str, float]], lengths: Sequence[int]
) -> dict[str, Any]:
    """Returns the fact ``roofline``; empty for a row that is not on the CPU or whose work is unknown.

    The fact holds the median multiply-accumulates over sentences and the bytes of weights. With known rates, it also
    holds the median floor in milliseconds and the floor's share of the row's p50.
    """
    artifact = workspace.load(row.variant)
    if row.provider != "cpu" or artifact is None:
        return {}
    lineage = [workspace.load(variant.name) for variant in workspace.lineage(row.variant)]
    torch = [a for a in lineage if a and a.manifest.variant.parts.is_torch_fp32]
    found = roofline.work(torch[-1].path) if torch else None
    size = roofline.weight_bytes(artifact.manifest.facts)
    if found is None or size is None:
        return {}
    made = Counter[str]()
    for each in lineage:
        made.update((each.manifest.facts.get("rewrites") if each else None) or {})
    macs = [found.macs(tokens, made["first-token"] > 0, made["first-query"] > 0) for tokens in lengths]
    parts = artifact.manifest.variant.parts
    floors = [roofline.floor_ms(each, size, rates.get(parts.runtime, {}), parts.scheme) for each in macs]
    least = statistics.median(floor for floor in floors if floor is not None) if floors[0] is not None else None
    facts: dict[str, Any] = {"macs": round(statistics.median(macs)), "weight_bytes": size}
    if least is not None:
        facts |= {"floor_ms": round(least, 4), "share": round(least / row.latency_ms["p50"], 4)}
    return {"roofline": facts}


def _journal(workspace: Workspace, request: Request, cells: Sequence[Cell], data: Data) -> Journal:
    head = {
        "toolchain": toolchain.__version__,
        "machine": hardware.machine()["id"],
        "data": data.sha256,
        "protocol": asdict(request.protocol),
        "cells": [[cell.name, cell.artifact.manifest.id if cell.artifact else None] for cell in cells],
    }
    if request.resume:
        return Journal.take_up(journal.newest(request.results.local, workspace.model), head)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return Journal.begin(request.results.local / f"{workspace.model}-{stamp}{journal.SUFFIX}", head)


def _gzip_sizes(workspace: Workspace, cells: Sequence[Cell], progress: Progress) -> dict[str | None, dict[str, int]]:
    """Returns artifact id → its gzip size, computed in parallel threads; run it before any timing starts."""
    found = {cell.artifact.manifest.id: cell.artifact for cell in cells if cell.artifact}
    sizes: dict[str | None, dict[str, int]] = {}
    with ThreadPoolExecutor() as pool:
        folder = workspace.cache / "gzip"
        for artifact, size in zip(found, pool.map(lambda a: store.gzip_bytes(a, folder), found.values()), strict=True):
            sizes[artifact] = {"gzip": size}
            progress(len(sizes), len(found), "compressing, for the size of a download")
    return sizes


def result_of(rows: Sequence[Measurement], how: Mapping[str, Any], data: Data, max_length: int) -> ResultFile:
    """Returns the result file of a run that has just ended on this machine.

    Args:
        rows: Rows of all cells.
        how: Facts of the run.
        data: The sentences and their labels.
        max_length: Maximum number of tokens of a sentence.
    """
    return ResultFile(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        toolchain=toolchain.__version__,
        machine=hardware.machine(),
        run={"id": secrets.token_hex(8), **how},
        data={
            "name": data.name,
            "rows": len(data.labels),
            "sha256": data.sha256,
            "max_length": max_length,
            "labels": list(data.labels),
            "label_names": list(data.label_set.names),
            "multi_label": data.label_set.multi_label,
        },
        rows=tuple(rows),
    )


def _cell(
    workspace: Workspace, name: str, provider: str, request: Request, no_cuda: tuple[str, str] | None, say: Say
) -> Cell:
    cell = Cell(workspace.model, name, variants.get(name).runtime, provider, None)
    if provider == "cuda" and no_cuda:
        return replace(cell, status="unavailable", reason=no_cuda[0], hint=no_cuda[1])
    try:
        return replace(cell, artifact=ensure(workspace, [name], {}, skip_fresh_events(say))[name])
    except (DataError, ProviderError, PruningError) as error:
        # The model or machine may lack a default cell. This is a failure only if the request names the variant.
        return replace(cell, status="failed" if request.names else "unavailable", reason=error.cause, hint=error.hint)
    except ToolchainError as error:
        return replace(cell, status="failed", reason=error.cause, hint=error.hint)
