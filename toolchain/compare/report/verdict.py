"""The verdicts of a comparison as lines of text and as JSON: the winner within limits, and the regressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from toolchain.compare.limits import Verdict, chance_remark
from toolchain.compare.regressions import Change, Pair, Regressions
from toolchain.compare.report.columns import score_names
from toolchain.compare.rows import Row
from toolchain.system.columns import align

# Figure → displayed name, name of the cost, displayed unit, and the factor from the displayed unit to the stored unit.
_SHOWN = {
    "latency_p50_ms": ("p50", "latency", "ms", 1.0),
    "throughput_per_s": ("sentences/s", "time a sentence", "", 1.0),
    "peak_memory_bytes": ("peak", "peak memory", "MB", 1e6),
    "size_bytes": ("size", "size", "MB", 1e6),
    "accuracy": ("accuracy", "wrong answers", "%", 0.01),
    "entity_f1": ("entity F1", "wrong and missed entities", "%", 0.01),
    "mean_absolute_error": ("mean absolute error", "mean absolute error", "", 1.0),
}


def choice_lines(verdict: Verdict) -> list[str]:
    """Returns the verdict as lines of text.

    The lines name the winner with its figures and marks, the other rows within the limits, and the Pareto front. The
    last lines name the nearest misses with their broken limits.
    """
    lines = [f"Winner: {_figures(verdict.winner)}" if verdict.winner else "Winner: none; no row is within the limits."]
    if len(verdict.passed) > 1:
        lines.append(f"Also within the limits: {_names(verdict.passed[1:])}")
    if verdict.front:
        outside = [row for row in verdict.front if row not in verdict.passed]
        outside_names = "all of them" if len(outside) == len(verdict.front) else _names(outside)
        remark = f"; outside the limits: {outside_names}" if outside else ""
        lines.append(f"Pareto front of {score_names(verdict.front)}, p50 and size: {_names(verdict.front)}{remark}")
    if verdict.misses:
        lines.append("Nearest misses:")
    for miss in verdict.misses:
        lines += [f"  {_name(miss.row)}: {'; '.join(map(str, miss.broken))}"]
    return lines


def choice_json(verdict: Verdict) -> dict[str, Any]:
    """Returns the verdict for JSON; unset limits and unknown figures are null."""
    misses = [
        {
            **_identity(miss.row),
            "broken": [
                {"limit": b.limit, "allowed": b.allowed, "value": b.value, "remark": b.remark, "text": str(b)}
                for b in miss.broken
            ],
        }
        for miss in verdict.misses
    ]
    return {
        "limits": asdict(verdict.limits),
        "winner": _identity(verdict.winner) if verdict.winner else None,
        "passed": [_identity(row) for row in verdict.passed],
        "front": [_identity(row) for row in verdict.front],
        "misses": misses,
    }


def _identity(row: Row) -> dict[str, Any]:
    measurement = row.measurement
    marks = {"noisy": row.noisy, "stale": row.stale}
    return {"model": measurement.model, "cell": measurement.cell, "artifact_id": measurement.artifact_id, **marks}


def _name(row: Row) -> str:
    return row.measurement.cell + _marks(row)


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(map(_name, rows))


def _marks(row: Row) -> str:
    noisy = f" [noisy: {row.noisy}]" if row.noisy else ""
    return noisy + (" [stale: a newer build has replaced the artifact]" if row.stale else "")


def _figures(row: Row) -> str:
    measurement = row.measurement
    parts = [
        f"{name} {measurement.latency_ms[name]:.2f} ms" for name in ("p50", "p95") if name in measurement.latency_ms
    ]
    if measurement.score:
        points = [] if row.accuracy_points is None else [f"{row.accuracy_points:+.2f} points"]
        note = ", ".join([*points, *filter(None, [chance_remark(row)])])
        parts.append(f"{measurement.score.name} {measurement.score.value:.2%}" + (f" ({note})" if note else ""))
    for name, count in (
        ("size", measurement.size_bytes.get("total")),
        ("peak memory", measurement.memory_bytes.get("peak")),
    ):
        if count is not None:
            parts.append(f"{name} {count / 1e6:.1f} MB")
    return f"{measurement.cell}: {', '.join(parts)}{_marks(row)}"


def regression_lines(result: Regressions) -> list[str]:
    """Returns the regressions as lines of text.

    A table shows how each figure of each compared cell changed. After the table, a line follows for each cell that is
    no longer measured, each regressed figure and each cell that is not compared. The last line explains the signs in
    the table.
    """
    limit = f"{result.limit * 100:g}%"
    compared = (
        f"Compared cells of the old run: {len(result.pairs)}. Regressed cells: {len(result.regressed_pairs)}. "
        f"A regressed cell is no longer measured, or a figure of the cell is worse by more than {limit}."
    )
    lines = [compared, *_table(result.pairs)]
    for pair in result.pairs:
        cell = pair.old.measurement.cell
        if pair.lost:
            lines.append(f"{cell} was measured in the old run and is now {pair.lost}")
        noisy = "".join(
            f" [the {name} run is noisy: {row.noisy}]"
            for name, row in (("old", pair.old), ("new", pair.new))
            if row and row.noisy
        )
        lines += [f"{cell}: {_change_summary(change)}{noisy}" for change in pair.changes if change.regressed]
    lines += [f"{cell} is not compared: {reason}." for _, cell, reason in result.not_compared]
    remark = "Each change is a change of cost: + is worse, ! exceeds the limit, ~ may be no change."
    return [
        *lines,
        f"{remark} Times are relative to the baseline of each run, which removes the drift of the machine's speed.",
    ]


def regression_json(result: Regressions) -> dict[str, Any]:
    """Returns the regressions for JSON; changes are shares of the old cost, and unknown figures are null."""
    pairs = [
        {
            "model": pair.old.measurement.model,
            "cell": pair.old.measurement.cell,
            "regressed": pair.regressed,
            "lost": pair.lost,
            "changes": [asdict(change) for change in pair.changes],
        }
        for pair in result.pairs
    ]
    not_compared = [{"model": model, "cell": cell, "reason": reason} for model, cell, reason in result.not_compared]
    return {
        "max_regression": result.limit,
        "regressed": len(result.regressed_pairs),
        "pairs": pairs,
        "not_compared": not_compared,
    }


def _table(pairs: Sequence[Pair]) -> list[str]:
    """Returns an aligned table with one line for each compared cell, and one column for the changes of each figure."""
    figures = {change.figure for pair in pairs for change in pair.changes}
    shown = {name: cost for name, (_, cost, _, _) in _SHOWN.items() if name in figures}
    rows = [["cell", *shown.values()]]
    for pair in pairs:
        if pair.changes:
            by_figure = {change.figure: _change_text(change) for change in pair.changes}
            rows.append([pair.old.measurement.cell, *(by_figure.get(name, "–") for name in shown)])
    return align(rows) if len(rows) > 1 else []


def _change_text(change: Change) -> str:
    if change.worse is None:
        return "unknown!"
    return f"{change.worse:+.1%}{'!' if change.regressed else '~' if change.may_be_none else ' '}"


def _change_summary(change: Change) -> str:
    name, cost, unit, scale = _SHOWN[change.figure]
    gap = "" if unit in ("", "%") else " "
    form = ".4g" if change.figure == "mean_absolute_error" else ".2f"  # the scores of a model can have any scale
    old = format(change.old / scale, form)
    if change.new is None or change.worse is None:
        return f"{name} {old}{gap}{unit} before, {change.remark}"
    bounds = ""
    if change.low is not None and change.high is not None:
        bounds = f" (95 % interval {change.low:+.1%} to {change.high:+.1%})"
    remark = f", {change.remark}" if change.remark else ""
    return f"{name} {old} → {format(change.new / scale, form)}{gap}{unit}, {cost} {change.worse:+.1%}{bounds}{remark}"
