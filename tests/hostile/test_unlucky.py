"""Tests of commands that are killed or that the operating system refuses: every result is old or new, never half.

These tests run `predict`, the quickest command that writes. `make unlucky` runs all commands that write, with a fault
in each system call, and with kills at random moments.
"""

import random
import shutil
import signal
import subprocess

import pytest
from hostile import unlucky

pytestmark = pytest.mark.slow


def can_trace():
    """Returns whether strace is installed, and whether the system allows it to trace processes."""
    strace = shutil.which("strace")
    return (
        strace is not None and subprocess.run([strace, "-qq", "-o", "/dev/null", "true"], check=False).returncode == 0
    )


@pytest.fixture(scope="module")
def scene(built_tiny, tmp_path_factory):
    server = unlucky.TracedServer(("onnxruntime", "tokenizers", "toolchain.predict"))
    folder = tmp_path_factory.mktemp("unlucky") / "folder"
    for name in ("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"):
        shutil.copytree(built_tiny.path(name), folder / "exported" / "tiny" / name)
    unlucky.write_rows(folder / "rows.csv")
    yield unlucky.Scene.open(server, folder, "predict")
    server.close()


def test_a_killed_command_leaves_old_or_new_files(scene):
    source = random.Random(7)
    ends = [unlucky.kill(scene, source) for _ in range(6)]
    assert [faults for _, faults in ends] == [[]] * 6
    assert -signal.SIGKILL in [ended.code for ended, _ in ends]


@pytest.mark.skipif(not can_trace(), reason="needs strace (Debian: strace) and the right to trace processes")
@pytest.mark.parametrize(
    ("call", "code"),
    # On a file system without hard links, a rename takes the place of `link`.
    [("write", 1), ("fsync", 1), ("rename", 1), ("mkdir", 1), ("link", 0)],
)
def test_a_failed_system_call_leaves_old_or_new_files(scene, counts, call, code):
    ends = {number: unlucky.inject(scene, call, number) for number in range(1, counts[call] + 1)}
    assert {number: faults for number, (_, faults) in ends.items() if faults} == {}
    assert code in [ended.code for ended, _ in ends.values()]


@pytest.fixture(scope="module")
def counts(scene):
    """Numbers of system calls of the command, by name."""
    return scene.count_calls()
