"""The comparison's columns, and the sentences around them, whatever they are printed as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from toolchain.artifacts.names import unpruned
from toolchain.build import trimming
from toolchain.build.steps.prune import sentence
from toolchain.compare.rows import Row
from toolchain.errors import UnknownVariantError
from toolchain.results.statistics import Ratio

NOTHING = "–"
FRONT = "◆"
FIGURES = ("ok", "reported")  # the statuses of rows that have some


def _with(row: Row, value: str, note: str | None) -> str:
    """A figure and its ratio; the baseline's own row needs none."""
    return f"{value} ({note})" if note and row.measurement is not row.baseline else value


def _times(ratio: Ratio | float | None) -> str | None:
    """A ratio to read; one that may as well be 1 is called so."""
    if isinstance(ratio, Ratio):
        if ratio.differs is False:
            return "no difference"
        ratio = ratio.value
    return None if ratio is None else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def _accuracy(row: Row) -> str:
    score, points = row.measurement.accuracy, row.accuracy_points
    return _with(row, f"{score.value:.2%}", None if points is None else f"{points:+.2f}") if score else NOTHING


def _p50(row: Row) -> str:
    """The median; the mean, and called so, where somebody else published no more."""
    figures = row.measurement.latency_ms
    if "p50" in figures:
        return _with(row, f"{figures['p50']:.2f}", _times(row.speedup))
    return f"{figures['mean']:.2f} mean" if "mean" in figures else NOTHING


def _p95(row: Row) -> str:
    value = row.measurement.latency_ms.get("p95")
    return NOTHING if value is None else f"{value:.2f}"


def _cold_start(row: Row) -> str:
    value = row.measurement.cold_start_ms.get("p50")
    return NOTHING if value is None else f"{value:.0f}"


def _resident(row: Row) -> str:
    value = row.measurement.resident_ms.get("p50")
    return NOTHING if value is None else f"{value:.2f}"


def _gpu_memory(row: Row) -> str:
    value = row.measurement.memory_bytes.get("gpu", {}).get("peak")
    return NOTHING if value is None else f"{value / 1e6:.0f}"


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
    marks = [("stale", row.stale), ("reported", row.measurement.status == "reported"), ("fallback", _fallback(row))]
    marks += [("noisy", bool(row.noisy))]
    named = "".join(f" [{name}]" for name, holds in marks if holds)
    return f"{row.measurement.cell}{' ' + FRONT if row.pareto else ''}{named}"


def _session(row: Row, fact: str) -> str:
    """What the session said of itself: as ``fallback``, what ran elsewhere than on the cell's provider; as ``note``,
    what the row is good for. Empty where it said nothing."""
    return str(row.measurement.facts.get("session", {}).get(fact, ""))


def _fallback(row: Row) -> bool:
    return bool(_session(row, "fallback"))


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("cell", _cell),
    ("accuracy (points)", _accuracy),
    ("p50 ms (faster)", _p50),
    ("p95 ms", _p95),
    ("on device p50 ms", _resident),
    ("sentences/s (faster)", _throughput),
    ("peak MB (smaller)", _memory),
    ("GPU peak MB", _gpu_memory),
    ("size MB (smaller)", _size),
    ("cold start ms", _cold_start),
)
# Columns that are left out where no row has the figure.
OPTIONAL = (_resident, _gpu_memory, _cold_start)


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that have figures."""
    return [row for row in rows if row.measurement.status in FIGURES]


def columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """`COLUMNS`, the optional ones where a row has such figures; before them what differs: model, machine."""
    extra: list[tuple[str, Callable[[Row], str]]] = []
    if len({row.measurement.model for row in rows}) > 1:
        extra.append(("model", lambda row: row.measurement.model))
    if _several(rows):
        extra.append(("machine", _machine))
    return extra + [
        (name, text) for name, text in COLUMNS if text not in OPTIONAL or any(text(row) != NOTHING for row in rows)
    ]


def _several(rows: Sequence[Row]) -> bool:
    """Whether the rows are of more than one machine."""
    return len({row.run.machine["id"] for row in rows}) > 1


def _named(row: Row, rows: Sequence[Row]) -> str:
    """The row's cell, with its machine where there are others."""
    return f"{row.measurement.cell} on {_machine(row)}" if _several(rows) else row.measurement.cell


def _machine(row: Row) -> str:
    machine = row.run.machine
    gpus = [gpu["name"] for gpu in machine["gpu"]]
    if row.measurement.provider == "cuda" and gpus:
        return str(gpus[min(row.run.run.get("device_id", 0), len(gpus) - 1)])
    return host(row)


def host(row: Row) -> str:
    """Processor and cores; 0 stands for what a published table does not say."""
    machine = row.run.machine
    return ", ".join([machine["cpu"], *([f"{machine['cores']} cores"] if machine["cores"] else [])])


def title(rows: Sequence[Row]) -> list[str]:
    """What is compared, on what, with what: a line a run."""
    lines = []
    for run in dict.fromkeys(id(row.run) for row in rows):
        row = next(row for row in rows if id(row.run) == run)
        machine, data, how = row.run.machine, row.run.data, row.run.run
        ram = [f"{machine['ram_gib']} GiB"] if machine["ram_gib"] else []
        hardware = ", ".join([*filter(None, [host(row)]), *ram, *(gpu["name"] for gpu in machine["gpu"])])
        isa = f" ({', '.join(machine['isa'])})" if machine["isa"] else ""
        threads = f"{how['threads']} threads, " if "threads" in how else ""
        lines.append(
            f"{row.measurement.model} on {hardware}{isa}; {threads}"
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
    if any(row.pareto for row in rows):
        lines.append(
            f"{FRONT}: no row beside it is better in accuracy, p50 or size without being worse in another of them."
        )
    if any(found and found.differs is not None for row in rows for found in (row.speedup, row.throughput_gain)):
        lines.append(
            "Ratios of times are geometric means over interleaved rounds; no difference: the 95 % interval has 1 in it."
        )
    lines += _by_text([(_named(row, rows), f" [noisy]: {row.noisy}.") for row in measured(rows) if row.noisy])
    lines += _pruned(rows) + _trimmed(rows) + _by_length(rows)
    lines += _by_text([(_named(row, rows), f": {_session(row, 'fallback')}.") for row in rows if _fallback(row)])
    lines += _by_text([(row.measurement.cell, f": {note}.") for row in rows if (note := _session(row, "note"))])
    lines += [f"{row.measurement.cell}: {_exactness(row)}" for row in rows if "exactness" in row.measurement.facts]
    lines += _gpu_notes(rows) + _reported(rows)
    if any(row.stale for row in rows):
        lines.append("[stale]: the artifact has been built anew since; measure again with `toolchain bench`.")
    without = [(_named(row, rows), row.measurement) for row in rows if row.measurement.status not in FIGURES]
    return lines + _by_text([(name, f" {m.status}: {m.reason} {m.mend}".rstrip()) for name, m in without])


def _exactness(row: Row) -> str:
    found = row.measurement.facts["exactness"]
    key, value = found["option"]
    time = found["time"]
    interval = f" [{time['low']:.2f}, {time['high']:.2f}]" if "low" in time else ""
    return (
        f"this processor saturates 8-bit products unless {key} = {value}, which is set; with it a sentence takes "
        f"{time['value']:.2f}{interval} of the time without it."
    )


def _by_text(found: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each text, after all the cells it holds for."""
    cells: dict[str, dict[str, None]] = {}
    for cell, text in found:
        cells.setdefault(text, {})[cell] = None
    return [f"{', '.join(named)}{text}" for text, named in cells.items()]


def _gpu_notes(rows: Sequence[Row]) -> list[str]:
    """How the columns of a GPU came about."""
    lines = []
    if any(row.measurement.resident_ms for row in rows):
        lines.append("On device: batch and logits stay on the GPU; p50 and p95 have their copies in them.")
    methods = dict.fromkeys(row.measurement.memory_bytes.get("gpu", {}).get("method") for row in rows)
    return lines + [f"GPU peak: {method}." for method in methods if method]


def _reported(rows: Sequence[Row]) -> list[str]:
    """Where published figures come from, how they were taken, and what is odd about any."""
    found = [row for row in rows if row.measurement.status == "reported"]
    lines = list(
        dict.fromkeys(
            f"[reported]: published figures, not measured here: {row.run.run.get('source', 'source not stated')}. "
            f"{row.run.run.get('method', '')}".rstrip()
            for row in found
        )
    )
    with_note = [row for row in found if row.measurement.facts.get("note")]
    return lines + [f"{row.measurement.cell} on {_machine(row)}: {row.measurement.facts['note']}." for row in with_note]


def _pruned(rows: Sequence[Row]) -> list[str]:
    """For all rows of one pruning a line: what was removed, what that was predicted to bring, and what it brought each
    row over the same variant unpruned, in one run."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in measured(rows):
        if "pruning" in row.measurement.facts:
            found.setdefault((id(row.run), sentence(row.measurement.facts["pruning"])), []).append(row)
    lines = []
    for (_, text), pruned in found.items():
        gains = [(_named(row, rows), over_unpruned(row, rows)) for row in pruned]
        told = [f"{cell} {gain[1].value:.2f}× {gain[0]}" for cell, gain in gains if gain]
        cells = ", ".join(_named(row, rows) for row in pruned)
        lines.append(f"{cells}: {text}" + (f", measured at batch 1: {', '.join(told)}" if told else ""))
    return lines


def _trimmed(rows: Sequence[Row]) -> list[str]:
    """Which vocabularies are not whole, and what texts of other words cost."""
    found = [(row.measurement.cell, row.measurement.facts.get("vocabulary")) for row in measured(rows)]
    # Of the variant, whatever machine it is measured on.
    return list(dict.fromkeys(f"{cell}: {trimming.sentence(facts)}" for cell, facts in found if facts))


def _by_length(rows: Sequence[Row]) -> list[str]:
    """Median milliseconds at each length that was asked, of rows where it was."""
    lines = []
    for row in rows:
        found = {n: samples.milliseconds()["p50"] for n, samples in row.measurement.by_length.items()}
        if found:
            told = ", ".join(f"{n} tokens {value:.2f}" for n, value in found.items())
            lines.append(f"{_named(row, rows)}, p50 ms by length: {told}.")
    return lines


def over_unpruned(row: Row, rows: Sequence[Row]) -> tuple[str, Ratio] | None:
    """The same variant unpruned, of the same run and provider, and how many times faster than it a pruned row is at
    batch 1; None where that was not measured, or the name does not tell which it is."""
    try:
        same = unpruned(row.measurement.variant)
    except UnknownVariantError:
        return None
    wanted = (row.measurement.model, f"{same}@{row.measurement.provider}")
    beside = (r.measurement for r in measured(rows) if r.run is row.run)
    dense = next((m for m in beside if (m.model, m.cell) == wanted), None)
    ratio = replace(row, baseline=dense).speedup if dense else None
    return (same, ratio) if ratio else None


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
