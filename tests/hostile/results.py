"""Result files and journals: valid files of every task, and the commands that read them."""

import contextlib
import dataclasses
import json
import random
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

from conftest import TESTS  # noqa: F401 - makes the modules of tests/ importable
from hostile.harness import RefusedError, call
from instant_worker import InstantWorker
from rich_rows import exits_row, rich_result
from sample_results import EXITS, NO_GPU, measured_row, result
from service_samples import measured, measured_result

from toolchain.artifacts import store
from toolchain.artifacts.manifest import Manifest, TensorSpec
from toolchain.artifacts.steps import Import
from toolchain.artifacts.store import Artifact
from toolchain.backends import Backend
from toolchain.bench import runner
from toolchain.bench.cells import Cell
from toolchain.bench.journal import Journal
from toolchain.bench.run import make_result
from toolchain.bench.scenarios import Protocol
from toolchain.capacity import replicas
from toolchain.compare.rows import compare
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.data.labels import MULTI, REGRESSION, SINGLE, TOKENS, LabelSet
from toolchain.results.measurements import QUANTILES_OF, Measurement, Samples
from toolchain.results.scores import score_answers
from toolchain.results.session_file import Choice, Screened, SessionData, SessionFile
from toolchain.results.session_settings import AppSettings
from toolchain.results.statistics import Ratio

TASKS = {
    MULTI: (("a", "b", "c"), [1, 3, 7, 0, 5, 2], [1, 3, 6, 0, 5, 1]),
    REGRESSION: (("score",), [0.5, 1.0, 2.5, 3.0, 0.25, 1.5], [0.25, 1.5, 2.5, 3.5, 0.0, 2.0]),
    TOKENS: (
        ("O", "B-X", "I-X"),
        [(0, 1), (1, 2, 2), (0,), (), (1,), (0, 0)],
        [(0, 1), (1, 2, 0), (1,), (), (1,), (0, 0)],
    ),
}


def _task_result(task):
    names, labels, answers = TASKS[task]
    rows = []
    for variant, ms, predictions in (("torch-fp32", 8, labels), ("onnx-int8", 1, answers)):
        score = score_answers(predictions, labels, LabelSet(names, task))
        chances = tuple((5000,) * len(names) for _ in labels) if task == MULTI else ()
        figures = {"score": score, "score_batched": score, "predictions": tuple(predictions), "probabilities": chances}
        rows.append(measured_row(variant, ms, model="m", **figures))
    data = {
        "name": "d",
        "rows": len(labels),
        "sha256": task,
        "labels": labels,
        "label_names": list(names),
        "task": task,
    }
    return result(*rows, data=data, run={"threads": 2, "batch_size": 32, "id": task})


def _facts():
    """Returns facts of every kind."""
    answers = {"rows": 10, "flips": 1, "right_before": 9, "right_after": 8}
    return {
        "session": {
            **{"provider": "CPUExecutionProvider", "threads": 2, "nodes": {"CPUExecutionProvider": 9}},
            **{"note": "the size", "fallback": "1 of 9 nodes run on the CPU", "option": ["an.option", "1"]},
        },
        "rewrites": {"fuse": 3},
        "vocabulary": {"kept": 9, "of": 10, "bytes_saved": 100, "held_out": answers, "out_of_domain": answers},
        "exactness": {"option": ["an.option", "1"], "time": {"value": 1.5, "low": 1.25, "high": 1.75}},
        "note": "a remark",
    }


def write_results(folder: Path) -> None:
    """Writes one result file of each task, one with published figures and one with facts of every kind."""
    rich = rich_result(created="2026-01-02T00:00:00+00:00")
    rich.rows[2].facts.update(_facts())
    early = exits_row("onnx-exits-int8", 0.5, {1}, 1)
    rich = dataclasses.replace(rich, rows=(*rich.rows, early))
    gpu = {"peak": 10**9, "load": 10**8, "method": "NVML"}
    rich.rows[3].memory_bytes.update({"gpu": gpu, "bare": 5})
    rich.machine["gpu"] = [{"name": "GPU", "memory_bytes": 10**10, "compute_capability": "9.0"}]
    rich.write(folder / "single.json")
    for task in TASKS:
        _task_result(task).write(folder / f"{task}.json")
    published = Measurement("m", "torch-fp32", "cuda", None, "reported", latency_ms={"mean": 9.0, "p50": 8.0})
    run = {"id": "x", "source": "a page", "method": "a notebook"}
    result(published, NO_GPU, run=run).write(folder / "published.json")


def list_results(folder: Path) -> list[Path]:
    """Returns the result files, the one with most facts three times."""
    return [*folder.glob("*.json"), *[folder / "single.json"] * 2]


def repair_results(folder: Path) -> None:
    """Computes figures and scores again from samples and answers, in files whose parts have the right types."""
    for file in folder.glob("*.json"):
        with contextlib.suppress(Exception):  # the mutation removed what the repair needs
            body = json.loads(file.read_text())
            labels = [tuple(a) if isinstance(a, list) else a for a in body["labels"]]
            body["data"]["rows"] = len(labels) or body["data"]["rows"]
            for row in body["rows"]:
                _repair_row(row, labels, body["data"])
            file.write_text(json.dumps(body))


def _repair_row(row, labels, data):
    for name, source in QUANTILES_OF.items():
        if stored := row["samples"].get(source):
            row[name] = Samples(stored["rounds"], stored["sentences"], stored["count"]).milliseconds()
    if stored := row["samples"].get("batches"):
        row["throughput_per_s"] = Samples(stored["rounds"], stored["sentences"], stored["count"]).per_second()
    if row.get("predictions") and labels:
        answers = [tuple(a) if isinstance(a, list) else a for a in row["predictions"]]
        label_set = LabelSet(tuple(data.get("label_names", ())), data.get("task", SINGLE))
        score = score_answers(answers, labels, label_set)
        row[score.key] = {**row[score.key], **score.to_json(), "batch_size": row[score.key]["batch_size"]}


FORMS = ("table", "markdown", "latex", "csv", "json")
CHECKS = ((), (), ("--max-drop", "1"), ("--max-size-mb", "30", "--max-p95-ms", "5", "--max-memory-mb", "500"))


def compare_results(folder: Path, rng: random.Random) -> None:
    """Compares all files in one format; then checks limits, or compares two files."""
    files = sorted(folder.glob("*.json"))
    call("compare", *files, "--format", rng.choice(FORMS), "--exported", folder / "exported")
    options = [*rng.choice(CHECKS), *rng.choice(((), ("--against", rng.choice(files))))]
    with contextlib.suppress(RefusedError):  # no row is within the limits, or the runs cannot be compared
        call("compare", rng.choice(files), *options, "--sort", rng.choice(("accuracy", "size", "latency")))


def report_results(folder: Path, rng: random.Random) -> None:
    """Writes the HTML report with its plots."""
    call("compare", *sorted(folder.glob("*.json")), "--format", "html", "--exported", folder / "exported")


def write_service_times(folder: Path) -> None:
    """Writes a result file with the times of batches and of pauses."""
    slow = measured(9000.0, variant="torch-fp32", rounds=3, wake_us={0: 0, 1000: 500})
    measured_result(measured(wake_us={0: 0, 1000: 200, 16_000: 1000}), slow).write(folder / "service.json")


GOALS = (("--rows", "1e9", "--within", "1h"), ("--qps", "800", "--p99-ms", "50"), ("--qps", "1e5", "--p99-ms", "1e6"))


def plan_capacity(folder: Path, rng: random.Random) -> None:
    """Plans one of the goals, with short simulations."""
    with patch.multiple(replicas, QUERIES=200, SEEDS=4):
        call("plan", folder / "service.json", *rng.choice(GOALS), "--price", "0.04")


TEXTS = tuple(f"sentence number {i} {'word ' * (i % 7)}" for i in range(24))
PROTOCOL = Protocol(
    passes=1,
    min_s=0.001,
    pass_s=40,
    starts=2,
    threads=1,
    batch_size=8,
    by_length=True,
    service_times=True,
    server_qps=100.0,
)


_FAKE = {"fake": Backend("fake:Fake", ("json",))}
_MODEL = inputs.SST2.parent / "model"
_encoder: list[Encoder] = []


def _cells(folder):
    tensors = tuple(TensorSpec(n, "int64", ("batch_size", "sequence_length")) for n in ("input_ids", "attention_mask"))
    cells = []
    for name in ("torch-fp32", "onnx-int8"):
        if not (folder / name).exists():
            (folder / name).mkdir()
            (folder / name / "file").write_text("x")
        common = {"source": {}, "parent": None, "parent_id": None, "step": Import(), "step_version": 1, "outputs": ()}
        manifest = Manifest(
            model="m",
            variant=name,
            files=store.list_files(folder / name),
            inputs=tensors,
            labels=("NEGATIVE", "POSITIVE"),
            max_length=128,
            facts={"int8_headroom": 0.5, "exits": EXITS} if name == "onnx-int8" else {"int8_headroom": 0.5},
            **common,
        )
        cells.append(Cell("m", name, "fake", "cpu", Artifact(folder / name, manifest)))
    return [*cells, Cell("m", "onnx-fp16", "fake", "cuda", None, "unavailable", "No GPU.", "Get one.")]


_HEAD = {"cells": [0, 1, 2], "protocol": asdict(PROTOCOL)}


def _bench(folder, journal):
    if not _encoder:
        _encoder.append(Encoder.open(_MODEL, ("input_ids", "attention_mask"), 128))
    saved = runner.Worker, runner.SETTLE_S
    runner.Worker, runner.SETTLE_S = InstantWorker, 0.0
    try:
        data = Data("fake", TEXTS, tuple(i % 2 for i in range(len(TEXTS))))
        rows, facts = runner.bench(_cells(folder), data, _encoder[0], PROTOCOL, lambda *_: None, _FAKE, journal)
        return make_result(rows, facts, data, 128)
    finally:
        runner.Worker, runner.SETTLE_S = saved


def write_journal(folder: Path) -> None:
    """Writes the journal of a complete run, which `bench` has not ended."""
    journal = Journal.begin(folder / "output" / "m-20260101T000000Z.journal", _HEAD)
    _bench(folder, journal)
    failure = {"type": "BenchError", "cause": "It crashed.", "mend": "Look."}
    lines = journal.path.read_text().splitlines()
    records = [json.loads(line) for line in lines[1:]]
    failed = [{"cell": 0, "kind": "failure", "turn": None, "reply": failure}]
    body = "\n".join([*lines, *map(json.dumps, failed)]) + "\n"
    (folder / "output" / "failed.journal").write_text(body)
    half = "\n".join(lines[: len(records) // 2]) + "\n"
    (folder / "output" / "half.journal").write_text(half)


def resume_journals(folder: Path, rng: random.Random) -> None:
    """Resumes each journal, and makes and compares the result file of the run."""
    for file in sorted((folder / "output").glob("*.journal")):
        journal = Journal.resume(file, _HEAD)
        compare([_bench(folder, journal)])[0].to_json()


def write_session(folder: Path) -> None:
    """Writes a session file with a default choice, two better choices and an alternative."""
    default, tried, compared = AppSettings(4), AppSettings(2), Ratio(1.5, 1.4, 1.6)
    better = Choice.from_comparison(default, tried, compared)
    batched = Choice.from_comparison(AppSettings(4, batch_size=32), AppSettings(4, batch_size=8), compared)
    content = SessionFile(
        "2026-01-01T00:00:00+00:00",
        "1",
        {"id": "m", "cpu": "c", "cores": 4, "ram_gib": 8, "isa": ["avx2"], "gpu": []},
        "m",
        "onnx-int8",
        "0" * 64,
        SessionData("d", "1" * 64, 872),
        Choice(default, default),
        batched,
        better,
        (Screened("threads", "latency", tried, compared),),
    )
    (folder / "session.json").write_text(content.to_text())


def read_session(folder: Path, rng: random.Random) -> None:
    """Reads the session file, describes its choices, and writes it again."""
    session = SessionFile.read(folder / "session.json")
    for choice in session.choices.values():
        choice.settings.summary(choice.default)
    session.to_text()
