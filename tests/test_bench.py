"""The benchmark on sessions that behave badly on purpose, and once on real ones."""

import os
import re
import signal
import time
from types import SimpleNamespace

import pytest

from toolchain import backends, inputs, runs
from toolchain.backends import Backend, Place
from toolchain.errors import BenchError
from toolchain.inputs import Data, Encoder
from toolchain.steps import bench as bench_module
from toolchain.steps.bench import Cell, Protocol, bench
from toolchain.worker import Worker

FAKE = {"fake": Backend("fake_backend:FakeSession", ("json",))}
TEXTS = tuple(f"sentence number {i} {'word ' * (i % 7)}" for i in range(80))
FAST = Protocol(passes=1, turn_s=0.02, pass_s=40, threads=1, batch_size=8)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    """Fake sessions leave no thread spinning."""
    monkeypatch.setattr(bench_module, "SETTLE_S", 0.0)


@pytest.fixture(scope="module")
def encoder():
    return Encoder.open(inputs.SST2.parent / "model", ("input_ids", "attention_mask"), 512)


@pytest.fixture(scope="module")
def data(encoder):
    """Labels the fake session answers rightly, but for every tenth."""
    labels = [int(sum(ids) % 2 == 0) for ids in encoder.encode(TEXTS)]
    return Data("fake", TEXTS, tuple(1 - y if i % 10 == 0 else y for i, y in enumerate(labels)))


@pytest.fixture
def run(fake, data, encoder):
    """Measures fake variants: name → behaviour."""

    def measure(protocol=FAST, **behaviours):
        cells = [Cell("fake", n, "fake", "cpu", fake(n, **does)) for n, does in behaviours.items()]
        rows, how = bench(cells, data, encoder, protocol, lambda *_: None, FAKE)
        return {row.variant: row for row in rows}, how

    return measure


def test_a_row_has_all_four_figures_and_the_raw_samples(run, fake):
    rows, how = run(good={"us": 300})
    row = rows["good"]
    assert row.status == "ok"
    assert (row.accuracy.correct, row.accuracy.count, row.accuracy.batch_size) == (72, 80, 1)
    assert (row.accuracy_batched.correct, row.accuracy_batched.batch_size) == (72, 8)
    assert 0.3 <= row.latency_ms["p50"] < 1.5
    assert 1 / 0.0015 < row.throughput_per_s < 1 / 0.0003
    memory = row.memory_bytes
    assert 0 < memory["bare"] < memory["imports"] + 1e6
    assert 0 < memory["imports"] < memory["load"] + 1e6
    assert memory["peak"] > memory["bare"]
    assert "VmHWM" in memory["method"]
    assert row.size_bytes["total"] > 0
    assert row.latency.count % 80 == 0  # every sentence equally often
    assert len(row.latency.rounds) == how["rounds"] == 8
    assert len(row.predictions) == 80
    assert how["threads"] == 1
    assert 0 <= how["steal_share"] <= 1


def test_a_cell_has_its_own_process_the_thread_budget_and_no_hub(run):
    rows, _ = run(one={}, other={})
    facts = [row.facts["session"] for row in rows.values()]
    assert len({os.getpid(), *(f["pid"] for f in facts)}) == 3
    assert {(f["threads"], f["omp"], f["hub"]) for f in facts} == {(1, "1", "1")}


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ({"exit": 7}, "ended with exit code 7. It said:.*last words"),
        ({"signal": "SIGSEGV"}, "crashed with SIGSEGV"),
        ({"signal": "SIGKILL"}, "was killed"),
        ({"raise": "no such kernel"}, "RuntimeError: no such kernel"),
    ],
)
@pytest.mark.parametrize("after", [0, 200])
def test_a_cell_that_dies_is_a_row_that_says_so_and_the_others_go_on(run, behaviour, says, after):
    rows, _ = run(good={}, bad={**behaviour, "after": after}, best={})
    assert [row.status for row in rows.values()] == ["ok", "failed", "ok"]
    assert rows["bad"].latency_ms == {}
    assert re.search(says, rows["bad"].reason), rows["bad"].reason


def test_a_cell_that_hangs_is_stopped(run, monkeypatch):
    monkeypatch.setattr(bench_module, "TURN_TIMEOUT_S", 0.5)
    started = time.monotonic()
    rows, _ = run(good={}, bad={"hang": 600, "after": 100})
    assert rows["bad"].status == "failed"
    assert "did not answer within" in rows["bad"].reason
    assert rows["good"].status == "ok"
    assert time.monotonic() - started < 60


def test_a_provider_that_refuses_is_unavailable_not_failed(run):
    rows, _ = run(good={}, refused={"refuse": "This provider is not here."})
    row = rows["refused"]
    assert (row.status, row.reason, row.mend) == ("unavailable", "This provider is not here.", "Use another one.")


def test_what_is_slower_is_measured_slower(run):
    rows, _ = run(fast={"us": 400}, slow={"us": 800})
    assert 1.5 < rows["slow"].latency_ms["p50"] / rows["fast"].latency_ms["p50"] < 2.5
    assert 1.5 < rows["fast"].throughput_per_s / rows["slow"].throughput_per_s < 2.5


def test_a_leak_is_seen_in_the_memory(run):
    rows, _ = run(tight={}, leaky={"leak": 100_000})
    runs_made = 100  # at least this many in a quick run
    assert rows["leaky"].memory_bytes["peak"] - rows["tight"].memory_bytes["peak"] > 100_000 * runs_made


def test_rounds_are_interleaved_and_every_cell_gets_the_same_work(fake, data, encoder, monkeypatch):
    turns = []
    real = bench_module._turn

    def spy(item, kind, work, protocol):
        turns.append((item.cell.variant, kind, tuple(map(tuple, work))))
        real(item, kind, work, protocol)

    monkeypatch.setattr(bench_module, "_turn", spy)
    cells = [Cell("fake", n, "fake", "cpu", fake(n)) for n in ("a", "b", "c")]
    bench(cells, data, encoder, FAST, lambda *_: None, FAKE)
    groups = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all({name for name, _, _ in group} == {"a", "b", "c"} for group in groups)
    assert all(len({(kind, work) for _, kind, work in group}) == 1 for group in groups)
    assert len({tuple(name for name, _, _ in group) for group in groups}) > 1  # the order is not always the same
    asked = sorted(i for name, kind, work in turns if (name, kind) == ("a", "singles") for batch in work for i in batch)
    assert asked == list(range(80))
    batched = sorted(i for name, kind, work in turns if (name, kind) == ("a", "batches") for b in work for i in b)
    assert batched == list(range(80))


@pytest.mark.parametrize(
    ("count", "slowest_s", "asked"),
    [(872, 0.01, 872), (872, 0.1, 400), (872, 10.0, 100), (80, 10.0, 80), (10**5, 0.001, 2000)],
)
def test_a_set_too_large_for_the_slowest_cell_is_sampled(count, slowest_s, asked):
    cells = [SimpleNamespace(sentence_s=slowest_s), SimpleNamespace(sentence_s=slowest_s / 10)]
    chosen = bench_module._choose(count, cells, Protocol.quick(1))
    assert len(set(chosen)) == len(chosen) == asked
    assert chosen == bench_module._choose(count, cells, Protocol.quick(1))


def test_accuracy_is_over_the_whole_set_even_where_batch_1_was_sampled(run, monkeypatch):
    monkeypatch.setattr(bench_module, "MOST_SENTENCES", 16)
    rows, how = run(good={})
    assert how["single_sentences"] == 16
    assert (rows["good"].accuracy.count, rows["good"].accuracy.batch_size) == (80, 8)


def test_a_cell_without_an_artifact_keeps_its_reason(data, encoder):
    cells = [
        Cell("fake", "a", "fake", "cuda", None, "unavailable", "No GPU.", "Get one."),
        Cell("fake", "b", "fake", "cpu", None, "failed", "It could not be built.", "Mend it."),
    ]
    rows, _ = bench(cells, data, encoder, FAST, lambda *_: None, FAKE)
    assert [(r.status, r.reason, r.mend) for r in rows] == [
        ("unavailable", "No GPU.", "Get one."),
        ("failed", "It could not be built.", "Mend it."),
    ]


def test_an_interrupt_leaves_no_process_behind(fake, data, encoder, monkeypatch):
    pids = []

    def stop(done, total, what):
        if what.startswith("b@cpu"):
            raise KeyboardInterrupt

    real = Worker.load

    def load(self, timeout_s):
        pids.append(self._process.pid)
        return real(self, timeout_s)

    monkeypatch.setattr(Worker, "load", load)
    with pytest.raises(KeyboardInterrupt):
        bench([Cell("f", n, "fake", "cpu", fake(n)) for n in ("a", "b")], data, encoder, FAST, stop, FAKE)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIG_DFL)


def test_the_working_directory_cannot_stand_in_for_a_library(fake, tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    worker = Worker("fake_backend:FakeSession", fake("a").path, Place("cpu", 1))
    try:
        assert worker.load(60)["facts"]["provider"] == "fake"
    finally:
        worker.close()


def test_the_real_chain_on_the_tiny_checkpoint(built_tiny):
    request = runs.Request(("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"), ("cpu",), FAST)
    result = runs.measure(built_tiny, request, lambda line: None, lambda *_: None)
    assert [row.cell for row in result.rows] == ["torch-fp32@cpu", "onnx-std@cpu", "onnx-fp32@cpu", "onnx-int8@cpu"]
    rows = {row.variant: row for row in result.rows}
    assert all(row.status == "ok" for row in rows.values()), [row.reason for row in rows.values()]
    assert rows["onnx-std"].accuracy == rows["onnx-fp32"].accuracy == rows["torch-fp32"].accuracy
    assert rows["torch-fp32"].facts["session"]["provider"] == "cpu"
    assert rows["onnx-int8"].artifact_id == built_tiny.load("onnx-int8").manifest.id
    assert rows["torch-fp32"].memory_bytes["imports"] > rows["onnx-fp32"].memory_bytes["imports"]
    assert result.data["rows"] == 872
    assert result.machine["versions"]["onnxruntime"]
    runs.judge(result)


def test_a_runtime_that_is_not_installed_makes_its_cells_unavailable_and_no_others(fake, data, encoder):
    kinds = {**FAKE, "missing": Backend("fake_backend:FakeSession", ("no_such_runtime",))}
    cells = [Cell("fake", kind, kind, "cpu", fake(kind)) for kind in ("fake", "missing")]
    there, missing = bench(cells, data, encoder, FAST, lambda *_: None, kinds)[0]
    assert there.status == "ok"
    assert (missing.status, "no_such_runtime cannot be imported" in missing.reason) == ("unavailable", True)


def test_cells_are_planned_from_the_table():
    assert runs.planned((), ()) == [
        ("torch-fp32", "cpu"),
        ("torch-bf16", "cpu"),
        ("torch-int8", "cpu"),
        *((f"torch-pruned{ratio}", "cpu") for ratio in (30, 40, 50)),
        *((f"torch-pruned{ratio}-int8", "cpu") for ratio in (30, 40, 50)),
        ("bnb-int8", "cpu"),
        ("bnb-nf4", "cpu"),
        ("onnx-std", "cpu"),
        ("onnx-fp32", "cpu"),
        ("onnx-int8", "cpu"),
        *((f"onnx-pruned{ratio}-int8", "cpu") for ratio in (30, 40, 50)),
        *((name, "cuda") for name in ("torch-fp32", "torch-fp16", "bnb-int8", "bnb-nf4", "onnx-fp32", "onnx-fp16")),
    ]
    assert runs.planned(("onnx-fp32",), ("cuda",)) == [("onnx-fp32", "cuda")]
    with pytest.raises(BenchError, match=r"onnx-int8 is not measured on cuda. It is measured on cpu"):
        runs.planned(("onnx-int8",), ("cuda",))


def test_every_runtime_of_the_table_has_a_backend():
    from toolchain import variants

    assert {variants.get(name).runtime for cells in variants.DEFAULT_CELLS.values() for name in cells} <= set(
        backends.BACKENDS
    )
