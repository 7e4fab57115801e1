"""Measures Triton, the predictor for KServe and Ray Serve under load, on bundles of the reference model.

    make test-clients
    python benchmarks/serving.py

The servers run on this machine and answer on loopback, each with one thread for the model; Ray Serve has one replica. 1
to 32 clients send single validation sentences. Each client sends its next request when it has the answer to the last
one. In each round, every server starts once, in random order, and runs alone: Ray's own processes also compute when no
request arrives. Then each number of clients has its turn, in random order. In the end, 8 clients send requests to each
server for `--soak-s` seconds. A request is lost if the server does not answer it with the status 200 and with its id.

Triton runs here with a Python stand-in for its ONNX Runtime backend, `tests/clients/triton_backend.py`, because no
Python package contains this backend. The script takes about 22 minutes, and writes
benchmarks/studies/serving-reference.json. It exits with 1 if a server lost a request.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from toolchain.build.workspace import Workspace
from toolchain.cli.progress import bar, say
from toolchain.data import inputs
from toolchain.progress import no_bar
from toolchain.results import statistics
from toolchain.ship import shipping
from toolchain.ship.bundle_files.classify import Classifier
from toolchain.ship.shipping import Order
from toolchain.system import hardware

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "studies" / "serving-reference.json"
VARIANT = "onnx-int8"
CLIENTS = (1, 2, 4, 8, 16, 32)
SOAK_CLIENTS = 8
WARM_UP_S = 1
TIMEOUT_S = 30
SEED = 23
STAND_IN = "a Python stand-in for Triton's ONNX Runtime backend"

sys.path.insert(0, str(ROOT / "tests"))
import servers  # noqa: E402 (the tests' servers)


@dataclass
class Load:
    """What the clients of one run saw.

    Attributes:
        times_us: Time of each answered request, in microseconds.
        lost: Number of requests without a right answer, by reason.
        flips: Number of answers whose label differs from the label of the same model in Python.
        seconds: Time from the first request to the last answer.
    """

    times_us: list[int] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    flips: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Returns throughput and quantiles of one run, in milliseconds; only counts if no request was answered."""
        lost = {"lost": self.lost.total(), "lost_by_reason": dict(self.lost)}
        counts = {"requests": len(self.times_us), **lost, "flips": self.flips}
        if not self.times_us:
            return counts
        quantiles = np.quantile(self.times_us, (0.5, 0.99, 1)) / 1000
        names = ("p50_ms", "p99_ms", "largest_ms")
        figures = dict(zip(names, (round(float(each), 3) for each in quantiles), strict=True))
        return {**counts, "throughput_per_s": round(len(self.times_us) / self.seconds, 2), **figures}


def run_clients(port: int, model: str, count: int, seconds: float, labels: Mapping[str, int]) -> Load:
    """Lets clients send sentences for some time; each client keeps one connection open.

    Args:
        port: Port of the server on loopback.
        model: Name of the model on the server.
        count: Number of clients.
        seconds: Time after which the clients send no new request.
        labels: Sentence → index of its label in Python.
    """
    loads = [Load() for _ in range(count)]
    barrier = threading.Barrier(count + 1)

    def run(number: int) -> None:
        texts = random.Random(SEED + number).sample(list(labels), len(labels))
        barrier.wait()
        _send_until(time.perf_counter() + seconds, port, model, number, texts, labels, loads[number])

    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(run, number) for number in range(count)]
        barrier.wait()
        started = time.perf_counter()
        for each in waiting:
            each.result()
        elapsed = time.perf_counter() - started
    return Load(
        [value for load in loads for value in load.times_us],
        sum((load.lost for load in loads), Counter()),
        sum(load.flips for load in loads),
        elapsed,
    )


def _send_until(
    end: float, port: int, model: str, number: int, texts: Sequence[str], labels: Mapping[str, int], load: Load
) -> None:
    """Sends texts one after the other, and adds what the client saw to `load`."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    sent = 0
    while time.perf_counter() < end:
        text, request_id = texts[sent % len(texts)], f"{number}-{sent}"
        sent += 1
        body = json.dumps({**servers.request(text), "id": request_id})
        started = time.perf_counter()
        try:
            client.request("POST", f"/v2/models/{model}/infer", body)
            response = client.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            load.lost[type(error).__name__] += 1
            client.close()
            time.sleep(0.1)  # a server that does not answer would otherwise lose thousands of requests in a second
            continue
        elapsed = time.perf_counter() - started
        answer = json.loads(content) if response.status == 200 else {}
        if answer.get("id") != request_id:
            load.lost[f"status {response.status}" if response.status != 200 else "answer to another request"] += 1
            continue
        load.times_us.append(round(1e6 * elapsed))
        load.flips += int(np.argmax(servers.read_rows(answer, "probabilities")[0])) != labels[text]
    client.close()


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        name: Name of the server.
        model: Name of the model on the server.
        port: Its port on loopback.
        process: Its process.
    """

    name: str
    model: str
    port: int
    process: psutil.Process

    def run_clients(self, count: int, seconds: float, labels: Mapping[str, int]) -> Load:
        """Lets clients send sentences to this server; see the function `run_clients`."""
        return run_clients(self.port, self.model, count, seconds, labels)

    def resident_bytes(self) -> int:
        """Returns the resident memory of the server's process and of all its child processes."""
        resident = 0
        for each in (self.process, *self.process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # some processes of Ray are short
                resident += each.memory_info().rss
        return resident

    def batch_sizes(self) -> Counter[int]:
        """Returns how many batches of each size the model computed since the start; only Triton states it."""
        if self.name != "Triton":
            return Counter()
        batches = servers.call(self.port, f"models/{VARIANT}/stats")[1]["model_stats"][0]["batch_stats"]
        return Counter({int(each["batch_size"]): int(each["compute_infer"]["count"]) for each in batches})

    def facts(self) -> dict[str, str]:
        """Returns the version of the server, and what stands in for a part of it."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2") as answer:
            version = json.load(answer)["version"]
        return {"version": version, **({"backend": STAND_IN} if self.name == "Triton" else {})}


# Name of a server → the target of its bundle, and the name of the model on the server.
SERVERS = {
    "Triton": ("server", f"{VARIANT}_text"),
    "KServe": ("server", f"{VARIANT}_text"),
    "Ray Serve": ("ray-serve", VARIANT),
}
ONE_REPLICA = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}


@contextmanager
def start_server(name: str, folder: Path) -> Iterator[Server]:
    """Starts a server on its bundle in `folder`, with its log in a folder of its own; yields it when it is ready."""
    target, model = SERVERS[name]
    port, bundle = servers.free_port(), folder / target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        starters = {
            "Triton": lambda: servers.triton_process(bundle / "repository", Path(scratch), port),
            "KServe": lambda: servers.kserve_process(bundle, Path(scratch), port),
            "Ray Serve": lambda: servers.ray_serve_process(bundle, Path(scratch), port, **ONE_REPLICA),
        }
        with starters[name]() as (process, log):
            servers.wait_until_ready(port, process, log)
            yield Server(name, model, port, psutil.Process(process.pid))


def measure(folder: Path, rounds: int, round_s: float, labels: Mapping[str, int]) -> list[dict[str, Any]]:
    """Runs every combination of a server and a number of clients once in each round; returns a row for each.

    Args:
        folder: Folder of the bundles.
        rounds: Number of rounds.
        round_s: Seconds of each combination.
        labels: Sentence → index of its label in Python.
    """
    cells = [(name, count) for name in SERVERS for count in CLIENTS]
    figures: dict[tuple[str, int], list[dict[str, Any]]] = {cell: [] for cell in cells}
    batches: dict[tuple[str, int], Counter[int]] = {cell: Counter() for cell in cells}
    with bar("serving") as progress:
        for turn in range(rounds):
            order = random.Random(SEED + turn)
            for name in order.sample(list(SERVERS), len(SERVERS)):
                with start_server(name, folder) as server:
                    server.run_clients(SOAK_CLIENTS, WARM_UP_S, labels)
                    for count in order.sample(CLIENTS, len(CLIENTS)):
                        progress(sum(map(len, figures.values())), rounds * len(cells), f"{name}, {count} clients")
                        before = server.batch_sizes()
                        figures[name, count].append(server.run_clients(count, round_s, labels).figures())
                        batches[name, count] += server.batch_sizes() - before
    return [_row(*cell, figures[cell], batches[cell]) for cell in cells]


def _row(server: str, count: int, rounds: Sequence[Mapping[str, Any]], batches: Counter[int]) -> dict[str, Any]:
    """Returns the row of a server and a number of clients, with a mean and its confidence interval over rounds."""
    row: dict[str, Any] = {"server": server, "clients": count}
    for name in ("requests", "lost", "flips"):
        row[name] = sum(each[name] for each in rounds)
    for name in ("throughput_per_s", "p50_ms", "p99_ms"):
        values = [each[name] for each in rounds if name in each]
        interval = statistics.mean_interval(values)
        bounds = dict(zip(("low", "high"), (round(each, 3) for each in interval), strict=True)) if interval else {}
        row[name] = {"value": round(float(np.mean(values)), 3), **bounds} if values else None
    return {**row, "batches": {str(size): number for size, number in sorted(batches.items())}, "rounds": list(rounds)}


def soak(server: Server, seconds: float, labels: Mapping[str, int]) -> dict[str, Any]:
    """Sends requests of `SOAK_CLIENTS` clients for a long time; returns the figures, and the server's memory."""
    resident_bytes = [server.resident_bytes()]
    load = server.run_clients(SOAK_CLIENTS, seconds, labels)
    resident_bytes.append(server.resident_bytes())
    return {
        "server": server.name,
        "clients": SOAK_CLIENTS,
        "seconds": seconds,
        **load.figures(),
        "resident_bytes_before": resident_bytes[0],
        "resident_bytes_after": resident_bytes[1],
    }


@click.command()
@click.option("--rounds", default=6, show_default=True, help="Rounds; intervals need at least 6.")
@click.option("--round-s", default=2.0, show_default=True, help="Seconds of each combination in a round.")
@click.option("--soak-s", default=300.0, show_default=True, help="Seconds under 8 clients in the end.")
@click.option("--exported", type=click.Path(path_type=Path), default=ROOT / "exported", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=STUDY, show_default=True)
def main(rounds: int, round_s: float, soak_s: float, exported: Path, output: Path) -> None:
    """Ships the bundles, measures the servers, saves the results and prints them."""
    are_installed = servers.KSERVE.exists() and servers.RAY_SERVE.exists()
    reason = servers.missing() or (None if are_installed else "needs `make test-clients`")
    if reason:
        raise click.ClickException(f"The servers cannot run on this machine: {reason}.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        workspace = Workspace.open("reference", exported)
        for target in sorted({target for target, _ in SERVERS.values()}):
            shipping.ship(workspace, Order((VARIANT,), target), folder / target, say, no_bar)
        classify = Classifier(folder / "server")
        labels = {
            text: classify.labels.index(max(scores, key=scores.__getitem__))
            for text in map(str, inputs.load_embedded().texts)
            for scores in classify([text])
        }
        rows = measure(folder, rounds, round_s, labels)
        facts, soaks = {}, []
        for name in SERVERS:
            with start_server(name, folder) as server:
                facts[name] = server.facts()
                server.run_clients(SOAK_CLIENTS, WARM_UP_S, labels)
                soaks.append(soak(server, soak_s, labels))
    body = {
        "schema": 1,
        "machine": hardware.machine(),
        "variant": VARIANT,
        "sentences": len(labels),
        "servers": facts,
        "model_threads": 1,
        "clients_on": "the same machine",
        "round_s": round_s,
        "rows": rows,
        "soak": soaks,
    }
    output.write_text(json.dumps(body, indent=1) + "\n")
    for line in summary(body):
        click.echo(line)
    if any(row["lost"] for row in (*rows, *soaks)):
        raise click.ClickException("A server lost requests; `lost_by_reason` in the result file states why.")


def summary(body: dict[str, Any]) -> list[str]:
    """Returns a text table of the results, as a list of lines."""
    names = {
        (row["server"], row["clients"]): f"{row['server']}, {row['clients']} client{'s' if row['clients'] > 1 else ''}"
        for row in body["rows"]
    }
    width = max(map(len, names.values())) + 1
    lines = [f"{'':{width}} {'requests/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'lost':>5} {'mean batch':>11}"]
    for row in body["rows"]:
        batches = {int(size): number for size, number in row["batches"].items()}
        texts = sum(size * number for size, number in batches.items())
        # Ray Serve merges requests as well, but does not state how many.
        size = f"{texts / sum(batches.values()):.1f}" if batches else "–" if row["server"] == "Ray Serve" else "1.0"
        name = names[row["server"], row["clients"]]
        throughput, p50, p99 = (
            f"{row[key]['value']:.{digits}f}" if row[key] else "–"
            for key, digits in (("throughput_per_s", 0), ("p50_ms", 1), ("p99_ms", 1))
        )
        lines.append(f"{name:{width}} {throughput:>10} {p50:>8} {p99:>8} {row['lost']:5} {size:>11}")
    for row in body["soak"]:
        growth = (row["resident_bytes_after"] - row["resident_bytes_before"]) / 1e6
        lines.append(
            f"{row['server']}, {row['clients']} clients for {row['seconds']:.0f} s: {row['requests']:,} answers, "
            f"{row['lost']} lost, memory {growth:+.0f} MB"
        )
    lines.append(f"Triton runs with {body['servers']['Triton']['backend']}.")
    return lines


if __name__ == "__main__":
    main()
