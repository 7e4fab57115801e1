"""Columns, title lines and notes of a comparison, shared by all report formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from toolchain.artifacts.fact_summaries import summarize_pruning, summarize_vocabulary
from toolchain.artifacts.names import VariantName
from toolchain.compare.report.figure import Figure, show_figure
from toolchain.compare.rows import Row
from toolchain.errors import UnknownVariantError
from toolchain.results.scores import SCORES, Accuracy, RegressionScore, Score
from toolchain.results.statistics import Ratio

FRONT = "◆"
FIGURES = ("ok", "reported")  # Statuses of the rows that have figures.


@dataclass(frozen=True)
class Column:
    """A column of a comparison.

    Attributes:
        name: Name of the figure.
        header: The displayed header.
        figure: Function that returns the figure of a row; it returns None if the figure is unknown.
        unit: Unit of the figure; empty if the text of the figure contains the unit.
        optional: Whether the comparison omits the column if no row has the figure.
    """

    name: str
    header: str
    figure: Callable[[Row], Figure | None]
    unit: str = ""
    optional: bool = False

    def text(self, row: Row) -> str:
        """Returns the text of the row's figure."""
        return show_figure(self.figure(row))


def _note(row: Row, ratio: Ratio | float | None) -> str:
    """Returns a ratio to the baseline as text; ``no difference`` if its interval includes 1; empty for the baseline."""
    if row.measurement is row.baseline or ratio is None:
        return ""
    if isinstance(ratio, Ratio):
        if ratio.differs is False:
            return "no difference"
        ratio = ratio.value
    return f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def score_figure(row: Row) -> Figure | None:
    """Returns the value of the row's score in percent, with the points above the baseline; None without a score."""
    score, points = row.measurement.score, row.accuracy_points
    note = "" if points is None or row.measurement is row.baseline else f"{points:+.2f}"
    return Figure.from_number(100 * score.value, ".2f", "%", note) if score else None


def _score_column(kind: type[Score]) -> Column:
    """Returns the column of a kind of score, which shows only rows with this kind of score."""
    return Column(
        kind.key,
        f"{kind.name} (points)",
        lambda row: score_figure(row) if isinstance(row.measurement.score, kind) else None,
        optional=True,
    )


def _mean_absolute_error(row: Row) -> Figure | None:
    score = row.measurement.score
    return Figure.from_number(score.mean_absolute_error, ".4g") if isinstance(score, RegressionScore) else None


def score_names(rows: Sequence[Row]) -> str:
    """Returns the names of the rows' scores, such as ``accuracy`` or ``accuracy or R²``."""
    names = dict.fromkeys(row.measurement.score.name for row in rows if row.measurement.score)
    return " or ".join(names) or Accuracy.name


def _p50(row: Row) -> Figure | None:
    """Returns the median latency, or the mean with the word ``mean`` if a published row has no median."""
    figures = row.measurement.latency_ms
    if "p50" in figures:
        return Figure.from_number(figures["p50"], ".2f", note=_note(row, row.speedup))
    return Figure.from_number(figures.get("mean"), ".2f", " mean")


def _throughput(row: Row) -> Figure | None:
    return Figure.from_number(row.measurement.throughput_per_s, ".0f", note=_note(row, row.throughput_gain))


def _server_rate(row: Row) -> Figure | None:
    """Returns the highest rate that keeps the p99 of the scenario ``server``; None if the user chose the rate."""
    fact = row.measurement.facts.get("server", {})
    return Figure.from_number(fact["qps"], ".4g", note=_note(row, row.server_gain)) if "p99_limit_ms" in fact else None


def _server_p99(row: Row) -> Figure | None:
    """Returns the p99 of the scenario ``server`` at a rate that the user chose."""
    fact = row.measurement.facts.get("server", {})
    return None if "p99_limit_ms" in fact else Figure.from_number(row.measurement.server_ms.get("p99"), ".1f")


def _memory(row: Row) -> Figure | None:
    count = row.measurement.memory_bytes.get("peak")
    return Figure.from_number(to_megabytes(count), ".0f", note=_note(row, row.memory_reduction))


def _gpu_memory(row: Row) -> Figure | None:
    return Figure.from_number(to_megabytes(row.measurement.memory_bytes.get("gpu", {}).get("peak")), ".0f")


def _size(row: Row) -> Figure | None:
    count = row.measurement.size_bytes.get("total")
    return Figure.from_number(to_megabytes(count), ".1f", note=_note(row, row.size_reduction))


def to_megabytes(count: int | None) -> float | None:
    """Returns a number of bytes in megabytes (10^6 bytes); None for an unknown number."""
    return None if count is None else count / 1e6


def row_marks(row: Row) -> list[str]:
    """Returns those of the marks ``stale``, ``reported``, ``fallback`` and ``noisy`` that apply to the row."""
    conditions = {
        "stale": row.stale,
        "reported": row.measurement.status == "reported",
        "fallback": _has_fallback(row),
        "noisy": bool(row.noisy),
    }
    return [mark for mark, holds in conditions.items() if holds]


def _cell(row: Row) -> Figure:
    front = f" {FRONT}" if row.pareto else ""
    return Figure(f"{row.measurement.cell}{front}{''.join(f' [{mark}]' for mark in row_marks(row))}")


def _session_fact(row: Row, fact: str) -> str:
    """Returns a fact that the measured session reported, as text; empty if the session did not report the fact.

    The fact ``fallback`` describes the part of the model that runs on a provider other than the requested one. The
    fact ``note`` states what the quantisation of the variant improves, such as ``the size of the weights, not speed``.
    """
    return str(row.measurement.facts.get("session", {}).get(fact, ""))


def _has_fallback(row: Row) -> bool:
    return bool(_session_fact(row, "fallback"))


CELL = Column("cell", "cell", _cell)
COLUMNS = (
    CELL,
    *map(_score_column, SCORES),
    Column("mean absolute error", "mean absolute error", _mean_absolute_error, optional=True),
    Column("p50", "p50 ms (faster)", _p50, "ms"),
    Column("p95", "p95 ms", lambda row: Figure.from_number(row.measurement.latency_ms.get("p95"), ".2f"), "ms"),
    Column(
        "resident p50",
        "on device p50 ms",
        lambda row: Figure.from_number(row.measurement.resident_ms.get("p50"), ".2f"),
        "ms",
        optional=True,
    ),
    Column("throughput", "sentences/s (faster)", _throughput, "sentences/s"),
    Column("server rate", "queries/s (more)", _server_rate, "queries/s", optional=True),
    Column("server p99", "server p99 ms", _server_p99, "ms", optional=True),
    Column("memory", "peak MB (smaller)", _memory, "MB"),
    Column("GPU memory", "GPU peak MB", _gpu_memory, "MB", optional=True),
    Column("size", "size MB (smaller)", _size, "MB"),
    Column(
        "cold start",
        "cold start ms",
        lambda row: Figure.from_number(row.measurement.cold_start_ms.get("p50"), ".0f"),
        "ms",
        optional=True,
    ),
)


def rows_with_figures(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that have figures, measured or published."""
    return [row for row in rows if row.measurement.status in FIGURES]


def group_columns(rows: Sequence[Row]) -> list[Column]:
    """Returns the column ``model`` if the rows have several models, and ``machine`` if they have several machines."""
    group: list[Column] = []
    if len({row.measurement.model for row in rows}) > 1:
        group.append(Column("model", "model", lambda row: Figure(row.measurement.model)))
    if _has_several_machines(rows):
        group.append(Column("machine", "machine", lambda row: Figure(_machine(row))))
    return group


def columns(rows: Sequence[Row]) -> list[Column]:
    """Returns the columns that a comparison of the rows shows.

    An optional column appears only if a row has the figure of the column. The columns of `group_columns` come first.
    """
    shown = [column for column in COLUMNS if not column.optional or any(column.figure(row) for row in rows)]
    return [*group_columns(rows), *shown]


def _has_several_machines(rows: Sequence[Row]) -> bool:
    """Returns whether the rows come from more than one machine."""
    return len({row.run.machine["id"] for row in rows}) > 1


def _cell_name(row: Row, rows: Sequence[Row]) -> str:
    """Returns the row's cell, with its machine if the rows come from several machines."""
    return f"{row.measurement.cell} on {_machine(row)}" if _has_several_machines(rows) else row.measurement.cell


def _machine(row: Row) -> str:
    machine = row.run.machine
    gpus = [gpu["name"] for gpu in machine["gpu"]]
    if row.measurement.provider == "cuda" and gpus:
        return str(gpus[min(row.run.run.get("device_id", 0), len(gpus) - 1)])
    return host_name(row)


def host_name(row: Row) -> str:
    """Returns the processor's name and number of cores; omits an unknown number of cores, which is stored as 0."""
    machine = row.run.machine
    return ", ".join([machine["cpu"], *([f"{machine['cores']} cores"] if machine["cores"] else [])])


def title(rows: Sequence[Row]) -> list[str]:
    """Returns one line for each run: model, hardware, threads, data and date."""
    lines = []
    for run in dict.fromkeys(id(row.run) for row in rows):
        row = next(row for row in rows if id(row.run) == run)
        machine, data, settings = row.run.machine, row.run.data, row.run.run
        ram = [f"{machine['ram_gib']} GiB"] if machine["ram_gib"] else []
        hardware = ", ".join([*filter(None, [host_name(row)]), *ram, *(gpu["name"] for gpu in machine["gpu"])])
        isa = f" ({', '.join(machine['isa'])})" if machine["isa"] else ""
        threads = f"{settings['threads']} threads, " if "threads" in settings else ""
        lines.append(
            f"{row.measurement.model} on {hardware}{isa}; {threads}"
            f"{data['name']}, {data['rows']} sentences; {row.run.created}"
        )
    return lines


def notes(rows: Sequence[Row], explain_front: bool = True) -> list[str]:
    """Returns the notes below a comparison.

    The notes explain the figures and marks, and name each row without figures, with its reason and hint.

    Args:
        rows: The rows of the comparison.
        explain_front: Whether a note explains the symbol `FRONT`.
    """
    baselines = list(dict.fromkeys(row.baseline.cell for row in rows if row.baseline))
    lines = []
    if baselines:
        lines.append(f"Ratios are against {' and '.join(baselines)} of the same run; above 1 is better.")
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
        [(_cell_name(row, rows), f" [noisy]: {row.noisy}.") for row in rows_with_figures(rows) if row.noisy]
    )
    lines += _pruning_notes(rows) + _vocabulary_notes(rows) + _length_notes(rows)
    lines += _group_cells(
        [(_cell_name(row, rows), f": {_session_fact(row, 'fallback')}.") for row in rows if _has_fallback(row)]
    )
    lines += _group_cells(
        [
            (row.measurement.cell, f": The purpose of this quantisation is to improve {note}.")
            for row in rows
            if (note := _session_fact(row, "note"))
        ]
    )
    lines += [f"{row.measurement.cell}: {_exactness_note(row)}" for row in rows if "exactness" in row.measurement.facts]
    lines += _server_notes(rows) + _gpu_notes(rows) + _source_notes(rows)
    if any(row.stale for row in rows):
        lines.append("[stale]: a newer build has replaced the measured artifact; measure again with `toolchain bench`.")
    without_figures = [
        (_cell_name(row, rows), row.measurement) for row in rows if row.measurement.status not in FIGURES
    ]
    return lines + _group_cells([(name, f" {m.status}: {m.reason} {m.mend}".rstrip()) for name, m in without_figures])


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
    return lines + [f"{row.measurement.cell} on {_machine(row)}: {row.measurement.facts['note']}." for row in with_note]


def _pruning_notes(rows: Sequence[Row]) -> list[str]:
    """Returns notes about pruned rows; the rows of one run that have the same summary of pruning share one note.

    A note names the cells, summarises their pruning, and gives the measured speed-up of each cell. The baseline of this
    speed-up is the same variant without pruning, in the same run.
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows_with_figures(rows):
        if "pruning" in row.measurement.facts:
            groups.setdefault((id(row.run), summarize_pruning(row.measurement.facts["pruning"])), []).append(row)
    lines = []
    for (_, text), pruned in groups.items():
        gains = [(_cell_name(row, rows), speedup_over_unpruned(row, rows)) for row in pruned]
        gain_texts = [f"{cell} {gain[1].value:.2f}× over {gain[0]}" for cell, gain in gains if gain]
        cells = ", ".join(_cell_name(row, rows) for row in pruned)
        measured = f". Measured speed-up at batch 1: {', '.join(gain_texts)}" if gain_texts else ""
        lines.append(f"{cells}: {text}{measured}")
    return lines


def _vocabulary_notes(rows: Sequence[Row]) -> list[str]:
    """Returns one line for each cell with a trimmed vocabulary."""
    facts_by_cell = [(row.measurement.cell, row.measurement.facts.get("vocabulary")) for row in rows_with_figures(rows)]
    # The vocabulary belongs to the variant, so the rows of a variant on several machines give the same line.
    return list(dict.fromkeys(f"{cell}: {summarize_vocabulary(facts)}" for cell, facts in facts_by_cell if facts))


def _length_notes(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each row that was measured by length: the median milliseconds at each number of tokens."""
    lines = []
    for row in rows:
        medians = {n: samples.milliseconds()["p50"] for n, samples in row.measurement.by_length.items()}
        if medians:
            median_texts = ", ".join(f"{n} tokens {value:.2f}" for n, value in medians.items())
            lines.append(f"{_cell_name(row, rows)}, p50 ms by length: {median_texts}.")
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
