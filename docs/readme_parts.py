"""Writes the generated parts of README and docs/. A test checks that the pages contain the current generated parts."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from toolchain.artifacts.names import VariantName
from toolchain.artifacts.variants import is_variant
from toolchain.capacity.outcome import Outcome, choose_rows, plan_all
from toolchain.capacity.rows import HOUR_S, RowsGoal, RowsPlan, plan_rows
from toolchain.capacity.text import rows_lines
from toolchain.cli import cli
from toolchain.compare.report.columns import EXIT_COLUMNS, Column, columns, host_name
from toolchain.compare.report.markdown import to_markdown
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import Row, compare
from toolchain.explain.error_texts import error_page
from toolchain.predict.parts import CHUNK_ROWS
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BENCH = ROOT / "benchmarks" / "results" / "reference-xeon-2cores.json"
BENCH_GPU = BENCH.with_name("reference-h100.json")
BENCH_SERVER = BENCH.with_name("reference-epyc-server.json")
STUDIES = ROOT / "benchmarks" / "studies"
EXPORT_LOG = ROOT / "benchmarks" / "reports" / "make-export.txt"
FEW = ("torch-fp32", "torch-int8", "onnx-fp32", "onnx-int8", "onnx-pruned30-int8", "onnx-pruned50-int8")
WIDTH = 120  # characters in a line of a command's output
FEW_COLUMNS = ("accuracy", "p50", "throughput", "memory", "size")
CLAIM_DROP = 1.0  # largest accuracy drop, in points, of the models that the README compares
GOAL = RowsGoal(1e9, 6 * HOUR_S, 0.04)  # of the command on the page Plan capacity
# Assumptions of the page A billion texts: bytes of a text and of its answer, rows of a file, and bytes of a gigabyte.
TEXT_BYTES, ANSWER_BYTES, FILE_ROWS, GB = 100, 25, 1_000_000, 1e9
MARKED = re.compile(r"(<!-- begin: (.+?) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


def snippet(client: str) -> str:
    """Returns the code block for a client from the one page that contains it."""
    pattern = re.compile(rf"<!-- client: {client} -->\n```\w+\n(.*?)```", re.DOTALL)
    found = [match[1] for page in PAGES for match in pattern.finditer(page.read_text())]
    assert len(found) == 1, f"{len(found)} pages instead of 1 have code for the client {client}"
    return found[0]


def parts() -> dict[str, str]:
    """Returns the generated parts of all pages, as a mapping from the name of a part to the text of the part.

    In a page, a generated part stands between the lines `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
    """
    return {
        "make export": _export_log(),
        "make bench": _bench(BENCH),
        "make bench, few rows": _few_rows(BENCH),
        "make bench, gpu": _bench(BENCH_GPU),
        "bench, server": _bench(BENCH_SERVER),
        "plan, rows": _rows_plan(),
        "billion texts": _billion_texts(),
        "capacity": _study("capacity"),
        "exits": _exits(),
        "exits, base": _half_exits(),
        "make help": _targets(),
        "make variables": _variables(),
        "peers": _peers(),
        "peers, claim": _claim(),
        "passes": _study("passes"),
        "pruning": _text(script("pruning").table(json.loads(_file("pruning").read_text()))),
        "schemes": _schemes(),
        "clients": _study("clients"),
        "answers": _study("answers"),
        "browser": _study("browser"),
        "operators": _study("operators"),
        "memory": _study("memory"),
        "serving": _study("serving"),
        "precision": _study("precision"),
        "saturation": _study("saturation"),
        "commands": _commands(),
        "attacks": _attacks(),
        "errors": error_page(),
    }


def _text(content: str) -> str:
    return f"```text\n{content.rstrip()}\n```"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    rule = ["---"] + ["---:" if numbers else "---"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _export_log() -> str:
    """Returns the lines of the log of `make export` that report the builds of the variants in `FEW`."""
    lines = EXPORT_LOG.read_text().splitlines()
    return _text("\n".join(line for line in lines if line.split(": built in ")[0] in FEW))


def _bench(path: Path) -> str:
    return to_markdown(compare([ResultFile.read(path)])).strip()


def _rows_outcome() -> tuple[ResultFile, Outcome[RowsPlan]]:
    result = ResultFile.read(BENCH)
    rows = choose_rows(result, ("onnx-int8",))
    return result, plan_all(result, rows, lambda row, machines: plan_rows(row, machines, GOAL))


def _rows_plan() -> str:
    """Returns the output of the command on the page Plan capacity."""
    result, outcome = _rows_outcome()
    return _text("\n".join(rows_lines(result, GOAL, outcome, WIDTH)))


def _billion_texts() -> str:
    """Returns the table of the page A billion texts: quantities that follow from a plan and from assumptions."""
    result, outcome = _rows_outcome()
    plan, size = outcome.plans[0], next(row.size_bytes for row in result.rows if row.cell == outcome.plans[0].cell)
    assert size is not None
    seconds = plan.hours.value * HOUR_S
    read, written = GOAL.rows * TEXT_BYTES, GOAL.rows * (TEXT_BYTES + ANSWER_BYTES)
    parts_of_file = math.ceil(FILE_ROWS / CHUNK_ROWS)
    chunk_s = CHUNK_ROWS / plan.rows_per_s.value
    process_s = plan.processes * seconds
    lines = [
        ("bytes read", f"{read / GB:,.0f} GB", f"{read / seconds / 1e6:.1f} MB/s together"),
        ("bytes written", f"{written / GB:,.0f} GB", f"{written / seconds / 1e6:.1f} MB/s together"),
        ("bytes read by a process", f"{read / plan.processes / GB:.1f} GB", f"{read / process_s / 1e6:.2f} MB/s"),
        (
            "the model, sent to every process",
            f"{plan.processes * size['total'] / GB:.1f} GB",
            f"{plan.processes * size['total'] / read:.1%} of the bytes read",
        ),
        ("parts", f"{GOAL.rows / FILE_ROWS * parts_of_file:,.0f}", f"{parts_of_file} of each file"),
        ("time for a chunk", f"{chunk_s:.0f} s", f"{chunk_s / seconds:.2%} of the whole time"),
        ("lost with a worker", f"{chunk_s:.0f} s of a process", f"{chunk_s / process_s:.4%} of all process hours"),
        (
            "lost if all processes end at once",
            f"{plan.processes * chunk_s / 60:.0f} process minutes",
            f"{chunk_s / seconds:.2%} of all process hours",
        ),
    ]
    return _table(["quantity", "amount", "in proportion"], lines)


def _few_rows(path: Path) -> str:
    """Returns a table of the variants in `FEW`, below a line that describes the machine and the data."""
    return _chosen_cells(compare([ResultFile.read(path)]), FEW, FEW_COLUMNS)


def _exits() -> str:
    """Returns a table of the static int8 variants with and without exits, above the exits that the sentences use."""
    rows = compare([ResultFile.read(_file("peers"))], "onnx-int8-static")
    names = [row.measurement.variant for row in rows if is_variant(row.measurement.variant)]
    static_names = [name for name in names if VariantName(name).parts.static]
    columns_shown = ("accuracy", "mean", "p95", "throughput", "exits", "memory", "size")
    lines = [f"* {note}" for note in notes(rows) if note.split("@")[0] in static_names and " use no exit" in note]
    return "\n\n".join([_chosen_cells(rows, static_names, columns_shown), "\n".join(lines)])


def _half_exits() -> str:
    """Returns a table of the speed of an exit that half of the sentences use, beside the same model without exits."""
    rows = compare([ResultFile.read(STUDIES / "exits-base.json")], "optimum-cli-int8")
    names = ("optimum-cli-int8", "onnx-int8", "onnx-exits-int8+half")
    return _chosen_cells(rows, names, ("p95", "throughput"), EXIT_COLUMNS[:1])


def _chosen_cells(
    rows: Sequence[Row], variants: Sequence[str], names: Sequence[str], first: Sequence[Column] = ()
) -> str:
    """Returns a table of the columns `first` and the named columns, below a line about the machine and the data."""
    by_cell: dict[str, Row] = {row.measurement.cell: row for row in rows}
    chosen = [by_cell[f"{variant}@cpu"] for variant in variants]
    shown = [*first, *(column for column in columns(rows) if column.name in names)]
    data = rows[0].run.data
    title = f"{host_name(rows[0])}, {data['rows']} sentences of {data['name']}:"
    body = [[f"`{row.measurement.variant}`", *(column.text(row) for column in shown)] for row in chosen]
    return f"{title}\n\n{_table(['variant', *(column.header for column in shown)], body)}"


def script(name: str) -> ModuleType:
    """Imports a script from benchmarks/, which is not a package; the script may import other scripts of this folder."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # `dataclass` looks up the module of a class in `sys.modules`
    spec.loader.exec_module(module)
    return module


def _file(study: str) -> Path:
    return STUDIES / f"{study}-reference.json"


def _study(name: str) -> str:
    """Returns the results of the script benchmarks/NAME.py as the script prints them."""
    path = _file(name)
    study = ResultFile.read(path) if name in ("peers", "passes") else json.loads(path.read_text())
    return _text("\n".join(script(name).summary(study)))


def _peers() -> str:
    """Returns a table of all models of the comparison with other tools, fastest first: speed-up over one of them."""
    peers, study = script("peers"), ResultFile.read(_file("peers"))
    rows = [row for row in study.rows if row.status == "ok"]
    reference = next(row for row in rows if row.variant == peers.BASELINES[0])
    reference_samples = peers.require_samples(reference)
    header = ["model", "batch 1", f"batches of {study.run['batch_size']}", "accuracy", "p", "peak MB", "MB"]
    body = []
    for row in sorted(rows, key=lambda row: row.latency_ms["mean"]):
        speedups = [
            peers.ratio(own, other) for own, other in zip(peers.require_samples(row), reference_samples, strict=True)
        ]
        accuracy = f"{row.score.value:.2%}" if row.score else "–"
        peak, disk = row.memory_bytes.get("peak"), row.size_bytes["total"] / 1e6
        peak_text = f"{peak / 1e6:.0f}" if peak else "–"
        p = peers.mcnemar(row, reference, study)
        body.append([f"`{row.variant}`", *speedups, accuracy, p, peak_text, f"{disk:.1f}"])
    return _table(header, body)


def _claim() -> str:
    """Compares the toolchain's fastest model with the fastest model of another tool, in words.

    Both models lose at most `CLAIM_DROP` points of accuracy.
    """
    peers, study = script("peers"), ResultFile.read(_file("peers"))
    rows = sorted(
        (row for row in study.rows if row.status == "ok" and row.score), key=lambda row: row.latency_ms["mean"]
    )
    scores = {row.variant: 100 * row.score.value for row in rows if row.score}

    def fastest(is_own: bool) -> Measurement:
        return next(
            row
            for row in rows
            if is_variant(row.variant) == is_own and scores[row.variant] >= scores["onnx-fp32"] - CLAIM_DROP
        )

    ours, other = fastest(is_own=True), fastest(is_own=False)
    speedup = peers.ratio(*(peers.require_samples(row)[0] for row in (ours, other)))
    size = ours.size_bytes["total"] / other.size_bytes["total"]
    return (
        f"This comparison covers models that lose at most {CLAIM_DROP:g} point of accuracy to `onnx-fp32`. The fastest "
        f"model of the toolchain is `{ours.variant}` (accuracy {scores[ours.variant]:.2f} %). The fastest model of any "
        f"other tool is `{other.variant}` (accuracy {scores[other.variant]:.2f} %). For single sentences, the "
        f"toolchain's model is {speedup} as fast. Its size is {size:.0%} of the other model's size."
    )


def _schemes() -> str:
    """Returns a table of the reference model quantised by each scheme, with full and with trimmed vocabularies."""
    schemes, smallest = (ResultFile.read(_file(name)) for name in ("schemes", "smallest"))
    rows = {row.variant: row for row in schemes.rows}
    smaller = {row.variant: row for row in smallest.rows if row.provider == "cpu"}
    lines: list[tuple[str, Measurement, Measurement]] = [
        ("`onnx-fp32`", rows["onnx-fp32"], rows["onnx-fp32"]),
        ("`onnx-int8`", rows["onnx-int8"], rows["onnx-fp32"]),
        ("`onnx-int8-static`", rows["onnx-int8-static"], rows["onnx-fp32"]),
        ("`onnx-int8`, trimmed", rows["onnx-int8+trimmed"], rows["onnx-fp32"]),
        ("`onnx-int8`, 4-bit tables", rows["onnx-int8+small"], rows["onnx-fp32"]),
        ("`onnx-int8`, 4-bit tables, trimmed", rows["onnx-int8+small-trimmed"], rows["onnx-fp32"]),
        ("`onnx-int4`", rows["onnx-int4"], rows["onnx-fp32"]),
        ("`onnx-int4`, trimmed", rows["onnx-int4+trimmed"], rows["onnx-fp32"]),
        ("`onnx-pruned40-r1-int4`, trimmed", smaller["onnx-pruned40-r1-int4"], smaller["onnx-fp32"]),
    ]
    body = [
        [
            name,
            f"{row.size_bytes['total'] / 1e6:.1f}",
            f"{row.score.value:.2%}" if row.score else "–",
            str(sum(a != b for a, b in zip(row.predictions, base.predictions, strict=True))),
            str(row.batch_changed),
        ]
        for name, row, base in lines
    ]
    vocabulary = rows["onnx-int8+trimmed"].facts["vocabulary"]
    note = (
        f"Trimming keeps {vocabulary['kept']:,} of the {vocabulary['of']:,} tokens. "
        f"Of {schemes.data['rows']} sentences, *flips* counts those whose label differs from the label of `onnx-fp32`."
    )
    return f"{_table(['variant', 'MB', 'accuracy', 'flips', 'labels that batching changes'], body)}\n\n{note}"


def _commands() -> str:
    rows = [[f"`{name}`", command.get_short_help_str(200)] for name, command in cli.commands.items()]
    return _table(["command", "does"], rows, numbers=False)


def _targets() -> str:
    found = re.findall(r"^([a-z-]+):.*?## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return _table(["target", "does"], [[f"`make {name}`", text] for name, text in found], numbers=False)


def _variables() -> str:
    found = re.findall(r"^([A-Z_]+) \?=(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    rows = [[f"`{name}`", f"`{value.strip()}`" if value.strip() else "empty"] for name, value in found]
    return _table(["variable", "default"], rows, numbers=False)


def _attacks() -> str:
    """Returns the table of the attacks on foreign files, with the number of cases in `make test`."""
    path = ROOT / "tests" / "hostile" / "attacks.py"
    attacks = runpy.run_path(str(path))["ATTACKS"]
    rows = [[name, reader, str(cases)] for name, (reader, cases) in attacks.items()]
    return _table(["files", "read by", "cases"], rows, numbers=False)


def filled(text: str, contents: dict[str, str]) -> str:
    """Returns the text of a page with all generated parts replaced by new ones."""
    return MARKED.sub(lambda match: f"{match[1]}{contents[match[2]]}\n{match[3]}", text)


if __name__ == "__main__":
    made = parts()
    for page in PAGES:
        if (new := filled(page.read_text(), made)) != page.read_text():
            page.write_text(new)
            print(f"written: {page.relative_to(ROOT)}")
