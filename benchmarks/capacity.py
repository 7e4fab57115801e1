"""Holds the latency that `toolchain plan --qps` predicts against the measured latency of the same variant.

    python benchmarks/capacity.py [--exported exported] [--variant onnx-int8]

The script first searches the highest rate of random arrivals that keeps a p99 of 50 ms. In each round, it then measures
the samples that a plan needs (single sentences, mixed batches, and single sentences after pauses), and the scenario
`server` at 50, 70 and 90 % of this rate, in random order. The simulation of `toolchain.capacity` predicts p50 and p99
at each rate from the samples alone. Of measured and of simulated queries, the first 10 % do not count, because they
meet a queue that began empty. The script takes about 11 minutes, or 4 with --quick, needs a machine without other work,
and writes benchmarks/studies/capacity-reference.json. It exits with 1 if a predicted p99 differs from the measured one
by more than 15 %.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from toolchain.artifacts.store import Artifact
from toolchain.backends import BACKENDS
from toolchain.bench import scenarios, server
from toolchain.bench.noise import Noise
from toolchain.bench.process import Worker
from toolchain.bench.scenarios import MIXED, PAUSED, PAUSES_US, SINGLE, SLICES, Protocol
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.capacity.load import Load
from toolchain.capacity.queueing import Batching
from toolchain.capacity.replicas import FIRST_SEED, SEEDS, WARM_UP, Latency, simulate
from toolchain.capacity.service import Service, service_of
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.results.measurements import Measurement, Samples
from toolchain.system import hardware

STUDY = Path(__file__).parent / "studies" / "capacity-reference.json"
P99_MS = 50.0
SHARES = (0.5, 0.7, 0.9)
SEED = 20
TIMEOUT_S = 600
TOLERANCE = 0.15
RESAMPLES = 1000


@dataclass
class Taken:
    """What the rounds measured.

    Attributes:
        single_us: Times of single sentences with tokenising, by round.
        mixed_us: Times of mixed batches with tokenising, by round.
        sizes: Number of sentences of each mixed batch, by round.
        paused_us: Times of single sentences with tokenising, by round and by pause.
        served_us: Latencies of the scenario `server` after the warm-up, by share of the highest rate and by round.
        mean_batches: Mean number of sentences in a batch of the scenario `server`, in the same order.
    """

    single_us: list[list[int]] = field(default_factory=list)
    mixed_us: list[list[int]] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    paused_us: list[list[list[int]]] = field(default_factory=list)
    served_us: dict[float, list[list[int]]] = field(default_factory=dict)
    mean_batches: dict[float, list[float]] = field(default_factory=dict)

    def service(self) -> Service:
        """Returns the service times that the samples of all rounds give, as a result file states them."""
        return service_of(
            Measurement(
                *("reference", "measured", "cpu", None, "ok"),
                with_tokenizing=Samples.from_single(self.single_us),
                mixed_batches=Samples.from_rounds(self.mixed_us, self.sizes),
                after_pause={
                    pause_us: Samples.from_single([us[index] for us in self.paused_us])
                    for index, pause_us in enumerate(PAUSES_US)
                },
            )
        )


class Variant:
    """A running process of a variant, with the sentences that it answers."""

    def __init__(self, worker: Worker, texts: Sequence[str], token_counts: Sequence[int], protocol: Protocol) -> None:
        self._worker, self._token_counts, self._protocol = worker, token_counts, protocol
        self._sentences = scenarios.choose_sentences(len(texts), 0, protocol)
        self.noise = Noise()

    def highest_rate(self) -> float:
        """Returns the highest rate that keeps the p99; raises `ClickException` if there is none."""
        us, tokenizing_us = self._run([[index] for index in self._sentences[: SLICES * 10]])
        single_qps = 1e6 * len(us) / (sum(us) + sum(tokenizing_us))
        turns: list[server.Turn] = []
        while rate := server.next_rate(turns, self._protocol, single_qps):
            reply, planned = self._serve(len(turns), *rate)
            turns.append(server.Turn(*rate, planned, reply["us"], reply["sizes"]))
        qps = server.outcome(turns, self._protocol).qps
        if not qps:
            raise click.ClickException(f"No rate keeps a p99 of {P99_MS:g} ms.")
        return qps

    def measure(self, taken: Taken, turn: int, share: float | str, qps: float) -> None:
        """Measures one part of a round: samples (`SINGLE`, `MIXED` or `PAUSED`), or the scenario `server` at a rate."""
        if share == SINGLE:
            us, tokenizing_us = self._run([[index] for index in self._sentences[turn % SLICES :: SLICES]])
            taken.single_us.append([one + other for one, other in zip(us, tokenizing_us, strict=True)])
        elif share == MIXED:
            batches = scenarios.mixed_batches(turn, self._sentences, self._token_counts, self._protocol)
            us, tokenizing_us = self._run(batches)
            taken.mixed_us.append([one + other for one, other in zip(us, tokenizing_us, strict=True)])
            taken.sizes.append(list(map(len, batches)))
        elif share == PAUSED:
            batches = scenarios.paused_sentences(turn, self._sentences, self._protocol)
            message = {"do": "pauses", "batches": batches, "pauses_us": PAUSES_US}
            taken.paused_us.append(self._ask(message)["us"])
        else:
            rate = float(share)
            reply, planned = self._serve(turn, qps * rate, is_search=False)
            if len(reply["us"]) < planned:
                raise click.ClickException(f"At {rate:.0%} of the highest rate, queries waited for too long.")
            taken.served_us.setdefault(rate, []).append(reply["us"][int(WARM_UP * planned) :])
            taken.mean_batches.setdefault(rate, []).append(len(reply["us"]) / len(reply["sizes"]))

    def _run(self, batches: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Returns the microseconds of each batch, and those of tokenising it."""
        reply = self._ask({"do": "run", "batches": batches, "warmup": 2, "tokenizing": True})
        return reply["us"][0], reply["tokenizing_us"]

    def _serve(self, turn: int, qps: float, is_search: bool) -> tuple[dict[str, Any], int]:
        """Returns the reply to queries at a rate, and the number of planned queries."""
        work = server.plan(turn, qps, is_search, self._sentences, self._protocol)
        return self._ask(work.message(self._protocol.batch_size)), len(work.sentences)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with self.noise.watch([self._worker.pid]):
            return self._worker.ask(message, TIMEOUT_S)


@contextmanager
def start(artifact: Artifact, protocol: Protocol) -> Iterator[Variant]:
    """Starts the process of a variant, and ends it with the context."""
    texts = list(map(str, inputs.load_embedded().texts))
    manifest = artifact.manifest
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    backend = BACKENDS["onnx"]
    worker = Worker(
        backend.session, artifact.path, protocol.place("cpu"), encoder, texts[0], backend.imports, backend.python
    )
    try:
        worker.load(TIMEOUT_S)
        worker.ask({"do": "data", "texts": texts, "lengths": []}, TIMEOUT_S)
        yield Variant(worker, texts, list(map(len, encoder.encode(texts))), protocol)
    finally:
        worker.close()


def measure(variant: Variant, qps: float, rounds: int) -> Taken:
    """Measures every part once in each round, in random order."""
    parts: list[float | str] = [SINGLE, MIXED, PAUSED, *SHARES]
    taken = Taken()
    with bar("capacity") as progress:
        for turn in range(rounds):
            for done, part in enumerate(random.Random(SEED + turn).sample(parts, len(parts))):
                progress(turn * len(parts) + done, rounds * len(parts), f"round {turn + 1}, {part}")
                variant.measure(taken, turn, part, qps)
    return taken


def rows_of(taken: Taken, qps: float, protocol: Protocol) -> list[dict[str, Any]]:
    """Returns, for each rate, the measured and the predicted quantiles in milliseconds, and their ratios."""
    service, rows = taken.service(), []
    for share in SHARES:
        served_us = taken.served_us[share]
        counted = sum(map(len, served_us))
        seeds = range(FIRST_SEED, FIRST_SEED + SEEDS)
        batching = Batching(min(protocol.batch_size, service.sizes[-1]))
        predicted = simulate(service, Load(qps * share), batching, 1, seeds, queries=round(counted / (1 - WARM_UP)))
        row: dict[str, Any] = {"share": share, "qps": round(qps * share, 2), "queries": counted}
        for name, quantile in (("p50", 0.5), ("p99", 0.99)):
            row[name] = compare(served_us, quantile, predicted, name)
        row["mean_batch"] = {
            "measured": round(float(np.mean(taken.mean_batches[share])), 2),
            "predicted": round(predicted.mean_batch, 2),
        }
        rows.append(row)
    return rows


def compare(served_us: Sequence[Sequence[int]], quantile: float, predicted: Latency, name: str) -> dict[str, Any]:
    """Returns one quantile as it was measured and as it was predicted, in milliseconds, and predicted / measured.

    The interval of the measured quantile is the bootstrap interval over rounds. The interval of the predicted one
    contains 95 % of the simulations.
    """
    value = float(np.quantile(np.concatenate(served_us), quantile)) / 1000
    rng, rounds = np.random.default_rng(SEED), [np.array(times) / 1000 for times in served_us]
    chosen = rng.integers(len(rounds), size=(RESAMPLES, len(rounds)))
    resampled = [np.quantile(np.concatenate([rounds[index] for index in row]), quantile) for row in chosen]
    low, high = np.quantile(resampled, (0.025, 0.975))
    bounded = (predicted.p50_s if name == "p50" else predicted.p99_s).scaled(1000)
    return {
        "measured_ms": {"value": round(value, 3), "low": round(float(low), 3), "high": round(float(high), 3)},
        "by_round_ms": [round(float(np.quantile(times, quantile)), 3) for times in rounds],
        "predicted_ms": {key: round(each, 3) for key, each in bounded.to_json().items()},
        "ratio": round(bounded.value / value, 3),
    }


@click.command()
@click.option("--variant", default="onnx-int8", show_default=True, help="The ONNX variant.")
@click.option("--rounds", type=click.IntRange(6), default=16, show_default=True, help="Rounds of the measurement.")
@click.option("--round-s", default=9.0, show_default=True, help="Seconds of each rate in a round.")
@click.option("--quick", is_flag=True, help="Measure 8 rounds with 5 seconds of each rate.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--exported", type=click.Path(path_type=Path), default=Path("exported"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=STUDY, show_default=True)
def main(variant: str, rounds: int, round_s: float, quick: bool, threads: int, exported: Path, output: Path) -> None:
    """Measures samples and rates, predicts the latencies, saves the study and prints it."""
    rounds, round_s = (8, 5.0) if quick else (rounds, round_s)
    protocol = Protocol(1, round_s, 60.0, 1, threads, service_times=True, server_p99_ms=P99_MS, seed=SEED)
    artifact = ensure(Workspace.open("reference", exported), [variant], {}, say)[variant]
    with start(artifact, protocol) as running:
        qps = running.highest_rate()
        taken = measure(running, qps, rounds)
    body = {
        "schema": 1,
        "machine": hardware.machine(),
        "variant": variant,
        "threads": threads,
        "rounds": rounds,
        "round_s": round_s,
        "highest_qps": qps,
        "p99_ms": P99_MS,
        "noise": running.noise.shares(),
        "rows": rows_of(taken, qps, protocol),
    }
    output.write_text(json.dumps(body, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)
    if any(abs(row["p99"]["ratio"] - 1) > TOLERANCE for row in body["rows"]):
        raise click.ClickException(f"A predicted p99 differs from the measured one by more than {TOLERANCE:.0%}.")


def summary(body: dict[str, Any]) -> list[str]:
    """Returns the results of this benchmark as the lines of a text table."""
    lines = [
        f"{body['variant']}, {body['threads']} thread{'s' if body['threads'] > 1 else ''}; highest rate with a p99 of "
        f"{body['p99_ms']:g} ms: {body['highest_qps']:g} queries/s",
        f"{'rate':>14} {'p50 ms':>8} {'predicted':>10} {'ratio':>6} {'p99 ms':>8} {'95 % interval':>16} "
        f"{'predicted':>10} {'95 % interval':>16} {'ratio':>6}",
    ]
    for row in body["rows"]:
        p50, p99 = row["p50"], row["p99"]
        lines.append(
            f"{row['share']:>5.0%} {row['qps']:6.1f}/s {p50['measured_ms']['value']:8.2f} "
            f"{p50['predicted_ms']['value']:10.2f} {p50['ratio']:6.2f} {p99['measured_ms']['value']:8.2f} "
            f"{_interval(p99['measured_ms']):>16} {p99['predicted_ms']['value']:10.2f} "
            f"{_interval(p99['predicted_ms']):>16} {p99['ratio']:6.2f}"
        )
    return lines


def _interval(figure: dict[str, float]) -> str:
    return f"[{figure['low']:.2f}, {figure['high']:.2f}]"


if __name__ == "__main__":
    main()
