"""One benchmark run: which cells, their artifacts, the measurement, and the result file it is kept in."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import toolchain
from toolchain import artifacts, checkpoints, hardware, inputs, variants
from toolchain.errors import BenchError, DataError, ProviderError, PruningError, ResultFileError, ToolchainError
from toolchain.inputs import Data
from toolchain.measurements import Measurement, ResultFile
from toolchain.pipeline import Say, Workspace, ensure, plan
from toolchain.steps.bench import Cell, Progress, Protocol, bench

RESULTS = Path("benchmarks/results")
LOCAL = RESULTS / "local"


@dataclass(frozen=True)
class Request:
    """What to measure: `names` and `providers` (empty: every default cell), on which data, how."""

    names: tuple[str, ...]
    providers: tuple[str, ...]
    protocol: Protocol
    data: str | None = None
    text_column: str | None = None
    label_column: str = "label"


def planned(names: Sequence[str], providers: Sequence[str], allow_fallback: bool = False) -> list[tuple[str, str]]:
    """The (variant, provider) pairs asked for; `BenchError` for a pair that cannot exist or a request for none.

    Without names, the default cells of the providers. ONNX Runtime falls back to the CPU for what another provider has
    no kernel for: with `allow_fallback`, a provider that was named takes every ONNX variant.
    """
    wanted = tuple(provider for provider in variants.PROVIDERS if provider in (providers or variants.PROVIDERS))
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
    """For a dry run: (variant, provider, what stands between it and its measurement), in order."""
    no_cuda = hardware.missing_cuda(request.protocol.device_id)
    rows = []
    for name, provider in planned(request.names, request.providers, request.protocol.allow_fallback):
        if provider == "cuda" and no_cuda:
            rows.append((name, provider, f"unavailable: {no_cuda[0]}"))
            continue
        todo = [f"{p.variant.name} ({p.reason})" for p in plan(workspace, [name], {}) if p.reason]
        rows.append((name, provider, f"build {', '.join(todo)}, then measure" if todo else "measure"))
    return rows


def measure(workspace: Workspace, request: Request, say: Say, progress: Progress) -> ResultFile:
    """Builds what is missing and measures every planned cell; one that cannot be is a row that says why.

    Raises `DataError` before anything is measured, and what the import raises, since nothing goes without it.
    """
    pairs = planned(request.names, request.providers, request.protocol.allow_fallback)
    root = ensure(workspace, [checkpoints.ROOT_VARIANT], {}, say)[checkpoints.ROOT_VARIANT].manifest
    data = inputs.load(request.data, root.labels, request.text_column, request.label_column)
    cells = [_cell(workspace, name, provider, request, say) for name, provider in pairs]
    names = [spec.name for spec in root.inputs]
    encoder = inputs.Encoder.open(workspace.path(checkpoints.ROOT_VARIANT), names, root.max_length)
    rows, how = bench(cells, data, encoder, request.protocol, progress)
    return result_of(rows, how, data, root.max_length)


def result_of(rows: Sequence[Measurement], how: Mapping[str, Any], data: Data, max_length: int) -> ResultFile:
    """What `bench` gave as the run of this machine, now."""
    return ResultFile(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        toolchain=toolchain.__version__,
        machine=hardware.machine(),
        run={"id": secrets.token_hex(8), **how},
        data={"name": data.name, "rows": len(data.labels), "sha256": data.sha256, "max_length": max_length},
        rows=tuple(rows),
    )


def _cell(workspace: Workspace, name: str, provider: str, request: Request, say: Say) -> Cell:
    cell = Cell(workspace.model, name, variants.get(name).runtime, provider, None)
    no_cuda = hardware.missing_cuda(request.protocol.device_id) if provider == "cuda" else None
    if no_cuda:
        return replace(cell, status="unavailable", reason=no_cuda[0], mend=no_cuda[1])
    try:
        return replace(cell, artifact=ensure(workspace, [name], {}, _only_news(say))[name])
    except (DataError, ProviderError, PruningError) as error:
        # A default cell that this model or machine does not have: nobody asked for it by name.
        return replace(cell, status="failed" if request.names else "unavailable", reason=error.cause, mend=error.mend)
    except ToolchainError as error:
        return replace(cell, status="failed", reason=error.cause, mend=error.mend)


def _only_news(say: Say) -> Say:
    """Ancestors come up once for every cell: what is fresh needs no line here."""

    def filtered(line: str) -> None:
        if not line.endswith("skipped"):
            say(line)

    return filtered


def judge(result: ResultFile) -> None:
    """Raises `BenchError` where a planned cell failed, or nothing could be measured at all."""
    failed = [row for row in result.rows if row.status == "failed"]
    if failed:
        what = "; ".join(f"{row.cell}: {row.reason}" for row in failed)
        raise BenchError(f"{len(failed)} of {len(result.rows)} cells failed: {what}", failed[0].mend)
    if not any(row.status == "ok" for row in result.rows):
        raise BenchError(f"Nothing could be measured: {result.rows[0].reason}", result.rows[0].mend)


def save(result: ResultFile, model: str, name: str | None) -> Path:
    """Writes the run under `benchmarks/results/`: local to this machine, or under a `name` to be committed."""
    stamp = result.created.replace(":", "").replace("-", "").removesuffix("+0000")
    path = RESULTS / f"{name}.json" if name else LOCAL / f"{model}-{stamp}Z.json"
    result.write(path)
    return path


def newest(model: str, say: Say) -> ResultFile:
    """The model's newest run among all result files here; `BenchError` where there is none."""
    mine = []
    for path in [*sorted(RESULTS.glob("*.json")), *sorted(LOCAL.glob("*.json"))]:
        try:
            run = ResultFile.read(path)
        except ResultFileError as error:
            say(f"passed over: {error}")  # it may be another model's; what is shown names its run
            continue
        if any(row.model == model for row in run.rows):
            mine.append(run)
    if not mine:
        raise BenchError(f"There is no result of {model} under {RESULTS}.", "`toolchain bench` measures it.")
    return max(mine, key=lambda run: run.created)


def current_ids(exported: Path, rows: Sequence[Any]) -> dict[tuple[str, str], str]:
    """(model, variant) → id of the artifact that lies under `exported` now, for the rows' models."""
    found = {}
    for model, variant in {(row.model, row.variant) for row in rows}:
        folder = exported / model / variant
        try:
            artifact = artifacts.load(folder)
        except ToolchainError:
            continue
        if artifact:
            found[model, variant] = artifact.manifest.id
    return found
