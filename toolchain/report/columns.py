"""The comparison's columns, and the sentences around them, whatever they are printed as."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from toolchain.steps.compare import Row
from toolchain.steps.prune import sentence
from toolchain.variants import unpruned

NOTHING = "–"
FIGURES = ("ok", "reported")  # the statuses of rows that have some


def _with(row: Row, value: str, note: str | None) -> str:
    """A figure and its ratio; the baseline's own row needs none."""
    return f"{value} ({note})" if note and row.measurement is not row.baseline else value


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def _accuracy(row: Row) -> str:
    score, points = row.measurement.accuracy, row.accuracy_points
    return _with(row, f"{score.value:.2%}", None if points is None else f"{points:+.2f}") if score else NOTHING


def _latency(quantile: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.measurement.latency_ms.get(quantile)
        return (
            NOTHING if value is None else _with(row, f"{value:.2f}", _times(row.speedup) if quantile == "p50" else None)
        )

    return text


def _throughput(row: Row) -> str:
    value = row.measurement.throughput_per_s
    return NOTHING if value is None else _with(row, f"{value:.0f}", _times(row.throughput_gain))


def _memory(row: Row) -> str:
    value = row.measurement.memory_bytes.get("peak")
    return NOTHING if value is None else _with(row, f"{value / 1e6:.0f}", _times(row.memory_reduction))


def _size(row: Row) -> str:
    value = row.measurement.size_bytes.get("total")
    return NOTHING if value is None else _with(row, f"{value / 1e6:.1f}", _times(row.size_reduction))


def _cell(row: Row) -> str:
    return row.measurement.cell + (" [stale]" if row.stale else "")


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("cell", _cell),
    ("accuracy (points)", _accuracy),
    ("p50 ms (faster)", _latency("p50")),
    ("p95 ms", _latency("p95")),
    ("sentences/s (faster)", _throughput),
    ("peak MB (smaller)", _memory),
    ("size MB (smaller)", _size),
)


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that have figures."""
    return [row for row in rows if row.measurement.status in FIGURES]


def columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """`COLUMNS`, and before them what differs between the rows: model, machine."""
    extra: list[tuple[str, Callable[[Row], str]]] = []
    if len({row.measurement.model for row in rows}) > 1:
        extra.append(("model", lambda row: row.measurement.model))
    if len({row.run.machine["id"] for row in rows}) > 1:
        extra.append(("machine", _machine))
    return [*extra, *COLUMNS]


def _machine(row: Row) -> str:
    machine = row.run.machine
    gpus = ", ".join(gpu["name"] for gpu in machine["gpu"])
    on_gpu = row.measurement.provider == "cuda" and gpus
    return gpus if on_gpu else f"{machine['cpu']}, {machine['cores']} cores"


def title(rows: Sequence[Row]) -> list[str]:
    """What is compared, on what, with what: a line a run."""
    lines = []
    for run in dict.fromkeys(id(row.run) for row in rows):
        row = next(row for row in rows if id(row.run) == run)
        machine, data, how = row.run.machine, row.run.data, row.run.run
        hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB"
        gpus = "".join(f", {gpu['name']}" for gpu in machine["gpu"])
        isa = ", ".join(machine["isa"]) or "no vector extensions known"
        threads = f"{how['threads']} threads, " if "threads" in how else ""
        lines.append(
            f"{row.measurement.model} on {hardware}{gpus} ({isa}); {threads}"
            f"{data['name']}, {data['rows']} sentences; {row.run.created}"
        )
    return lines


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader needs to read the figures, and every row that has none with its reason and mend."""
    baselines = list(dict.fromkeys(row.baseline.cell for row in rows if row.baseline))
    lines = []
    if baselines:
        lines.append(f"Ratios are against {' and '.join(baselines)} of the same run; above 1 is better.")
    lines += dict.fromkeys(_method(row) for row in measured(rows) if "batch_size" in row.run.run)
    lines += [_pruned(row, rows) for row in measured(rows) if "pruning" in row.measurement.facts]
    if any(row.stale for row in rows):
        lines.append("[stale]: the artifact has been built anew since; measure again with `toolchain bench`.")
    without: dict[str, dict[str, None]] = {}
    for m in [row.measurement for row in rows if row.measurement.status not in FIGURES]:
        without.setdefault(f"{m.status}: {m.reason} {m.mend}".rstrip(), {})[m.cell] = None
    return lines + [f"{', '.join(cells)} {why}" for why, cells in without.items()]


def _pruned(row: Row, rows: Sequence[Row]) -> str:
    """What was removed, and what it was predicted to bring and brought over the same variant unpruned, in one run."""
    facts, cell = row.measurement.facts["pruning"], row.measurement.cell
    same = unpruned(row.measurement.variant)
    dense = next(
        (r for r in measured(rows) if r.run is row.run and r.measurement.cell == f"{same}@{row.measurement.provider}"),
        None,
    )
    lines = [f"{cell}: {sentence(facts)}"]
    if dense:
        ratio = dense.measurement.latency_ms["p50"] / row.measurement.latency_ms["p50"]
        lines.append(f"measured {ratio:.2f}× {same} at batch 1")
    return ", ".join(lines)


def _method(row: Row) -> str:
    """How the row's latency, accuracy and throughput came about."""
    how, count = row.run.run, row.run.data["rows"]
    asked, score = how.get("single_sentences", count), row.measurement.accuracy
    batch = score.batch_size if score else 1
    single = "Latency and accuracy" if batch == 1 else "Latency"
    which = "each sentence" if asked >= count else f"{asked} of {count} sentences, each"
    text = (
        f"{single} at batch 1, {which} at its own length; sentences/s in length-sorted batches of {how['batch_size']}."
    )
    return text if batch == 1 else f"{text} Accuracy over all sentences in batches of {batch}."
