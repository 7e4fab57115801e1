"""Tables of the settings, package versions and machine probe rates of a comparison, with one column for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.compare.report.figure import NOTHING
from toolchain.compare.report.sections import Entry, Table
from toolchain.results.result_file import ResultFile

PROTOCOL = {
    "passes": "minimum passes over the sentences",
    "min_s": "minimum seconds of each cell and scenario",
    "turn_s": "approximate seconds of each turn",
    "pass_s": "time limit in seconds for the slowest cell to answer each sentence once",
    "starts": "processes of each cell",
    "rounds": "rounds",
    "threads": "threads",
    "batch_size": "sentences in a batch",
    "single_sentences": "sentences measured at batch 1",
    "by_length": "measured by length too",
    "service_times": "measured as a server too",
    "seed": "seed",
    "device_id": "GPU",
    "allow_fallback": "sessions may fall back to the CPU",
    "taken_up": "resumed after an interruption",
    "seconds": "seconds of the whole run",
    "load_1m": "load average of the machine",
    "steal_share": "share of processor time that the host took from the virtual machine",
}


def protocol(runs: Sequence[ResultFile]) -> Table | None:
    """Returns the table of all numeric and yes/no settings of the runs; None if there are no settings."""
    settings = [
        {name: _value_text(value) for name, value in run.run.items() if isinstance(value, int | float)} for run in runs
    ]
    names = [*PROTOCOL, *sorted({name for values in settings for name in values} - set(PROTOCOL))]
    ordered = [{PROTOCOL.get(name, name): values[name] for name in names if name in values} for values in settings]
    return _run_table("Runs", "setting", runs, ordered)


def versions(runs: Sequence[ResultFile]) -> Table | None:
    """Returns the table of package versions of the runs."""
    packages = [{"toolchain": run.toolchain, **_as_dict(run.machine.get("versions"))} for run in runs]
    return _run_table("Versions", "package", runs, packages)


def rates(runs: Sequence[ResultFile]) -> Table | None:
    """Returns the table of each runtime's highest measured rates; None if no run has rates.

    A rate is the speed of arithmetic or the speed of reading weights.
    """
    run_rates = [
        {
            f"{runtime}, {name}": _value_text(value)
            for runtime, values in _as_dict(run.run.get("rates")).items()
            for name, value in _as_dict(values).items()
        }
        for run in runs
    ]
    caption = "Highest measured rates of the machine: arithmetic and reading of weights"
    return _run_table(caption, "rate", runs, run_rates)


def _run_table(
    caption: str, first: str, runs: Sequence[ResultFile], columns: Sequence[Mapping[str, Any]]
) -> Table | None:
    """Returns a table with one column per run and one line per setting, package or rate; None if there are no lines."""
    headers = [f"{run.machine['cpu'] or _gpu_names(run)}, {run.created[:10]}" for run in runs]
    # The run with the most settings, packages or rates determines the order of the table's lines.
    names = dict.fromkeys(name for values in sorted(columns, key=len, reverse=True) for name in values)
    lines = [[Entry(name), *(_entry(values.get(name)) for values in columns)] for name in names]
    return Table(caption, [first, *headers], lines, sortable=False) if lines else None


def _entry(value: Any) -> Entry:
    return Entry(NOTHING, empty=True) if value is None else Entry(str(value))


def _gpu_names(run: ResultFile) -> str:
    return ", ".join(str(gpu["name"]) for gpu in run.machine["gpu"])


def _value_text(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
