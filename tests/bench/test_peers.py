"""Tests of the environments, scripts and sessions of other tools in benchmarks/engines/, without any of the tools."""

import ast
import importlib
import os
import re
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from readme_parts import script

from toolchain.backends import Backend
from toolchain.bench import runner
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import Protocol
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import BenchError

peers = script("peers")
environments, ncnn_int8, sources, static, table = (
    importlib.import_module(f"engines.{name}")
    for name in ("environments", "ncnn_int8", "sources", "static_embeddings_peer", "table")
)
BENCHMARKS = Path(peers.__file__).parent
FAST = Protocol(passes=1, min_s=0.05, pass_s=5, starts=1, threads=1, batch_size=8)
TEXTS = tuple(f"sentence number {number}" for number in range(12))
# A tool's module: the script writes a model, and the session is the fake one, which also states its environment.
WORKING = """
import sys
from fake_backend import FakeSession

class Session(FakeSession):
    def facts(self):
        return {**super().facts(), "prefix": sys.prefix}

if __name__ == "__main__":
    from engines.sources import new_folder, run

    def build(sources, out):
        (new_folder(out, "working-int8") / "behaviour.json").write_text("{}")

    run(build)
"""


@dataclass(frozen=True)
class FakeEngine(table.Engine):
    @property
    def module(self):
        return f"{self.name}_peer"


@pytest.fixture
def make_engine(tmp_path, monkeypatch):
    """Returns a function that makes a tool with one model from the code of its module and its requirements.

    Without requirements, the tool is in the running environment.
    """
    paths = (tmp_path / "modules", BENCHMARKS, Path(__file__).parents[1], Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    (tmp_path / "modules").mkdir()

    def make(name, code, packages=None):
        requirements = None if packages is None else tmp_path / f"{name}.txt"
        if requirements:
            requirements.write_text(packages)
        (tmp_path / "modules" / f"{name}_peer.py").write_text(code)
        return FakeEngine(name, (f"{name}-int8",), "Session", requirements=requirements)

    return make


@pytest.mark.slow
def test_a_tool_that_fails_is_left_out_with_its_reason_and_the_others_are_measured(
    make_engine, fake, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "SETTLE_S", 0.0)
    parent, scratch = fake("parent"), tmp_path / "scratch"
    scratch.mkdir()
    engines = [
        make_engine("uninstallable", "", f"{tmp_path}/no_such_package-1.0-py3-none-any.whl"),
        make_engine("failing", "raise SystemExit('The operator Gelu is unknown.')"),
        make_engine("silent", ""),
        make_engine("working", WORKING, "# nothing"),
    ]
    monkeypatch.setattr(peers, "ENGINES", {engine.name: engine for engine in engines})
    names = [engine.name for engine in engines]
    paths = sources.Sources("checkpoint", "graph", "calibration", "training", "optimum-cli")
    cells, backends = peers.peer_cells("fake", names, paths, parent, tmp_path / "environments", scratch)
    encoder = Encoder.open(inputs.SST2.parent / "model", ("input_ids", "attention_mask"), 512)
    labels = [int(sum(ids) % 2 == 0) for ids in encoder.encode(TEXTS)]
    own = peers.Cell("fake", "own", "fake", "cpu", fake("own"))
    kinds = {"fake": Backend("fake_backend:FakeSession", ()), **backends}
    data = Data("fake", TEXTS, tuple(labels))
    rows = {row.variant: row for row in bench([own, *cells], data, encoder, FAST, lambda *_: None, kinds)[0]}
    assert {name: row.status for name, row in rows.items()} == {
        "own": "ok",
        "uninstallable-int8": "unavailable",
        "failing-int8": "unavailable",
        "silent-int8": "unavailable",
        "working-int8": "ok",
    }
    assert "no_such_package" in rows["uninstallable-int8"].reason
    expected = "The script of failing ended with exit code 1: The operator Gelu is unknown."
    assert rows["failing-int8"].reason == expected
    assert rows["silent-int8"].reason == "silent did not write silent-int8."
    assert rows["working-int8"].score.value == 1
    prefix = Path(rows["working-int8"].facts["session"]["prefix"])
    assert prefix.parent == tmp_path / "environments"
    assert (prefix / environments.MARK).is_file()
    (uninstallable,) = prefix.parent.glob("uninstallable-*")
    assert not (uninstallable / environments.MARK).exists()


@pytest.mark.slow
def test_an_environment_is_kept_after_a_complete_installation_only(tmp_path):
    requirements = tmp_path / "tool.txt"
    requirements.write_text("# nothing")
    python = environments.environment(tmp_path, requirements, borrow=True)
    folder = python.parents[1]
    command = [python, "-P", "-c", "import numpy, sys; print(sys.prefix)"]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip() == str(folder)
    (folder / "kept").touch()
    assert environments.environment(tmp_path, requirements, borrow=True) == python
    assert (folder / "kept").exists()
    (folder / environments.MARK).unlink()  # as if the installation had been interrupted
    assert environments.environment(tmp_path, requirements, borrow=True) == python
    assert not (folder / "kept").exists()


def test_a_command_that_takes_too_long_is_killed_with_its_child(tmp_path):
    child = f"import pathlib, time; pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    with pytest.raises(BenchError, match="The build did not end within 1 s"):
        environments.call("The build", [sys.executable, "-c", code], 1)
    # `call` reads the output to its end, so a living child would keep it waiting.
    assert time.monotonic() - started < 30
    with pytest.raises(BenchError, match="cannot be started"):
        environments.call("The build", [tmp_path / "no_such_program"], 1)


@pytest.mark.parametrize("engine", table.ENGINES.values(), ids=table.ENGINES)
def test_a_tool_has_a_script_a_session_and_pinned_packages(engine):
    path = BENCHMARKS / Path(*engine.module.split(".")).with_suffix(".py")
    names = {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
    assert {"build", *filter(None, [engine.session])} <= names
    for requirements in filter(None, (engine.requirements, engine.session_requirements)):
        lines = [line for line in requirements.read_text().splitlines() if not line.startswith("#")]
        assert lines
        assert all(re.match(r"[\w.-]+==[\w.]+( --config-settings=\S+)*$", line) for line in lines), lines


def test_int8_weights_of_ncnn_are_the_rounded_weights_and_all_other_weights_are_copied(tmp_path):
    rng = np.random.default_rng(0)
    embedding, gemm, attention = (rng.normal(size=size).astype(np.float32) for size in ((5, 4), (6, 4), (4, 4, 4)))
    rest = rng.normal(size=100).astype(np.float32)
    tag = struct.pack("<I", 0)
    content = b"".join(
        (
            *(tag, embedding.tobytes()),
            rest[:8].tobytes(),
            *(part for matrix in attention for part in (tag, matrix.tobytes(), rest[8:12].tobytes())),
            *(tag, gemm.tobytes(), tag, rest[12:18].tobytes()),
            *(tag, rest[18:30].tobytes(), rest[30:32].tobytes()),
        )
    )
    lines = (
        "7767517",
        "6 6",
        "Input in0 0 1 in0",
        "Embed embed 1 1 in0 1 0=4 1=5 2=0 3=20",
        "LayerNorm norm 1 1 1 2 0=4 1=1.000000e-12 2=1",
        "MultiHeadAttention attention 1 1 2 3 0=4 1=2 2=16 3=4 4=4",
        "Gemm gemm 1 1 3 4 10=4 2=0 3=1 4=0 5=1 6=1 7=0 8=6 9=4",
        "InnerProduct head 1 1 4 out0 0=2 1=1 2=12",
    )
    (tmp_path / "a.param").write_text("\n".join(lines))
    (tmp_path / "a.bin").write_bytes(content)
    ncnn_int8.quantize(tmp_path / "a", tmp_path / "b")
    written = (tmp_path / "b.param").read_text().splitlines()
    assert [line.endswith(" 18=2") for line in written] == [False, False, False, True, False, True, True, False]

    reader = memoryview((tmp_path / "b.bin").read_bytes())
    position = 0

    def read(count, kind):
        nonlocal position
        values = np.frombuffer(reader, kind, count, position)
        position += values.nbytes
        return values

    def read_int8(shape):
        assert read(1, np.uint32)[0] == ncnn_int8.INT8
        return read(np.prod(shape), np.int8).reshape(shape).astype(np.float32)

    def require_close(values, scales, weights):
        np.testing.assert_array_less(np.abs(values / scales - weights), 0.5001 / scales + np.zeros_like(weights))

    require_close(read_int8((5, 4)), read(1, np.float32), embedding)
    np.testing.assert_array_equal(read(8, np.float32), rest[:8])
    matrices = []
    for _ in attention:
        matrices.append(read_int8((4, 4)))
        np.testing.assert_array_equal(read(4, np.float32), rest[8:12])
    for values, count, weights in zip(matrices, (4, 4, 4, 1), [*attention, attention[-1]], strict=False):
        require_close(values, read(count, np.float32)[:, None], weights)
    values = read_int8((6, 4))
    assert read(1, np.uint32)[0] == 0
    np.testing.assert_array_equal(read(6, np.float32), rest[12:18])
    require_close(values, read(1, np.float32), gemm)
    assert bytes(reader[position:]) == tag + rest[18:32].tobytes()

    (tmp_path / "a.bin").write_bytes(content + b"0000")
    with pytest.raises(ValueError, match="4 bytes of weights belong to no known layer"):
        ncnn_int8.quantize(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a.bin").write_bytes(content[:-4])
    with pytest.raises(ValueError, match="too short"):
        ncnn_int8.quantize(tmp_path / "a", tmp_path / "b")


def test_a_static_vector_depends_neither_on_padding_nor_on_special_tokens():
    vectors = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    used = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1])
    ids = np.array([[1, 4, 6, 1, 0, 0], [1, 2, 3, 5, 7, 1]])
    together = static.mean_vectors(vectors, used, ids, np.array([[1, 1, 1, 1, 0, 0], [1] * 6]))
    alone = static.mean_vectors(vectors, used, np.array([[4, 6]]), np.array([[1, 1]]))
    np.testing.assert_allclose(together[:1], alone, rtol=1e-5)
    np.testing.assert_allclose(alone[0], (vectors[4] + vectors[6]) / np.linalg.norm(vectors[4] + vectors[6]), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    empty = static.mean_vectors(vectors, used, np.array([[1, 1]]), np.array([[1, 1]]))
    np.testing.assert_array_equal(empty, np.zeros((1, 3)))
