"""Measures where the time of single sentences goes: tokenising, the graph, and each kind of operator of the graph.

    python benchmarks/operators.py [--exported exported] [--variant NAME ...]

The script runs the ONNX variants on one thread, one validation sentence at a time. In each round, it measures all
variants in random order: first the time of tokenising and of `Session.run`, then, with the profiler of ONNX Runtime,
the time of each operator. The profiler itself takes time for each node, so only the shares of the operators count. The
script writes benchmarks/studies/operators-reference.json.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import onnxruntime as ort

from toolchain.artifacts.store import Artifact
from toolchain.backends.ort import session_options
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.system import hardware

STUDY = Path(__file__).parent / "studies" / "operators-reference.json"
DEFAULTS = ("onnx-fp32", "onnx-int8", "onnx-int8-static")
SEED = 20
SHOWN = 0.03  # smallest share of the operators' time that an operator needs for a line of its own
TOKENISING, RUN = "tokenising", "Session.run"


class Subject:
    """A variant with two sessions of ONNX Runtime, one of them with the profiler."""

    def __init__(self, artifact: Artifact, scratch: Path) -> None:
        manifest = artifact.manifest
        self.encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
        self._artifact, self._scratch = artifact, scratch
        self.session = self._open(session_options(1))

    def _open(self, options: Any) -> ort.InferenceSession:
        return ort.InferenceSession(str(self._artifact.onnx_path), options, providers=["CPUExecutionProvider"])

    def batches(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Tokenises each text, and returns the inputs of the graph for each text alone."""
        return [
            pad([ids], self.encoder.names, self.encoder.pad_id) for text in texts for ids in self.encoder.encode([text])
        ]

    def profile(self, texts: Sequence[str]) -> dict[str, float]:
        """Returns the mean microseconds of each operator for a text."""
        options = session_options(1)
        options.enable_profiling = True
        options.profile_file_prefix = str(self._scratch / "profile")
        session, batches = self._open(options), self.batches(texts)
        for batch in batches:
            session.run(None, batch)
        file = Path(session.end_profiling())
        events = json.loads(file.read_text())
        file.unlink()
        return {operator: us / len(texts) for operator, us in operator_times(events).items()}


def operator_times(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the microseconds of each kind of operator.

    An `If` node has no line of its own: its time contains the time of the nodes in its branch, which have events of
    their own.
    """
    times: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            if operator != "If":
                times[operator] += event["dur"]
    return times


def mean_us(call: Callable[[], object], count: int) -> float:
    """Returns the microseconds of a call, divided by `count`."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6 / count


def measure_once(subject: Subject, texts: Sequence[str]) -> dict[str, float]:
    """Returns the mean microseconds of a text for tokenising, for the graph, and for each profiled operator."""
    batches = subject.batches(texts)
    tokenising = mean_us(lambda: subject.batches(texts), len(texts))
    running = mean_us(lambda: [subject.session.run(None, batch) for batch in batches], len(texts))
    return {TOKENISING: tokenising, RUN: running, **subject.profile(texts)}


def median_parts(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the median over the rounds of each part of the work, the largest part first."""
    medians = {name: round(statistics.median(each.get(name, 0.0) for each in rounds), 1) for name in rounds[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


@click.command()
@click.option("--variant", "variants", multiple=True, help="Add this ONNX variant. Can be repeated.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
def main(variants: tuple[str, ...], rounds: int, exported: Path) -> None:
    """Measures the parts of each variant's time, saves the study and prints it."""
    names = (*DEFAULTS, *variants)
    artifacts = ensure(Workspace.open("reference", exported), names, {}, say)
    texts = list(inputs.load_embedded().texts)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch, bar("operators") as progress:
        subjects = {name: Subject(artifacts[name], Path(scratch)) for name in names}
        for turn in range(rounds):
            progress(turn, rounds, "rounds")
            for name in random.Random(SEED + turn).sample(names, len(names)):
                results[name].append(measure_once(subjects[name], texts))
    rows = {name: median_parts(each) for name, each in results.items()}
    body = {"schema": 1, "machine": hardware.machine(), "rounds": rounds, "texts": len(texts), "microseconds": rows}
    STUDY.write_text(json.dumps(body, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)


def summary(body: Mapping[str, Any]) -> list[str]:
    """Returns the results of this benchmark as the lines of a text table, the largest operators first."""
    lines = []
    for name, row in body["microseconds"].items():
        lines.append(f"{name}: {row[TOKENISING]:.0f} µs for tokenising, {row[RUN]:.0f} µs for the graph, of which")
        operators = {operator: us for operator, us in row.items() if operator not in (TOKENISING, RUN)}
        shares = {operator: us / sum(operators.values()) for operator, us in operators.items()}
        shown = {operator: share for operator, share in shares.items() if share >= SHOWN}
        shown["all other operators"] = 1 - sum(shown.values())
        lines += [f"  {operator:24} {share:6.1%}" for operator, share in shown.items()]
    return lines


if __name__ == "__main__":
    main()
