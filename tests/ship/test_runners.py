"""Tests of the runners in bundles: the number of threads in a container, and the memory of large batches."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODULES, NODE, needs_node

from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files import classify
from toolchain.ship.shipping import Order

TEXTS = ["a charming and often affecting journey .", "a waste of two hours ."]


@pytest.fixture(params=["classify", "classify_text", "classify_tokens"])
def runner(request, tmp_path, monkeypatch):
    """The module of a runner, in a container whose control group is in `tmp_path`."""
    if request.param == "classify_text":
        pytest.importorskip("onnxruntime_extensions")
    module = importlib.import_module(f"toolchain.ship.bundle_files.{request.param}")
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("TOOLCHAIN_THREADS", raising=False)
    return module


QUOTAS = pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 0),
        ({"cpu.max": "max 100000\n"}, 0),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "390000 100000\n"}, 3),
        ({"cpu.max": "9900000 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


@QUOTAS
def test_a_runner_starts_one_thread_for_each_cpu_of_the_quota(runner, tmp_path, monkeypatch, files, threads):
    write_files(tmp_path, files)
    assert runner.session_options().intra_op_num_threads == runner.count_threads() == threads
    monkeypatch.setenv("TOOLCHAIN_THREADS", "5")
    assert runner.session_options().intra_op_num_threads == 5


@needs_node
@QUOTAS
def test_node_starts_one_thread_for_each_cpu_of_the_quota(tmp_path, files, threads):
    write_files(tmp_path, files)
    (tmp_path / "node_modules").symlink_to(MODULES)
    shutil.copy(Path(classify.__file__).with_name("node.mjs"), tmp_path)
    code = f"import {{ countThreads }} from './node.mjs'; console.log(await countThreads('{tmp_path}'))"
    command = [NODE, "--input-type=module", "-e", code]
    environment = {name: value for name, value in os.environ.items() if name != "TOOLCHAIN_THREADS"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) == min(threads, len(os.sched_getaffinity(0)))


@pytest.mark.slow
def test_a_runner_that_releases_memory_gives_the_same_answers(built_tiny, tmp_path, monkeypatch):
    shipping.ship(built_tiny, Order(("onnx-int8",), "python"), tmp_path / "b", lambda line: None, no_bar)
    monkeypatch.setenv("TOOLCHAIN_THREADS", "1")
    answers = [classify.Classifier(tmp_path / "b", release_memory=release)(TEXTS) for release in (False, True)]
    assert answers[0] == answers[1]
    assert set(answers[0][0]) == {"NEGATIVE", "POSITIVE"}


IMPORT_CODE = "import sys; sys.path.insert(0, sys.argv[1]); "
PYTHON_CODE = {
    "toolchain": "from toolchain.backends.ort import session_options; session_options(1)",
    "classify": f"{IMPORT_CODE}import classify; classify.session_options()",
    "classify_text": f"{IMPORT_CODE}import classify_text; classify_text.session_options()",
    "classify_tokens": f"{IMPORT_CODE}import classify_tokens; classify_tokens.session_options()",
    "verify": f"{IMPORT_CODE}import verify; verify.saturates()",
}
FOLDER = Path(classify.__file__).parent


def reports_use(command, home, **variables):
    """Runs a program, and returns whether ONNX Runtime stored an id of the device, as it does before it reports."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = {name: value for name, value in environment.items() if not name.startswith("XDG_")}
    subprocess.run(command, env={**environment, "HOME": str(home), **variables}, check=True, timeout=120)
    return any(home.rglob("deviceid"))


@pytest.mark.skipif(sys.platform != "linux", reason="ONNX Runtime stores the id in another place")
@pytest.mark.parametrize("program", PYTHON_CODE)
def test_onnx_runtime_reports_only_if_the_user_allows_it(program, tmp_path):
    if program == "classify_text":
        pytest.importorskip("onnxruntime_extensions")
    command = [sys.executable, "-B", "-c", PYTHON_CODE[program], FOLDER]
    assert not reports_use(command, tmp_path)
    if not reports_use(command, tmp_path, ORT_DISABLE_TELEMETRY="0"):
        pytest.skip("this release of ONNX Runtime has no reports")


@needs_node
def test_onnx_runtime_reports_nothing_in_node(tmp_path):
    (tmp_path / "node_modules").symlink_to(MODULES)
    shutil.copy(FOLDER / "node.mjs", tmp_path)
    code = "import { sessionOptions } from './node.mjs'; import '@huggingface/transformers'; await sessionOptions();"
    (tmp_path / "code.mjs").write_text(code)
    (tmp_path / "home").mkdir()
    assert not reports_use([NODE, tmp_path / "code.mjs"], tmp_path / "home")
