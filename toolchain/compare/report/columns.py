"""Columns and title lines of a comparison, shared by all report formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolchain.compare.report.figure import Figure, show_figure
from toolchain.compare.rows import Row
from toolchain.results.providers import is_on_gpu
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


def _mean(row: Row) -> Figure | None:
    return Figure.from_number(row.measurement.latency_ms.get("mean"), ".2f", note=_note(row, row.mean_speedup))


def _expected_work(row: Row) -> Figure | None:
    """Returns the work that a variant with exits needs on held-out rows, in per cent of the work without exits."""
    exits = row.measurement.facts.get("exits")
    return Figure.from_number(100 * exits["work"], ".0f", "%") if exits else None


def _exit_share(row: Row) -> Figure | None:
    """Returns the share of the sentences at batch 1 that use an exit, in per cent."""
    shares = row.measurement.exit_shares
    return Figure.from_number(100 * sum(shares[:-1]), ".0f", "%") if shares else None


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
        "fallback": has_fallback(row),
        "noisy": bool(row.noisy),
    }
    return [mark for mark, holds in conditions.items() if holds]


def _cell(row: Row) -> Figure:
    front = f" {FRONT}" if row.pareto else ""
    return Figure(f"{row.measurement.cell}{front}{''.join(f' [{mark}]' for mark in row_marks(row))}")


def session_fact(row: Row, fact: str) -> str:
    """Returns a fact that the measured session reported, as text; empty if the session did not report the fact.

    The fact ``fallback`` describes the part of the model that runs on a provider other than the requested one. The
    fact ``note`` states what the quantisation of the variant improves, such as ``the size of the weights, not speed``.
    """
    return str(row.measurement.facts.get("session", {}).get(fact, ""))


def has_fallback(row: Row) -> bool:
    """Returns whether a part of the row's model ran on another provider than the requested one."""
    return bool(session_fact(row, "fallback"))


CELL = Column("cell", "cell", _cell)
# Columns of a comparison with a variant that has exits. Its latency depends on the text, and the median hides this.
EXIT_COLUMNS = (
    Column("mean", "mean ms (faster)", _mean, "ms"),
    Column("exits", "sentences that exit", _exit_share, optional=True),
    Column("work", "expected work", _expected_work),
)
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
    if has_several_machines(rows):
        group.append(Column("machine", "machine", lambda row: Figure(machine_name(row))))
    return group


def columns(rows: Sequence[Row]) -> list[Column]:
    """Returns the columns that a comparison of the rows shows.

    An optional column appears only if a row has the figure of the column, and `EXIT_COLUMNS` only if a row has exits.
    The columns that `group_columns` returns come first.
    """
    place = next(index for index, column in enumerate(COLUMNS) if column.name == "p50")
    exit_columns = EXIT_COLUMNS if any(_expected_work(row) for row in rows) else ()
    possible = (*COLUMNS[:place], *exit_columns, *COLUMNS[place:])
    shown = [column for column in possible if not column.optional or any(column.figure(row) for row in rows)]
    return [*group_columns(rows), *shown]


def has_several_machines(rows: Sequence[Row]) -> bool:
    """Returns whether the rows come from more than one machine."""
    return len({row.run.machine["id"] for row in rows}) > 1


def cell_name(row: Row, rows: Sequence[Row]) -> str:
    """Returns the row's cell, with its machine if the rows come from several machines."""
    return f"{row.measurement.cell} on {machine_name(row)}" if has_several_machines(rows) else row.measurement.cell


def machine_name(row: Row) -> str:
    """Returns the name of the GPU of a row on CUDA, and otherwise the result of `host_name`."""
    machine = row.run.machine
    gpus = [gpu["name"] for gpu in machine["gpu"]]
    if is_on_gpu(row.measurement.provider) and gpus:
        return str(gpus[min(row.run.run.get("device_id", 0), len(gpus) - 1)])
    return host_name(row)


def host_name(row: Row) -> str:
    """Returns the processor's short name and number of cores; omits an unknown number of cores, which is stored as 0.

    The short name leaves out the signs of trademarks and the words "CPU" and "Processor": ``Intel Xeon @ 2.20GHz``.
    """
    machine = row.run.machine
    name = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b", " ", machine["cpu"], flags=re.IGNORECASE)
    # A name that consists of these words only stays as it is.
    short = " ".join(name.split()) or machine["cpu"]
    return ", ".join([short, *([f"{machine['cores']} cores"] if machine["cores"] else [])])


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
