"""Notes below a comparison, shared by all report formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toolchain.artifacts.fact_summaries import (
    describe_exit_shares,
    summarize_exits,
    summarize_pruning,
    summarize_vocabulary,
)
from toolchain.artifacts.names import VariantName
from toolchain.compare.report.columns import (
    FIGURES,
    FRONT,
    cell_name,
    has_fallback,
    has_several_machines,
    machine_name,
    rows_with_figures,
    score_names,
    session_fact,
)
from toolchain.compare.rows import Row
from toolchain.errors import UnknownVariantError
from toolchain.results.providers import CUDA_GRAPHS, TENSORRT
from toolchain.results.scores import Accuracy
from toolchain.results.statistics import Ratio


def notes(rows: Sequence[Row], explain_front: bool = True) -> list[str]:
    """Returns the notes below a comparison.

    The notes explain the figures and marks, and name each row without figures, with its reason and hint.

    Args:
        rows: The rows of the comparison.
        explain_front: Whether a note explains the symbol `FRONT`.
    """
    lines = list(filter(None, [baseline_note(rows)]))
    lines += dict.fromkeys(_method_note(row) for row in rows_with_figures(rows) if "batch_size" in row.run.run)
    if explain_front and any(row.pareto for row in rows):
        lines.append(
            f"{FRONT}: on the Pareto front; every row that is better than the marked row in {score_names(rows)}, p50 "
            "or size is worse in another of these figures."
        )
    if any(ratio and ratio.differs is not None for row in rows for ratio in (row.speedup, row.throughput_gain)):
        lines.append(
            "Ratios of times are geometric means over interleaved rounds. "
            'The table says "no difference" if the 95 % interval of a ratio includes 1.'
        )
    lines += _group_cells(
        [(cell_name(row, rows), f" [noisy]: {row.noisy}.") for row in rows_with_figures(rows) if row.noisy]
    )
    lines += _pruning_notes(rows) + _vocabulary_notes(rows) + _exits_notes(rows) + _length_notes(rows)
    lines += _group_cells(
        [(cell_name(row, rows), f": {session_fact(row, 'fallback')}.") for row in rows if has_fallback(row)]
    )
    lines += _group_cells(
        [
            (row.measurement.cell, f": The purpose of this quantisation is to improve {note}.")
            for row in rows
            if (note := session_fact(row, "note"))
        ]
    )
    lines += [f"{row.measurement.cell}: {_exactness_note(row)}" for row in rows if "exactness" in row.measurement.facts]
    lines += _server_notes(rows) + _gpu_notes(rows) + _source_notes(rows)
    if any(row.stale for row in rows):
        lines.append("[stale]: a newer build has replaced the measured artifact; measure again with `toolchain bench`.")
    without_figures = [(cell_name(row, rows), row.measurement) for row in rows if row.measurement.status not in FIGURES]
    return lines + _group_cells([(name, f" {m.status}: {m.reason} {m.mend}".rstrip()) for name, m in without_figures])


def baseline_note(rows: Sequence[Row]) -> str:
    """Returns a note that names the baselines of the rows; empty if no row has a baseline."""
    names = baseline_names(rows)
    return f"Ratios are against {names} of the same run; above 1 is better." if names else ""


def baseline_names(rows: Sequence[Row]) -> str:
    """Returns the cells of the rows' baselines; empty if no row has a baseline."""
    return " and ".join(dict.fromkeys(row.baseline.cell for row in rows if row.baseline))


def _exactness_note(row: Row) -> str:
    exactness = row.measurement.facts["exactness"]
    key, value = exactness["option"]
    time = exactness["time"]
    interval = f" [{time['low']:.2f}, {time['high']:.2f}]" if "low" in time else ""
    return (
        f"8-bit products saturate on this processor, so {key} = {value} is set to make them exact. "
        f"Time with {key} / time without it: {time['value']:.2f}{interval}."
    )


def _group_cells(cell_texts: Sequence[tuple[str, str]]) -> list[str]:
    """Returns one line for each note text; the line starts with the names of all cells that share the text."""
    cells: dict[str, dict[str, None]] = {}
    for cell, text in cell_texts:
        cells.setdefault(text, {})[cell] = None
    return [f"{', '.join(names)}{text}" for text, names in cells.items()]


def _server_notes(rows: Sequence[Row]) -> list[str]:
    """Returns a note for each limit and each fixed rate of the scenario ``server``."""
    lines = []
    for fact in (row.measurement.facts["server"] for row in rows if "server" in row.measurement.facts):
        if "p99_limit_ms" in fact:
            limit = f"{fact['p99_limit_ms']:g} ms"
            lines.append(
                f"Queries/s: the highest rate of random arrivals whose p99 is at most {limit}, waiting included."
            )
        else:
            lines.append(f"Server p99: latency with random arrivals at {fact['qps']:g} queries/s, waiting included.")
    return list(dict.fromkeys(lines))


def _gpu_notes(rows: Sequence[Row]) -> list[str]:
    """Returns notes on how the figures of a GPU are measured."""
    lines = []
    if any(row.measurement.resident_ms for row in rows):
        lines.append(
            "On device: batch and logits stay on the GPU. The columns p50 and p95 include copies to and from the GPU."
        )
    if any(row.measurement.provider == CUDA_GRAPHS for row in rows_with_figures(rows)):
        lines.append(
            f"{CUDA_GRAPHS}: one text at a time is padded to the next length with a CUDA graph. Larger batches have no "
            "graph."
        )
    if any(row.measurement.provider == TENSORRT for row in rows_with_figures(rows)):
        lines.append(f"{TENSORRT}: computes in half precision. Each cold start builds the engine of TensorRT.")
    methods = dict.fromkeys(row.measurement.memory_bytes.get("gpu", {}).get("method") for row in rows)
    return lines + [f"GPU peak: {method}." for method in methods if method]


def _source_notes(rows: Sequence[Row]) -> list[str]:
    """Returns notes on the source and method of published figures, and the remarks on single published rows."""
    published = [row for row in rows if row.measurement.status == "reported"]
    lines = list(
        dict.fromkeys(
            f"[reported]: published figures, not measured here: {row.run.run.get('source', 'source not stated')}. "
            f"{row.run.run.get('method', '')}".rstrip()
            for row in published
        )
    )
    with_note = [row for row in published if row.measurement.facts.get("note")]
    return lines + [
        f"{row.measurement.cell} on {machine_name(row)}: {row.measurement.facts['note']}." for row in with_note
    ]


def _pruning_notes(rows: Sequence[Row]) -> list[str]:
    """Returns a note for each summary of pruning: the cells that share it, the summary, and their measured speed-ups.

    The baseline of a speed-up is the same variant without pruning, in the same run.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows_with_figures(rows):
        if "pruning" in row.measurement.facts:
            groups.setdefault(summarize_pruning(row.measurement.facts["pruning"]), []).append(row)
    lines = []
    for text, pruned in groups.items():
        gains: dict[str, list[str]] = {}
        for row in pruned:
            if gain := speedup_over_unpruned(row, rows):
                machine = f" on {machine_name(row)}" if has_several_machines(rows) else ""
                gain_text = f"{row.measurement.cell} is {gain[1].value:.2f} times as fast as {gain[0]}"
                gains.setdefault(machine, []).append(gain_text)
        cells = ", ".join(dict.fromkeys(row.measurement.cell for row in pruned))
        measured = [f". Measured at batch 1{machine}: {', '.join(texts)}" for machine, texts in gains.items()]
        lines.append(f"{cells}: {text}{''.join(measured)}.")
    return lines


def _vocabulary_notes(rows: Sequence[Row]) -> list[str]:
    """Returns one line for each cell with a trimmed vocabulary."""
    facts_by_cell = [(row.measurement.cell, row.measurement.facts.get("vocabulary")) for row in rows_with_figures(rows)]
    # The vocabulary belongs to the variant, so the rows of a variant on several machines give the same line.
    return list(dict.fromkeys(f"{cell}: {summarize_vocabulary(facts)}" for cell, facts in facts_by_cell if facts))


def _exits_notes(rows: Sequence[Row]) -> list[str]:
    """Returns the use of the exits by the sentences of each row, and by the held-out rows of each variant."""
    with_exits = [row for row in rows_with_figures(rows) if "exits" in row.measurement.facts]
    lines = []
    for row in with_exits:
        facts, shares = row.measurement.facts["exits"], row.measurement.exit_shares
        if shares:
            count = sum(number is not None for number in row.measurement.exits)
            used = describe_exit_shares(facts, shares[:-1])
            lines.append(f"{cell_name(row, rows)}: of {count} sentences, {used}, and {shares[-1]:.0%} use no exit.")
    summaries = (f"{row.measurement.cell}: {summarize_exits(row.measurement.facts['exits'])}" for row in with_exits)
    return [*lines, *dict.fromkeys(summaries)]


def _length_notes(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each row that was measured by length: the median milliseconds at each number of tokens."""
    lines = []
    for row in rows:
        medians = {n: samples.milliseconds()["p50"] for n, samples in row.measurement.by_length.items()}
        if medians:
            median_texts = ", ".join(f"{n} tokens {value:.2f}" for n, value in medians.items())
            lines.append(f"{cell_name(row, rows)}, p50 ms by length: {median_texts}.")
    return lines


def speedup_over_unpruned(row: Row, rows: Sequence[Row]) -> tuple[str, Ratio] | None:
    """Returns the name of the unpruned variant, and the speed-up of a pruned row over this variant at batch 1.

    Args:
        row: The pruned row.
        rows: All rows. The unpruned variant's row must have the same run, model and provider as the pruned row.

    Returns:
        Name of the unpruned variant and the speed-up; None if the unpruned variant was not measured or is unknown.
    """
    try:
        unpruned = VariantName(row.measurement.variant).unpruned_name
    except UnknownVariantError:
        return None
    unpruned_key = (row.measurement.model, f"{unpruned}@{row.measurement.provider}")
    run_measurements = (r.measurement for r in rows_with_figures(rows) if r.run is row.run)
    baseline = next((m for m in run_measurements if (m.model, m.cell) == unpruned_key), None)
    ratio = replace(row, baseline=baseline).speedup if baseline else None
    return (unpruned, ratio) if ratio else None


def _method_note(row: Row) -> str:
    """Returns a note on how latency, accuracy and throughput of the row's run are measured."""
    settings, count = row.run.run, row.run.data["rows"]
    single_count, score = settings.get("single_sentences", count), row.measurement.score
    batch = score.batch_size if score else 1
    name = score.name if score else Accuracy.name
    figures = f"Latency and {name} are" if batch == 1 else "Latency is"
    if single_count >= count:
        latency = f"{figures} measured at batch 1, with each sentence at its own length."
    else:
        latency = f"{figures} measured at batch 1, on {single_count} of {count} sentences, each at its own length."
    text = f"{latency} Sentences/s is measured in length-sorted batches of {settings['batch_size']}."
    return text if batch == 1 else f"{text} The {name} is measured on all sentences in batches of {batch}."
