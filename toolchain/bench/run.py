"""One benchmark run: the choice of cells, their artifacts, the measurement and the result file."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import toolchain
from toolchain.artifacts import store, variants
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.store import Artifact
from toolchain.bench import floors, journal, roofline, scenarios
from toolchain.bench.cells import Cell
from toolchain.bench.journal import Journal
from toolchain.bench.runner import Progress, bench
from toolchain.bench.scenarios import Protocol
from toolchain.build.pipeline import ensure, plan, skip_fresh_events
from toolchain.build.workspace import Workspace
from toolchain.data import datasets, encoding, inputs
from toolchain.data.datasets import DEFAULT_COLUMNS, Columns
from toolchain.data.inputs import Data, TrainingSource
from toolchain.errors import BenchError, DataError, ProviderError, PruningError, ToolchainError
from toolchain.models import checkpoints
from toolchain.progress import Bar, Say
from toolchain.results.facts import CellFacts, RunSettings, Size
from toolchain.results.folder import DEFAULT_FOLDER, ResultsFolder
from toolchain.results.measurements import Measurement
from toolchain.results.providers import PROVIDERS, includes, is_on_gpu
from toolchain.results.result_file import ResultFile
from toolchain.results.saving import Saver
from toolchain.system import hardware


@dataclass(frozen=True)
class Request:
    """The request for a benchmark.

    Attributes:
        names: Names of the variants to measure; empty for the default cells.
        providers: Execution providers, as `planned_pairs` takes them; empty allows all.
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


def make_protocol(quick: bool, threads: int | None, **settings: Any) -> Protocol:
    """Returns the settings of a quick or a full benchmark.

    Args:
        quick: Whether each cell takes about 20 seconds instead of about 60 seconds.
        threads: Number of threads; None for the number of physical cores.
        settings: Other settings, by the name of the attribute of `Protocol`.
    """
    return replace(scenarios.QUICK if quick else scenarios.FULL, threads=threads or hardware.cores(), **settings)


def planned_pairs(
    names: Sequence[str], providers: Sequence[str], allow_fallback: bool = False
) -> list[tuple[str, str]]:
    """Returns the (variant, provider) pairs of a request, grouped by provider.

    Args:
        names: Names of the variants to measure; empty for the default cells of the providers.
        providers: Execution providers; empty allows all. ``cuda`` also allows ``cuda-graphs``, so that the cells with
            and without CUDA graphs stand side by side.
        allow_fallback: Whether the CPU may run ONNX operators for which the execution provider has no kernel. The
            permission applies only to the ONNX variants in `names`.

    Raises:
        BenchError: A named variant runs on none of the requested providers.
        UnknownVariantError: `names` contains a name that no variant has.
    """
    allowed_providers = tuple(
        provider for provider in PROVIDERS if any(includes(chosen, provider) for chosen in providers or PROVIDERS)
    )
    if not names:
        return [(name, provider) for provider in allowed_providers for name in variants.DEFAULT_CELLS[provider]]
    pairs = []
    for variant in [variants.get(name) for name in dict.fromkeys(names)]:
        usable = set(variant.providers)
        if allow_fallback and variant.runtime == "onnx":
            usable |= set(providers)
        if not usable & set(allowed_providers):
            supported, requested = " and ".join(variant.providers), ", ".join(providers or PROVIDERS)
            fallback = (
                " With --allow-fallback, the CPU runs the operators that the provider cannot run."
                if variant.runtime == "onnx"
                else ""
            )
            raise BenchError(
                f"{variant.name} does not run on {requested}.", f"{variant.name} runs on {supported}.{fallback}"
            )
        pairs += [(variant.name, provider) for provider in allowed_providers if provider in usable]
    return sorted(pairs, key=lambda pair: allowed_providers.index(pair[1]))


def preview(workspace: Workspace, request: Request) -> list[tuple[str, str, str]]:
    """Returns (variant, provider, plan) of each planned cell, for a dry run.

    The plan is a text: the variants to build and then the word ``measure``, or the reason why the cell is unavailable.
    """
    no_cuda = hardware.missing_cuda(request.protocol.device_id)
    rows = []
    for name, provider in planned_pairs(request.names, request.providers, request.protocol.allow_fallback):
        if is_on_gpu(provider) and no_cuda:
            rows.append((name, provider, f"unavailable: {no_cuda[0]}"))
            continue
        builds = [f"{item.variant.name} ({item.reason})" for item in plan(workspace, [name], {}) if item.reason]
        rows.append((name, provider, f"build {', '.join(builds)}, then measure" if builds else "measure"))
    return rows


def measure(workspace: Workspace, request: Request, say: Say, progress: Progress) -> tuple[ResultFile, Journal]:
    """Builds the missing artifacts and measures every planned cell.

    The row of a cell that cannot be built or measured states the reason.

    Returns:
        The result file, and the journal of the run. The caller must write the result file and then call `Journal.end`.

    Raises:
        BenchError: A named variant runs on none of the requested providers, or the machine probe fails.
        UnknownVariantError: The request contains a name that no variant has.
        DataError: The data cannot be used, so no cell is measured.
        ResultFileError: The journal cannot be written, or the journal of the run to resume is missing or belongs to
            another request.
        ToolchainError: The import of the checkpoint failed, so no cell can be measured.
        KeyboardInterrupt: The user interrupts the measurement. The journal stays on disk, so that the run can resume.
    """
    data, cells = prepare_cells(workspace, request, hardware.missing_cuda(request.protocol.device_id), say)
    return measure_cells(workspace, request, cells, data, say, progress)


def measure_and_save(
    workspace: Workspace, request: Request, saver: Saver, say: Say, bar: Bar
) -> tuple[ResultFile, Path]:
    """Measures every planned cell on this machine, saves the result, and returns it with its path; see `measure`."""
    with bar("bench") as progress:
        result, run_journal = measure(workspace, request, say, progress)
    path = saver.save(result, None)
    run_journal.end()
    say(f"saved: {path}")
    return result, path


def prepare_cells(
    workspace: Workspace, request: Request, no_cuda: tuple[str, str] | None, say: Say
) -> tuple[Data, list[Cell]]:
    """Builds the missing artifacts, and returns the sentences and the planned cells.

    Args:
        workspace: The workspace of the model.
        request: The request.
        no_cuda: Why CUDA is unavailable, and how to fix this; None if CUDA is available. Without CUDA, the function
            builds no artifacts for CUDA cells.
        say: Prints a message.

    Returns:
        The sentences and the planned cells. Each cell has its artifact, or the reason why the artifact is missing.
    """
    pairs = planned_pairs(request.names, request.providers, request.protocol.allow_fallback)
    _, data = evaluation_data(workspace, request, say)
    return data, [_make_cell(workspace, name, provider, request, no_cuda, say) for name, provider in pairs]


def measure_cells(
    workspace: Workspace, request: Request, cells: Sequence[Cell], data: Data, say: Say, progress: Progress
) -> tuple[ResultFile, Journal]:
    """Measures the cells from `prepare_cells`; returns the same as `measure`.

    Raises:
        KeyboardInterrupt: The user interrupts the measurement. The journal stays on disk, so that the run can resume.
    """
    imported = workspace.load(checkpoints.ROOT_VARIANT)
    assert imported is not None
    root = imported.manifest
    encoder = encoding.Encoder.open(imported.path, [spec.name for spec in root.inputs], root.max_length)
    cells = [cell.with_own_encoder(root) for cell in cells]
    run_journal = _open_journal(workspace, request, cells, data)
    # The compression of artifacts would disturb the measurement, so it runs first.
    sizes = _gzip_sizes(workspace, cells, progress)
    has_cpu_cell = any(cell.artifact and cell.provider == "cpu" for cell in cells)
    rates = roofline.rates(workspace.cache, request.protocol.threads, progress) if has_cpu_cell else {}
    try:
        rows, run_facts = bench(cells, data, encoder, request.protocol, progress, journal=run_journal)
    except KeyboardInterrupt:
        say(f"interrupted: the results so far are in {run_journal.path}; the same command with --resume continues")
        raise
    token_counts = _count_tokens(encoder, data)
    rows = [
        replace(
            row,
            size_bytes=cast(Size, {**row.size_bytes, **sizes.get(row.artifact_id, {})}),
            facts=cast(
                CellFacts,
                {
                    **row.facts,
                    **floors.floor_fact(workspace, row, rates, _count_tokens(cell.encoder, data) or token_counts),
                },
            ),
        )
        if row.status == "ok"
        else row
        for cell, row in zip(cells, rows, strict=True)
    ]
    return make_result(rows, {**run_facts, **({"rates": rates} if rates else {})}, data, root.max_length), run_journal


def evaluation_data(workspace: Workspace, request: Request, say: Say) -> tuple[Manifest, Data]:
    """Returns the imported checkpoint's manifest and the sentences that the benchmark measures.

    If the data is the model's training data and the request names no split, the sentences are the held-out rows.

    Raises:
        DataError: The data cannot be used with this model.
    """
    root = ensure(workspace, [checkpoints.ROOT_VARIANT], {}, say)[checkpoints.ROOT_VARIANT]
    return root.manifest, _load_data(root, request, say)


def check_data(workspace: Workspace, request: Request, say: Say) -> None:
    """Checks the data of a dry run: its file and columns, and its labels if the checkpoint is already imported.

    Raises:
        DataError: The data cannot be used.
    """
    if root := workspace.load(checkpoints.ROOT_VARIANT):
        _load_data(root, request, say)
    elif request.data:
        split = None if request.split == inputs.HELD_OUT_SPLIT else request.split
        datasets.read(request.data, request.columns, split, inputs.VALIDATION_SPLIT)


def _load_data(root: Artifact, request: Request, say: Say) -> Data:
    split, training_digest = request.split, root.manifest.facts.get("trained_on")
    if request.data and not split and training_digest and _digest(request) == training_digest:
        say(f"{request.data} is the training data of the model, so only its held-out rows are measured")
        split = inputs.HELD_OUT_SPLIT
    return inputs.load(request.data, root.label_set, request.columns, split)


def _digest(request: Request) -> str:
    """Returns the digest of the request's data as training data; empty for data without a training split."""
    try:
        return TrainingSource(request.data, request.columns).digest
    except DataError:  # `inputs.load` reports unreadable data
        return ""


def _count_tokens(encoder: encoding.Encoder | None, data: Data) -> list[int]:
    """Returns the number of tokens of each sentence; empty without an `Encoder`."""
    return [len(ids) for ids in encoder.encode(data.texts)] if encoder else []


def _open_journal(workspace: Workspace, request: Request, cells: Sequence[Cell], data: Data) -> Journal:
    head = {
        "toolchain": toolchain.__version__,
        "machine": hardware.machine()["id"],
        "data": data.sha256,
        "protocol": asdict(request.protocol),
        "cells": [[cell.name, cell.artifact.manifest.id if cell.artifact else None] for cell in cells],
    }
    if request.resume:
        return Journal.resume(journal.find_newest(request.results.local, workspace.model), head)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return Journal.begin(request.results.local / f"{workspace.model}-{stamp}{journal.SUFFIX}", head)


def _gzip_sizes(workspace: Workspace, cells: Sequence[Cell], progress: Progress) -> dict[str | None, dict[str, int]]:
    """Returns the gzip size of each artifact, by the id of the artifact.

    Call this function before any timing, because compression uses many threads.
    """
    artifacts = {cell.artifact.manifest.id: cell.artifact for cell in cells if cell.artifact}
    sizes: dict[str | None, dict[str, int]] = {}
    with ThreadPoolExecutor() as pool:
        folder = workspace.cache / "gzip"
        for artifact_id, size in zip(
            artifacts, pool.map(lambda artifact: store.gzip_bytes(artifact, folder), artifacts.values()), strict=True
        ):
            sizes[artifact_id] = {"gzip": size}
            progress(len(sizes), len(artifacts), "compressing files to measure the download size")
    return sizes


def make_result(rows: Sequence[Measurement], run_facts: Mapping[str, Any], data: Data, max_length: int) -> ResultFile:
    """Returns the result file of a run that has just ended on this machine.

    Args:
        rows: Rows of all cells.
        run_facts: Facts of the run.
        data: The sentences and their labels.
        max_length: Maximum number of tokens of a sentence.
    """
    return ResultFile(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        toolchain=toolchain.__version__,
        machine=hardware.machine(),
        run=cast(RunSettings, {"id": secrets.token_hex(8), **run_facts}),
        data={
            "name": data.name,
            "rows": len(data.labels),
            "sha256": data.sha256,
            "max_length": max_length,
            "labels": list(data.labels),
            "label_names": list(data.label_set.names),
            "task": data.label_set.task,
        },
        rows=tuple(rows),
    )


def _make_cell(
    workspace: Workspace, name: str, provider: str, request: Request, no_cuda: tuple[str, str] | None, say: Say
) -> Cell:
    cell = Cell(workspace.model, name, variants.get(name).runtime, provider, None)
    if is_on_gpu(provider) and no_cuda:
        return replace(cell, status="unavailable", reason=no_cuda[0], hint=no_cuda[1])
    try:
        return replace(cell, artifact=ensure(workspace, [name], {}, skip_fresh_events(say))[name])
    except (DataError, ProviderError, PruningError) as error:
        # If this model or machine rules out a variant, the cell is `failed` if the user names the variant, and
        # `unavailable` otherwise.
        return replace(cell, status="failed" if request.names else "unavailable", reason=error.cause, hint=error.hint)
    except ToolchainError as error:
        return replace(cell, status="failed", reason=error.cause, hint=error.hint)
