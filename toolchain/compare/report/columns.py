"""Columns, title lines and notes of a comparison, shared by all report formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from toolchain.artifacts.names import VariantName
from toolchain.build import trimming
from toolchain.build.steps.prune import sentence
from toolchain.compare.rows import Row
from toolchain.errors import UnknownVariantError
from toolchain.results.statistics import Ratio

NOTHING = "–"
FRONT = "◆"
FIGURES = ("ok", "reported")  # statuses of rows that have figures


def _with(row: Row, value: str, note: str | None) -> str:
    """Returns a figure with its note in brackets; the baseline's own row has no note."""
    return f"{value} ({note})" if note and row.measurement is not row.baseline else value


def _times(ratio: Ratio | float | None) -> str | None:
    """Returns a ratio as text, or ``no difference`` if its interval includes 1."""
    if isinstance(ratio, Ratio):
        if ratio.differs is False:
            return "no difference"
        ratio = ratio.value
    return None if ratio is None else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def _accuracy(row: Row) -> str:
    score, points = row.measurement.accuracy, row.accuracy_points
    return _with(row, f"{score.value:.2%}", None if points is None else f"{points:+.2f}") if score else NOTHING


def _p50(row: Row) -> str:
    """Returns the median, or the mean with the word ``mean`` if a published row has no median."""
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
    """Returns a fact of the session as text; empty if the session does not state it.

    The fact ``fallback`` describes the part that runs on another provider. The fact ``note`` states the purpose of the
    variant, such as ``memory, not speed``.
    """
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
# The comparison omits these columns if no row has the figure.
OPTIONAL = (_resident, _gpu_memory, _cold_start)


def measured(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that have figures, measured or published."""
    return [row for row in rows if row.measurement.status in FIGURES]


def columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Returns the (header, text function) pairs of the columns that a comparison of the rows shows.

    A column of `OPTIONAL` appears only if a row has its figure. If the rows have several models or machines, columns
    for these come first.
    """
    extra: list[tuple[str, Callable[[Row], str]]] = []
    if len({row.measurement.model for row in rows}) > 1:
        extra.append(("model", lambda row: row.measurement.model))
    if _several(rows):
        extra.append(("machine", _machine))
    return extra + [
        (name, text) for name, text in COLUMNS if text not in OPTIONAL or any(text(row) != NOTHING for row in rows)
    ]


def _several(rows: Sequence[Row]) -> bool:
    """Returns whether the rows come from more than one machine."""
    return len({row.run.machine["id"] for row in rows}) > 1


def _named(row: Row, rows: Sequence[Row]) -> str:
    """Returns the row's cell, with its machine if the rows come from several machines."""
    return f"{row.measurement.cell} on {_machine(row)}" if _several(rows) else row.measurement.cell


def _machine(row: Row) -> str:
    machine = row.run.machine
    gpus = [gpu["name"] for gpu in machine["gpu"]]
    if row.measurement.provider == "cuda" and gpus:
        return str(gpus[min(row.run.run.get("device_id", 0), len(gpus) - 1)])
    return host(row)


def host(row: Row) -> str:
    """Returns the processor and its cores; a number of 0 cores is unknown, so the text omits it."""
    machine = row.run.machine
    return ", ".join([machine["cpu"], *([f"{machine['cores']} cores"] if machine["cores"] else [])])


def title(rows: Sequence[Row]) -> list[str]:
    """Returns one line for each run: model, hardware, threads, data and date."""
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
    """Returns the notes below a comparison.

    The notes explain the figures and marks. They also name each row without figures, with its reason and hint.
    """
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
    """Returns one line for each text; the line starts with all cells that share the text."""
    cells: dict[str, dict[str, None]] = {}
    for cell, text in found:
        cells.setdefault(text, {})[cell] = None
    return [f"{', '.join(named)}{text}" for text, named in cells.items()]


def _gpu_notes(rows: Sequence[Row]) -> list[str]:
    """Returns notes on how the figures of a GPU are measured."""
    lines = []
    if any(row.measurement.resident_ms for row in rows):
        lines.append("On device: batch and logits stay on the GPU; p50 and p95 have their copies in them.")
    methods = dict.fromkeys(row.measurement.memory_bytes.get("gpu", {}).get("method") for row in rows)
    return lines + [f"GPU peak: {method}." for method in methods if method]


def _reported(rows: Sequence[Row]) -> list[str]:
    """Returns notes on the source and method of published figures, and the remarks on single rows."""
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
    """Returns one line for each pruning in a run: the pruning facts and the measured speed-up of each pruned row.

    The baseline of these speed-ups is the same variant without pruning, in the same run.
    """
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
    """Returns one line for each cell with a trimmed vocabulary."""
    found = [(row.measurement.cell, row.measurement.facts.get("vocabulary")) for row in measured(rows)]
    # The vocabulary belongs to the variant, so rows of several machines give the same line.
    return list(dict.fromkeys(f"{cell}: {trimming.sentence(facts)}" for cell, facts in found if facts))


def _by_length(rows: Sequence[Row]) -> list[str]:
    """Returns one line for each row with measured lengths: the median milliseconds at each length."""
    lines = []
    for row in rows:
        found = {n: samples.milliseconds()["p50"] for n, samples in row.measurement.by_length.items()}
        if found:
            told = ", ".join(f"{n} tokens {value:.2f}" for n, value in found.items())
            lines.append(f"{_named(row, rows)}, p50 ms by length: {told}.")
    return lines


def over_unpruned(row: Row, rows: Sequence[Row]) -> tuple[str, Ratio] | None:
    """Returns the variant without pruning, and the speed-up of a pruned row over it at batch 1.

    Args:
        row: The pruned row.
        rows: All rows. The unpruned row must have the same run, model and provider.

    Returns:
        Name of the unpruned variant and the speed-up; None if the unpruned variant was not measured or is unknown.
    """
    try:
        same = VariantName(row.measurement.variant).unpruned_name
    except UnknownVariantError:
        return None
    wanted = (row.measurement.model, f"{same}@{row.measurement.provider}")
    beside = (r.measurement for r in measured(rows) if r.run is row.run)
    dense = next((m for m in beside if (m.model, m.cell) == wanted), None)
    ratio = replace(row, baseline=dense).speedup if dense else None
    return (same, ratio) if ratio else None


def _method(row: Row) -> str:
    """Returns a note on how latency, accuracy and throughput of the row's run are measured."""
    how, count = row.run.run, row.run.data["rows"]
    asked, score = how.get("single_sentences", count), row.measurement.accuracy
    batch = score.batch_size if score else 1
    single = "Latency and accuracy" if batch == 1 else "Latency"
    which = "each sentence" if asked >= count else f"{asked} of {count} sentences, each"
    text = (
        f"{single} at batch 1, {which} at its own length; sentences/s in length-sorted batches of {how['batch_size']}."
    )
    return text if batch == 1 else f"{text} Accuracy over all sentences in batches of {batch}."
