"""Scoring and measuring on a Ray cluster of two nodes, and what is said where it is not there, differs, or dies."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import replace

import psutil
import pytest
from conftest import run_toolchain

import toolchain
from toolchain import distributed
from toolchain import predict as predicting
from toolchain.artifacts import publishing, store
from toolchain.bench import run, scenarios
from toolchain.bench.scenarios import Protocol
from toolchain.data import inputs
from toolchain.data.files import Texts
from toolchain.distributed import Cluster, Node, benching, connect, remote
from toolchain.errors import ClusterError, DataError, TamperedError
from toolchain.predict import lying_in, of_variant, predict
from toolchain.progress import no_bar
from toolchain.results.measurements import ResultFile

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster as Nodes  # noqa: E402 - only where there is Ray

WINDOW = 20  # texts: many windows of few texts
FAST = Protocol(passes=1, min_s=0.16, pass_s=40, starts=2, threads=1, batch_size=8)
HOSTILE = ["", " ", 'a "quoted", text', "NUL \0 inside", "line\u2028separator and \x85", "Ünïcödé 🎬 文字"]


def quiet(line):
    pass


def start():
    """A cluster of two nodes with a CPU each, on this machine."""
    about = {"num_cpus": 1, "object_store_memory": 100_000_000}
    nodes = Nodes(initialize_head=True, head_node_args={**about, "include_dashboard": False})
    nodes.add_node(**about)
    return nodes


def stop(nodes):
    """Ends them at once, with what they started; Ray's own way waits for what runs there."""
    roots = [p.process.pid for node in nodes.list_all_nodes() for each in node.all_processes.values() for p in each]
    for root in filter(psutil.pid_exists, roots):
        process = psutil.Process(root)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@pytest.fixture(scope="module", autouse=True)
def ended():
    """No process of Ray's outlives the tests."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    assert not left


@pytest.fixture(scope="module")
def address():
    nodes = start()
    yield nodes.address
    stop(nodes)


@pytest.fixture(scope="module")
def cluster(address):
    with connect(address, quiet) as found:
        yield found


@pytest.fixture(scope="module")
def model(built_tiny):
    return of_variant(built_tiny, "onnx-int8", quiet, no_bar)


@pytest.fixture
def small(monkeypatch):
    """Small windows, and what is scored in one process."""
    monkeypatch.setattr(predicting, "PART", WINDOW)
    monkeypatch.setattr(predicting, "PLAIN", WINDOW)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Texts(str(path))


def alone(model, texts, path):
    """The bytes of the same scored by this process."""
    predict(model, texts, path, quiet, no_bar)
    return path.read_bytes()


def processes(what):
    """Ray's processes on this machine that do it; the cluster of these tests is the only one that does."""
    return [p for p in psutil.process_iter(["cmdline"]) if what in " ".join(p.info["cmdline"] or ())]


def test_the_same_rows_in_the_same_order(built_tiny, cluster, small, tmp_path, monkeypatch):
    """Of PyTorch; the other tests are of ONNX Runtime."""
    monkeypatch.chdir(tmp_path)
    model = of_variant(built_tiny, "torch-fp32", quiet, no_bar)
    texts = write(tmp_path / "in.jsonl", [*HOSTILE, *inputs.embedded().sample(150, 3)])
    said = []
    monkeypatch.setattr(cluster, "_say", said.append)
    assert predict(model, Texts("in.jsonl"), tmp_path / "out.csv", said.append, no_bar, cluster.score) == 156
    assert (tmp_path / "out.csv").read_bytes() == alone(model, texts, tmp_path / "alone.csv")
    assert said == ["nodes: 2, workers: 2, threads per worker: 1"]


def test_a_worker_that_is_killed_costs_its_window_only(model, cluster, small, tmp_path):
    texts = write(tmp_path / "in.jsonl", [f"film {i}" for i in range(60 * WINDOW)])
    killed = []

    def killing(*about):
        for rows in cluster.score(*about):
            if not killed:
                victim = processes("ray::MapWorker(MapBatches(Scorer)")[0]
                victim.kill()
                killed.append(victim)
            yield rows

    predict(model, texts, tmp_path / "out.csv", quiet, no_bar, killing)
    assert not killed[0].is_running()
    assert (tmp_path / "out.csv").read_bytes() == alone(model, texts, tmp_path / "alone.csv")


def test_an_interrupted_run_is_taken_up_by_either_engine(model, cluster, small, tmp_path):
    texts = write(tmp_path / "in.jsonl", [f"film {i}" for i in range(5 * WINDOW)])

    def interrupted(*about):
        for count, rows in enumerate(cluster.score(*about)):
            if count == 2:
                raise KeyboardInterrupt
            yield rows

    with pytest.raises(KeyboardInterrupt):
        predict(model, texts, tmp_path / "out.csv", quiet, no_bar, interrupted)
    said = []
    predict(model, texts, tmp_path / "out.csv", said.append, no_bar)
    assert said == [f"{tmp_path / 'out.csv'}: {2 * WINDOW} texts are scored already"]
    assert (tmp_path / "out.csv").read_bytes() == alone(model, texts, tmp_path / "alone.csv")


def test_what_fails_there_is_told_in_its_own_words(model, cluster, small, tmp_path):
    texts = write(tmp_path / "in.jsonl", ["good"])
    rows = cluster.score(model, replace(texts, column="review"), 0, WINDOW)
    with pytest.raises(DataError, match=r"in\.jsonl has no column 'review'"):
        next(rows)


def test_a_file_that_arrives_changed_is_refused(model, tmp_path, monkeypatch):
    files = {name: (model.folder / name).read_bytes() for name in model.files}
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    remote.unpack(files, tmp_path / "whole")
    assert lying_in(tmp_path / "whole", quiet).id == model.id
    weights = bytearray(files["model.onnx"])
    weights[-1] ^= 1
    remote.unpack({**files, "model.onnx": bytes(weights)}, tmp_path / "changed")
    with pytest.raises(TamperedError, match=r"model\.onnx has another sha256"):
        lying_in(tmp_path / "changed", quiet)


def test_what_a_killed_worker_left_goes_with_the_next(tmp_path, monkeypatch):
    dead = 2**22 + 1
    space = remote._process_space()
    monkeypatch.setattr(platform, "node", lambda: "another-machine")
    elsewhere = remote._process_space()
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = [
        f"{publishing.WORK}-{space}-{os.getpid()}-mine",
        f"{publishing.WORK}-{elsewhere}-{dead}-left",  # it may live there
        f"{publishing.WORK}-{space}-{dead}-my-notes",
        f"toolchain-{dead}-left",
        "toolchain-2024-backup",
        "toolchain-my-notes",
    ]
    kept = [tmp_path / name for name in names]
    for folder in (*kept, tmp_path / f"{publishing.WORK}-{space}-{dead}-left"):
        folder.mkdir()
    with remote.scratch() as folder:
        assert sorted(tmp_path.iterdir()) == sorted([*kept, folder])
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_node_of_another_release_is_refused(address, monkeypatch):
    monkeypatch.setattr(toolchain, "__version__", "9.9")
    with pytest.raises(ClusterError, match=r"toolchain 0\.1\.0, but this machine has 9\.9\. Install this version"):
        connect(address, quiet).__enter__()


def test_a_node_of_another_python_is_refused(address, monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    with pytest.raises(ClusterError, match=r"Python 3\.\d+\.\d+, but this machine has 3\.99\.0"):
        connect(address, quiet).__enter__()


def test_without_ray_the_extra_is_named(say, tiny, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else real(name, *more))
    where = ("--model", tiny.model, "--exported", tiny.exported)
    for command in (("predict", "onnx-int8"), ("bench",)):
        code, out, err = say(*command, "--engine", "ray", *where)
        assert (code, out) == (1, "")
        assert 'Ray is not installed. Install it with `pip install "toolchain[ray]"`.' in err


def test_an_address_without_the_engine_is_usage(say):
    for command in (("predict", "onnx-int8"), ("bench",)):
        code, out, err = say(*command, "--address", "auto")
        assert (code, out) == (2, "")
        assert "give --engine ray with it" in err
    assert say("bench", "--engine", "ray", "--resume")[0] == 2


@pytest.mark.parametrize("place", ["127.0.0.1:1", "nowhere.invalid:6379", "ray://127.0.0.1:1", "6379"])
def test_a_cluster_that_is_not_there_is_told_in_seconds(place):
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"There is no cluster at|is not the address of a cluster's head"):
        connect(place, quiet).__enter__()
    assert time.monotonic() - started < 20


def test_what_listens_and_is_no_cluster_is_given_up(monkeypatch):
    monkeypatch.setattr(distributed, "CONNECT_TIMEOUT_S", 5.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        with pytest.raises(ClusterError):
            connect(f"127.0.0.1:{server.getsockname()[1]}", quiet).__enter__()
        assert time.monotonic() - started < 30


def fabricated(name, gpus=0):
    return Node(name, f"host-{name}", 2, gpus, {"id": name[0], "gpu": []})


def test_cells_go_where_their_hardware_is(built_tiny):
    cells = run.prepared(built_tiny, run.Request(("torch-fp32",), (), FAST), None, quiet)[1]
    said = []
    nodes = benching.distinct_nodes([fabricated("a1"), fabricated("b1", gpus=1), fabricated("a2")], said.append)
    assert [node.id for node in nodes] == ["a1", "b1"]
    assert said == ["host-a2 (a2): skipped, because host-a1 (a1) has the same hardware"]
    placed = {node.id: [cell.name for cell in share] for node, share in benching.assign_cells(nodes, cells)}
    assert placed == {"a1": ["torch-fp32@cpu"], "b1": ["torch-fp32@cpu", "torch-fp32@cuda"]}
    on_gpu = [cell for cell in cells if cell.provider == "cuda"]
    assert [node.id for node, _ in benching.assign_cells(nodes, on_gpu)] == ["b1"]
    assert [node.id for node, _ in benching.assign_cells(nodes[:1], on_gpu)] == ["a1"]


def test_each_machine_is_a_run_of_its_own_and_one_that_dies_is_rows_that_say_so(
    tiny, cluster, tmp_path, monkeypatch, say
):
    """The command, on two machines of which one is killed as soon as both measure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scenarios, "QUICK", FAST)
    machines = [replace(node, machine={**node.machine, "id": node.id[:12]}) for node in cluster.nodes]
    there = Cluster(cluster._driver, machines, quiet)
    monkeypatch.setattr(distributed, "connect", lambda address, say: nullcontext(there))
    real = there.ask

    def killing(do, **about):
        if do == "next_result" and not killed:
            found = []
            while len(found) < 2:
                time.sleep(0.2)
                found = processes("ray::measure")
            found[0].kill()
            killed.append(found[0])
        return real(do, **about)

    killed = []
    monkeypatch.setattr(there, "ask", killing)
    data = tmp_path / "in.csv"
    data.write_text("text,label\n" + "".join(f"a film of {i} words,{i % 2}\n" for i in range(20)))
    where = ("--model", tiny.model, "--exported", tiny.exported, "--data", data)
    chosen = ("--variant", "onnx-int8", "--variant", "torch-fp32", "--provider", "cpu", "--save-as", "mine")
    code, out, err = say("bench", "--quick", "--engine", "ray", *chosen, *where)
    assert code == 1
    results = tmp_path / "benchmarks" / "results"
    (done,), (dead,) = (
        [ResultFile.read(path) for path in folder.glob("*.json")] for folder in (results, results / "local")
    )
    assert [row.status for row in done.rows] == ["ok", "ok"]
    assert [row.status for row in dead.rows] == ["failed", "failed"]
    assert (results / f"mine-{done.machine['id']}.json").is_file()
    assert dead.machine["id"] in {node.machine["id"] for node in machines}
    said = f"On the node {cluster.nodes[0].host}: "
    assert dead.rows[0].reason.startswith(said)
    assert f"2 of 4 cells failed: onnx-int8@cpu: {said}" in err
    assert "failed: On the node" in out
    assert "of the same run; above 1 is better" in out


def test_the_command_starts_a_cluster_of_its_own_and_ends_it(tiny, tmp_path):
    (tmp_path / "in.txt").write_text("good\nbad\n")
    arguments = ("predict", "onnx-int8", "in.txt", "--model", tiny.model, "--exported", tiny.exported)
    done = run_toolchain(*arguments, "--engine", "ray", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines() if "skipped" not in line] == ["nodes"]
    assert done.stdout == run_toolchain(*arguments, cwd=tmp_path).stdout


def test_an_interrupt_ends_the_cluster_too(tiny, tmp_path):
    write(tmp_path / "in.jsonl", [f"film {i} " + "of many words " * 30 for i in range(20 * predicting.PART)])
    arguments = ("predict", "onnx-int8", "in.jsonl", "--output", "out.csv", "--engine", "ray")
    where = ("--model", tiny.model, "--exported", str(tiny.exported))
    command = subprocess.Popen(
        [sys.executable, "-m", "toolchain", *arguments, *where],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert any(line.startswith("predict: ") for line in command.stderr)
    started = [process for process in psutil.Process(command.pid).children(recursive=True) if process.is_running()]
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does
    assert "Interrupted" in command.communicate(timeout=60)[1]
    assert command.returncode == 130
    assert started
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert (publishing.work_folder(tmp_path / "out.csv") / "parts").is_dir()


def test_a_cluster_that_dies_leaves_what_was_scored(model, small, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "LOST_AFTER_S", 2)
    texts = write(tmp_path / "in.jsonl", [f"film {i}" for i in range(100 * WINDOW)])
    nodes = start()

    def dying(*about):
        for count, rows in enumerate(cluster.score(*about)):
            if count == 3:
                for process in nodes.head_node.all_processes["gcs_server"]:
                    os.kill(process.process.pid, signal.SIGKILL)
            yield rows
            time.sleep(0.3)

    try:
        started = time.monotonic()
        with (
            connect(nodes.address, quiet) as cluster,
            pytest.raises(ClusterError, match="The same command with --output continues"),
        ):
            predict(model, texts, tmp_path / "out.csv", quiet, no_bar, dying)
        assert time.monotonic() - started < 90
    finally:
        stop(nodes)
    said = []
    predict(model, texts, tmp_path / "out.csv", said.append, no_bar)
    assert "texts are scored already" in said[0]
    assert (tmp_path / "out.csv").read_bytes() == alone(model, texts, tmp_path / "alone.csv")


def test_an_artifact_knows_its_files(built_tiny):
    found = built_tiny.load("onnx-int8")
    assert sorted(found.files) == sorted(p.name for p in found.path.iterdir())
    assert store.MANIFEST in found.files
