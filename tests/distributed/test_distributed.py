"""Tests of predictions and benchmarks on a Ray cluster of two nodes.

Some tests kill processes of the cluster. In other tests, the version of the toolchain or of Python on a node differs
from the version on this machine.
"""

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
import pyarrow
import pyarrow.parquet
import pytest
from conftest import run_toolchain

import toolchain
from toolchain import distributed
from toolchain import predict as predicting
from toolchain.artifacts import manifest, publishing
from toolchain.bench import run, scenarios
from toolchain.bench.scenarios import Protocol
from toolchain.data import inputs
from toolchain.data.files import Texts
from toolchain.distributed import Cluster, Node, benching, connect, driver, remote
from toolchain.distributed import parts as distributed_parts
from toolchain.errors import ClusterError, DataError, TamperedError
from toolchain.predict import load_folder_model, load_variant_model, parts, predict
from toolchain.predict.chunk_scoring import Job
from toolchain.predict.parts import Request, predict_parts
from toolchain.progress import no_bar
from toolchain.results.result_file import ResultFile

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster as Nodes  # noqa: E402 - follows importorskip, since Ray is optional

WINDOW = 20  # number of texts that `predict` scores at a time (a window); small, so that a run has many windows
FAST = Protocol(passes=1, min_s=0.16, pass_s=40, starts=2, threads=1, batch_size=8)
HOSTILE = ["", " ", 'a "quoted", text', "NUL \0 inside", "line\u2028separator and \x85", "Ünïcödé 🎬 文字"]


def quiet(line):
    pass


def start_cluster():
    """Starts a cluster of two nodes with one CPU each, on this machine."""
    node_options = {"num_cpus": 1, "object_store_memory": 100_000_000}
    nodes = Nodes(initialize_head=True, head_node_args={**node_options, "include_dashboard": False})
    nodes.add_node(**node_options)
    return nodes


def kill_cluster(nodes):
    """Kills all processes of the nodes at once, since Ray's own shutdown would wait for running tasks."""
    roots = [
        p.process.pid for node in nodes.list_all_nodes() for children in node.all_processes.values() for p in children
    ]
    for root in filter(psutil.pid_exists, roots):
        process = psutil.Process(root)
        for children in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                children.kill()


@pytest.fixture(scope="module", autouse=True)
def no_remaining_process():
    """Checks that no Ray process runs after the tests of this file."""
    pids_before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)
    remaining = [process for process in psutil.Process().children(recursive=True) if process.pid not in pids_before]
    assert not remaining


@pytest.fixture(scope="module")
def address():
    nodes = start_cluster()
    yield nodes.address
    kill_cluster(nodes)


@pytest.fixture(scope="module")
def cluster(address):
    with connect(address, quiet) as connected_cluster:
        yield connected_cluster


@pytest.fixture(scope="module")
def model(built_tiny):
    return load_variant_model(built_tiny, "onnx-int8", quiet, no_bar)


@pytest.fixture
def small_windows(monkeypatch):
    """Makes `predict` score only `WINDOW` texts at a time, in a cluster and in one process."""
    monkeypatch.setattr(predicting, "PART_TEXTS", WINDOW)
    monkeypatch.setattr(predicting, "STDOUT_WINDOW", WINDOW)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Texts(str(path))


def score_here(model, texts, path):
    """Scores the texts in this process, without a cluster, and returns the bytes of the output file."""
    predict(model, texts, path, quiet, no_bar)
    return path.read_bytes()


def processes_with(text):
    """Returns the processes on this machine with `text` in their command line.

    The tests assume that the test cluster is the only Ray cluster on this machine.
    """
    return [p for p in psutil.process_iter(["cmdline"]) if text in " ".join(p.info["cmdline"] or ())]


@pytest.mark.slow
def test_a_cluster_scores_the_same_rows_in_the_same_order(built_tiny, cluster, small_windows, tmp_path, monkeypatch):
    """Scores with PyTorch, since the other tests of this file score with ONNX Runtime."""
    monkeypatch.chdir(tmp_path)
    model = load_variant_model(built_tiny, "torch-fp32", quiet, no_bar)
    texts = write(tmp_path / "in.jsonl", [*HOSTILE, *inputs.load_embedded().sample(150, 3)])
    lines = []
    monkeypatch.setattr(cluster, "_say", lines.append)
    assert predict(model, Texts("in.jsonl"), tmp_path / "out.csv", lines.append, no_bar, cluster.score) == 156
    assert (tmp_path / "out.csv").read_bytes() == score_here(model, texts, tmp_path / "alone.csv")
    assert lines == ["nodes: 2, workers: 2, threads per worker: 1"]


@pytest.mark.slow
def test_a_killed_worker_does_not_change_the_output(model, cluster, small_windows, tmp_path):
    texts = write(tmp_path / "in.jsonl", [f"film {i}" for i in range(60 * WINDOW)])
    victims = []

    def score_and_kill(*arguments):
        for rows in cluster.score(*arguments):
            if not victims:
                victim = processes_with("ray::MapWorker(MapBatches(Scorer)")[0]
                victim.kill()
                victims.append(victim)
            yield rows

    predict(model, texts, tmp_path / "out.csv", quiet, no_bar, score_and_kill)
    assert not victims[0].is_running()
    assert (tmp_path / "out.csv").read_bytes() == score_here(model, texts, tmp_path / "alone.csv")


def write_tables(folder, files, rows):
    """Writes CSV files with a row whose text is missing in the first file; returns their names."""
    folder.mkdir()
    names = []
    for number in range(files):
        table = pyarrow.table({"id": range(rows), "text": [f"film {number} " + "long " * (i % 7) for i in range(rows)]})
        if not number:
            table = table.set_column(1, "text", pyarrow.array([None, *table["text"].to_pylist()[1:]]))
        names.append(str(folder / f"{number}.parquet"))
        pyarrow.parquet.write_table(table, names[-1])
    return names


def read_folder(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_cluster_writes_the_same_parts_even_if_a_worker_is_killed(model, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_ROWS", 50)
    inputs = write_tables(tmp_path / "in", 3, 1000)
    expected = predict_parts(model, Request(inputs, str(tmp_path / "alone"), max_errors=1), quiet, no_bar)
    victims = []

    def score_and_kill(*arguments):
        for record in cluster.score_parts(*arguments):
            if not victims:
                victims.append(processes_with("ray::MapWorker(MapBatches(PartWriter)")[0])
                victims[0].kill()
            yield record

    request = Request(inputs, str(tmp_path / "out"), max_errors=1)
    assert predict_parts(model, request, quiet, no_bar, score_and_kill) == expected
    assert not victims[0].is_running()
    assert (expected.rows, expected.errors) == (2999, 1)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "alone")


@pytest.mark.slow
def test_a_removed_node_does_not_change_the_parts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_ROWS", 50)
    inputs = write_tables(tmp_path / "in", 2, 1000)
    expected = predict_parts(model, Request(inputs, str(tmp_path / "alone"), max_errors=1), quiet, no_bar)
    nodes = start_cluster()
    removed = []

    def score_and_remove(*arguments):
        for record in cluster.score_parts(*arguments):
            if not removed:
                removed.append(next(iter(nodes.worker_nodes)))
                nodes.remove_node(removed[0], allow_graceful=False)
            yield record

    try:
        with connect(nodes.address, quiet) as cluster:
            request = Request(inputs, str(tmp_path / "out"), max_errors=1)
            assert predict_parts(model, request, quiet, no_bar, score_and_remove) == expected
    finally:
        kill_cluster(nodes)
    assert removed
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "alone")


def test_a_worker_imports_no_training_library(model):
    code = (
        "import sys, pathlib, toolchain.distributed.parts\n"
        "from toolchain.predict import load_folder_model, load_model\n"
        "load_model(load_folder_model(pathlib.Path(sys.argv[1]), print), 1)\n"
        "print(*{'torch', 'transformers', 'datasets', 'pandas', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    completed = subprocess.run([sys.executable, "-c", code, model.folder], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == ""


def test_a_full_object_store_gives_an_error_with_a_hint():
    with pytest.raises(ClusterError, match="no space left for Ray's object store") as error, driver._translate_errors():
        raise ray.exceptions.ObjectStoreFullError("full")
    assert "--object-store-memory" in error.value.hint


def test_a_node_that_does_not_see_the_output_folder_is_refused(tmp_path):
    job = Job("run", str(tmp_path / "out"), [], None, None, 1, 0, "a.csv", None)
    with pytest.raises(ClusterError, match="does not see the output folder") as error:
        distributed_parts._require_output(job)
    assert "all nodes share" in error.value.hint


@pytest.mark.slow
def test_a_local_run_can_continue_a_folder_of_a_cluster(model, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_ROWS", 50)
    inputs = write_tables(tmp_path / "in", 2, 200)
    with pytest.raises(DataError, match=r"0\.parquet, row 1: the column 'text' holds no text"):
        predict_parts(model, Request(inputs, str(tmp_path / "out")), quiet, no_bar, cluster.score_parts)
    done = len(list((tmp_path / "out").glob("*.parquet")))
    lines = []
    summary = predict_parts(model, Request(inputs, str(tmp_path / "out"), max_errors=1), lines.append, no_bar)
    assert (summary.rows, summary.errors) == (399, 1)
    assert lines == ([f"{tmp_path / 'out'}: {50 * done} rows are already scored"] if done else [])


@pytest.mark.slow
def test_a_local_run_can_resume_an_interrupted_cluster_run(model, cluster, small_windows, tmp_path):
    texts = write(tmp_path / "in.jsonl", [f"film {i}" for i in range(5 * WINDOW)])

    def score_and_interrupt(*arguments):
        for count, rows in enumerate(cluster.score(*arguments)):
            if count == 2:
                raise KeyboardInterrupt
            yield rows

    with pytest.raises(KeyboardInterrupt):
        predict(model, texts, tmp_path / "out.csv", quiet, no_bar, score_and_interrupt)
    lines = []
    predict(model, texts, tmp_path / "out.csv", lines.append, no_bar)
    assert lines == [f"{tmp_path / 'out.csv'}: {2 * WINDOW} texts are already scored"]
    assert (tmp_path / "out.csv").read_bytes() == score_here(model, texts, tmp_path / "alone.csv")


@pytest.mark.slow
def test_an_error_on_a_node_keeps_its_message(model, cluster, small_windows, tmp_path):
    texts = write(tmp_path / "in.jsonl", ["good"])
    rows = cluster.score(model, replace(texts, column="review"), 0, WINDOW)
    with pytest.raises(DataError, match=r"in\.jsonl has no column 'review'"):
        next(rows)


def test_a_file_that_changes_on_its_way_to_a_node_is_refused(model, tmp_path, monkeypatch):
    files = {name: (model.folder / name).read_bytes() for name in model.files}
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    remote.unpack(files, tmp_path / "whole")
    assert load_folder_model(tmp_path / "whole", quiet).id == model.id
    weights = bytearray(files["model.onnx"])
    weights[-1] ^= 1
    remote.unpack({**files, "model.onnx": bytes(weights)}, tmp_path / "changed")
    with pytest.raises(TamperedError, match=r"model\.onnx does not have the sha256"):
        load_folder_model(tmp_path / "changed", quiet)


def test_scratch_removes_only_the_folder_of_a_dead_worker_of_this_machine(tmp_path, monkeypatch):
    dead_pid = 2**22 + 1
    space = remote._process_space()
    monkeypatch.setattr(platform, "node", lambda: "another-machine")
    other_space = remote._process_space()
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = [
        f"{publishing.WORK}-{space}-{os.getpid()}-mine",
        # A folder with `other_space` in its name belongs to a process on another machine. This machine cannot check
        # whether the process on the other machine still runs, so `remote.scratch` must keep the folder.
        f"{publishing.WORK}-{other_space}-{dead_pid}-left",
        f"{publishing.WORK}-{space}-{dead_pid}-my-notes",
        f"toolchain-{dead_pid}-left",
        "toolchain-2024-backup",
        "toolchain-my-notes",
    ]
    kept_folders = [tmp_path / name for name in names]
    for folder in (*kept_folders, tmp_path / f"{publishing.WORK}-{space}-{dead_pid}-left"):
        folder.mkdir()
    with remote.scratch() as folder:
        assert sorted(tmp_path.iterdir()) == sorted([*kept_folders, folder])
    assert sorted(tmp_path.iterdir()) == sorted(kept_folders)


@pytest.mark.slow
def test_a_node_of_another_release_is_refused(address, monkeypatch):
    monkeypatch.setattr(toolchain, "__version__", "9.9")
    with pytest.raises(ClusterError, match=r"toolchain 0\.1\.0, but this machine has 9\.9\. Install toolchain 9\.9"):
        connect(address, quiet).__enter__()


@pytest.mark.slow
def test_a_node_of_another_python_is_refused(address, monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    with pytest.raises(ClusterError, match=r"Python 3\.\d+\.\d+, but this machine has 3\.99\.0"):
        connect(address, quiet).__enter__()


def test_without_ray_an_error_names_the_extra(say, tiny, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *arguments: None if name == "ray" else original(name, *arguments)
    )
    model_options = ("--model", tiny.model, "--exported", tiny.exported)
    for command in (("predict", "onnx-int8"), ("bench",)):
        code, out, err = say(*command, "--engine", "ray", *model_options)
        assert (code, out) == (1, "")
        assert "Ray is not installed. Install the missing packages with `pip install 'ray[data]" in err


def test_address_without_engine_ray_gives_a_usage_error(say):
    for command in (("predict", "onnx-int8"), ("bench",)):
        code, out, err = say(*command, "--address", "auto")
        assert (code, out) == (2, "")
        assert "--address needs --engine ray" in err
    assert say("bench", "--engine", "ray", "--resume")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("cluster_address", ["127.0.0.1:1", "nowhere.invalid:6379", "ray://127.0.0.1:1", "6379"])
def test_a_missing_cluster_gives_an_error_within_seconds(cluster_address):
    start_time = time.monotonic()
    with pytest.raises(ClusterError, match=r"There is no cluster at|is not the address of a cluster's head"):
        connect(cluster_address, quiet).__enter__()
    assert time.monotonic() - start_time < 20


@pytest.mark.slow
def test_a_server_that_is_no_cluster_gives_an_error(monkeypatch):
    monkeypatch.setattr(distributed, "CONNECT_TIMEOUT_S", 5.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        start_time = time.monotonic()
        with pytest.raises(ClusterError):
            connect(f"127.0.0.1:{server.getsockname()[1]}", quiet).__enter__()
        assert time.monotonic() - start_time < 30


def fake_node(name, gpus=0):
    return Node(name, f"host-{name}", 2, gpus, {"id": name[0], "gpu": []})


def test_cells_are_assigned_to_nodes_with_their_hardware(built_tiny):
    cells = run.prepare_cells(built_tiny, run.Request(("torch-fp32",), (), FAST), None, quiet)[1]
    lines = []
    nodes = benching.distinct_nodes([fake_node("a1"), fake_node("b1", gpus=1), fake_node("a2")], lines.append)
    assert [node.id for node in nodes] == ["a1", "b1"]
    assert lines == ["host-a2 (a2): skipped, because host-a1 (a1) has the same hardware"]
    names_by_node = {node.id: [cell.name for cell in share] for node, share in benching.assign_cells(nodes, cells)}
    assert names_by_node == {"a1": ["torch-fp32@cpu"], "b1": ["torch-fp32@cpu", "torch-fp32@cuda"]}
    gpu_cells = [cell for cell in cells if cell.provider == "cuda"]
    assert [node.id for node, _ in benching.assign_cells(nodes, gpu_cells)] == ["b1"]
    assert [node.id for node, _ in benching.assign_cells(nodes[:1], gpu_cells)] == ["a1"]


@pytest.mark.slow
def test_each_machine_has_its_own_run_and_a_killed_one_has_failed_rows(
    tiny, cluster, tmp_path, monkeypatch, say, short_bench
):
    """Runs `bench` on two nodes, and kills one node's measuring process as soon as both nodes measure."""
    monkeypatch.chdir(tmp_path)
    # The measurement is long enough that both nodes measure at the same time.
    monkeypatch.setattr(scenarios, "QUICK", replace(scenarios.QUICK, min_s=4.0))
    machines = [replace(node, machine={**node.machine, "id": node.id[:12]}) for node in cluster.nodes]
    changed_cluster = Cluster(cluster._driver, machines, quiet)
    monkeypatch.setattr(distributed, "connect", lambda address, say: nullcontext(changed_cluster))
    original_ask = changed_cluster.ask

    def score_and_kill(operation, **arguments):
        if operation == "next_result" and not victims:
            deadline = time.monotonic() + 120
            while len(workers := processes_with("ray::measure")) < 2:
                assert time.monotonic() < deadline, "the two nodes never measured at the same time"
                time.sleep(0.1)
            workers[0].kill()
            victims.append(workers[0])
        return original_ask(operation, **arguments)

    victims = []
    monkeypatch.setattr(changed_cluster, "ask", score_and_kill)
    data = tmp_path / "in.csv"
    data.write_text("text,label\n" + "".join(f"a film of {i} words,{i % 2}\n" for i in range(20)))
    model_options = ("--model", tiny.model, "--exported", tiny.exported, "--data", data)
    choices = ("--variant", "onnx-int8", "--variant", "torch-fp32", "--provider", "cpu", "--save-as", "mine")
    code, out, err = say("bench", "--quick", "--engine", "ray", *choices, *model_options)
    assert code == 1
    results = tmp_path / "benchmarks" / "results"
    (finished_run,), (failed_run,) = (
        [ResultFile.read(path) for path in folder.glob("*.json")] for folder in (results, results / "local")
    )
    assert [row.status for row in finished_run.rows] == ["ok", "ok"]
    assert [row.status for row in failed_run.rows] == ["failed", "failed"]
    assert (results / f"mine-{finished_run.machine['id']}.json").is_file()
    assert failed_run.machine["id"] in {node.machine["id"] for node in machines}
    prefix = f"On the node {cluster.nodes[0].host}: "
    assert failed_run.rows[0].reason.startswith(prefix)
    assert f"2 of 4 cells failed: onnx-int8@cpu: {prefix}" in err
    assert "failed: On the node" in out
    assert "of the same run; above 1 is better" in out


@pytest.mark.slow
def test_predict_starts_its_own_cluster_and_ends_it(tiny, tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("good\nbad\n")
    arguments = ("predict", "onnx-int8", "in.txt", "--model", tiny.model, "--exported", tiny.exported)
    completed = run_toolchain(*arguments, "--engine", "ray", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert [line.split(":")[0] for line in completed.stderr.splitlines() if "skipped" not in line] == ["nodes"]
    assert completed.stdout == say(*arguments)[1]


@pytest.mark.slow
def test_an_interrupt_ends_the_cluster(tiny, tmp_path):
    write(tmp_path / "in.jsonl", [f"film {i} " + "of many words " * 30 for i in range(8 * predicting.PART_TEXTS)])
    arguments = ("predict", "onnx-int8", "in.jsonl", "--output", "out.csv", "--engine", "ray")
    model_options = ("--model", tiny.model, "--exported", str(tiny.exported))
    command = subprocess.Popen(
        [sys.executable, "-m", "toolchain", *arguments, *model_options],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert any(line.startswith("predict: ") for line in command.stderr)
    ray_processes = [
        process for process in psutil.Process(command.pid).children(recursive=True) if process.is_running()
    ]
    os.killpg(command.pid, signal.SIGINT)  # Ctrl-C in a terminal interrupts the whole process group
    assert "Interrupted" in command.communicate(timeout=60)[1]
    assert command.returncode == 130
    assert ray_processes
    # Ray's agents notice the end of their node only after some seconds, and later on a busy machine.
    assert not psutil.wait_procs(ray_processes, timeout=60)[1]
    assert (publishing.work_folder(tmp_path / "out.csv") / "parts").is_dir()


@pytest.mark.slow
def test_a_run_can_continue_after_its_cluster_is_killed(model, small_windows, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "LOST_AFTER_S", 2)
    texts = write(tmp_path / "in.jsonl", [f"film {i}" for i in range(100 * WINDOW)])
    nodes = start_cluster()

    def score_and_kill_head(*arguments):
        for count, rows in enumerate(cluster.score(*arguments)):
            if count == 3:
                for process in nodes.head_node.all_processes["gcs_server"]:
                    os.kill(process.process.pid, signal.SIGKILL)
            yield rows
            time.sleep(0.3)

    try:
        start_time = time.monotonic()
        with (
            connect(nodes.address, quiet) as cluster,
            pytest.raises(ClusterError, match="With --output, the command continues"),
        ):
            predict(model, texts, tmp_path / "out.csv", quiet, no_bar, score_and_kill_head)
        assert time.monotonic() - start_time < 90
    finally:
        kill_cluster(nodes)
    lines = []
    predict(model, texts, tmp_path / "out.csv", lines.append, no_bar)
    assert "texts are already scored" in lines[0]
    assert (tmp_path / "out.csv").read_bytes() == score_here(model, texts, tmp_path / "alone.csv")


def test_an_artifact_lists_its_files(built_tiny):
    artifact = built_tiny.load("onnx-int8")
    assert sorted(artifact.files) == sorted(p.name for p in artifact.path.iterdir())
    assert manifest.MANIFEST in artifact.files
