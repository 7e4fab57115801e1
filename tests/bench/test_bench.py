"""The benchmark on sessions that behave badly on purpose, and once on real ones."""

import os
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import SHORT
from hypothesis import given
from hypothesis import strategies as st

from toolchain import backends
from toolchain.backends import Backend, Place
from toolchain.bench import journal, scenarios
from toolchain.bench import run as bench_run
from toolchain.bench import runner as bench_module
from toolchain.bench.cells import Cell
from toolchain.bench.journal import Journal
from toolchain.bench.process import Worker
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import Protocol
from toolchain.compare.report.columns import notes
from toolchain.compare.rows import compare
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import BenchError, ResultFileError
from toolchain.results.folder import require_measured

FAKE = {"fake": Backend("fake_backend:FakeSession", ("json",))}
TEXTS = tuple(f"sentence number {i} {'word ' * (i % 7)}" for i in range(80))
FAST = Protocol(passes=1, min_s=0.16, pass_s=40, starts=2, threads=1, batch_size=8)


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
    assert 0 <= row.noise["steal_share"] <= 1
    assert 0 <= row.noise["others_share"] <= 1
    assert len(row.cold_start.values()) == len(row.load.values()) == 2
    assert row.cold_start_ms["p50"] > row.load_ms["p50"] > 0
    assert row.with_tokenizing_ms["p50"] >= row.latency_ms["p50"]
    assert row.probabilities[0] == ((2689, 7311) if row.predictions[0] else (7311, 2689))
    assert row.batch_changed == 0


@pytest.mark.slow
def test_a_cell_has_its_own_process_the_thread_budget_and_no_hub(run):
    rows, _ = run(one={}, other={})
    facts = [row.facts["session"] for row in rows.values()]
    assert len({os.getpid(), *(f["pid"] for f in facts)}) == 3
    assert {(f["threads"], f["omp"], f["hub"]) for f in facts} == {(1, "1", "1")}


@pytest.mark.slow
def test_a_row_says_what_the_option_for_exact_products_costs(run):
    rows, _ = run(
        saturable={"us": 2000, "headroom": 0.5, "option_time": 2.0},
        portable={"headroom": 1.0, "option_time": 2.0},
        elsewhere={"headroom": 0.5},
    )
    found = rows["saturable"].facts["exactness"]
    assert found["option"] == ["an.option", "1"]
    assert 1.5 < found["time"]["value"] < 2.5
    assert found["time"]["low"] <= found["time"]["value"] <= found["time"]["high"]
    assert "exactness" not in rows["portable"].facts
    assert "exactness" not in rows["elsewhere"].facts
    result = bench_run.make_result(list(rows.values()), {}, Data("fake", TEXTS, (0,) * len(TEXTS)), 512)
    line = next(line for line in notes(compare([result])) if "saturates" in line)
    assert re.fullmatch(
        r"saturable@cpu: this processor saturates 8-bit products unless an\.option = 1, which is set; "
        r"with it a sentence takes \d\.\d\d \[\d\.\d\d, \d\.\d\d\] of the time without it\.",
        line,
    )


DEATHS = {
    "exits": ({"exit": 7}, "ended with exit code 7. It said:.*last words"),
    "crashes": ({"signal": "SIGSEGV"}, "crashed with SIGSEGV"),
    "is-killed": ({"signal": "SIGKILL"}, "was killed"),
    "raises": ({"raise": "no such kernel"}, "RuntimeError: no such kernel"),
}


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 60])
def test_a_cell_that_dies_is_a_row_that_says_so_and_the_others_go_on(run, after):
    """Four cells die in four ways in one run, before and after cells that do not."""
    dying = {name: {**behaviour, "after": after} for name, (behaviour, _) in DEATHS.items()}
    rows, _ = run(good={}, **dying, best={})
    assert [row.status for row in rows.values()] == ["ok", *["failed"] * len(DEATHS), "ok"]
    for name, (_, reason) in DEATHS.items():
        assert rows[name].latency_ms == {}
        assert re.search(reason, rows[name].reason), rows[name].reason


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_slower_is_measured_slower(run):
    rows, _ = run(fast={"us": 400}, slow={"us": 800})
    assert 1.5 < rows["slow"].latency_ms["p50"] / rows["fast"].latency_ms["p50"] < 2.5
    assert 1.5 < rows["fast"].throughput_per_s / rows["slow"].throughput_per_s < 2.5


@pytest.mark.slow
def test_a_leak_is_seen_in_the_memory(run):
    rows, _ = run(tight={}, leaky={"leak": 100_000})
    runs_made = 100  # at least this many in a quick run
    assert rows["leaky"].memory_bytes["peak"] - rows["tight"].memory_bytes["peak"] > 100_000 * runs_made


@pytest.mark.slow
def test_rounds_are_interleaved_and_every_cell_gets_the_same_work(fake, data, encoder, monkeypatch):
    turns = []
    real = bench_module._Bench._run_turn

    def spy(self, index, item, turn, work):
        turns.append((item.cell.variant, work.kind, tuple(map(tuple, work.batches))))
        real(self, index, item, turn, work)

    monkeypatch.setattr(bench_module._Bench, "_run_turn", spy)
    cells = [Cell("fake", n, "fake", "cpu", fake(n)) for n in ("a", "b", "c")]
    bench(cells, data, encoder, FAST, lambda *_: None, FAKE)
    groups = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all({name for name, _, _ in group} == {"a", "b", "c"} for group in groups)
    assert all(len({(kind, work) for _, kind, work in group}) == 1 for group in groups)
    assert len({tuple(name for name, _, _ in group) for group in groups}) > 1  # the order is not always the same
    for kind in ("single-stream", "offline"):
        asked = sorted(i for name, its, work in turns if (name, its) == ("a", kind) for batch in work for i in batch)
        assert asked == list(range(80))


@pytest.mark.parametrize(
    ("count", "slowest_s", "asked"),
    [(872, 0.01, 872), (872, 0.1, 400), (872, 10.0, 100), (80, 10.0, 80), (10**5, 0.001, 2000)],
)
def test_a_set_too_large_for_the_slowest_cell_is_sampled(count, slowest_s, asked):
    chosen = scenarios.choose_sentences(count, slowest_s, scenarios.QUICK)
    assert len(set(chosen)) == len(chosen) == asked
    assert chosen == scenarios.choose_sentences(count, slowest_s, scenarios.QUICK)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=200), st.integers(1, 64))
def test_batches_hold_every_sentence_once_within_size_and_token_budget(lengths, size):
    batches = scenarios.offline_batches(lengths, size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= size * scenarios.TOKENS_A_SENTENCE
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest)


def test_accuracy_is_over_the_whole_set_even_where_batch_1_was_sampled(run, monkeypatch):
    monkeypatch.setattr(scenarios, "MOST_SENTENCES", 16)
    rows, how = run(good={})
    assert how["single_sentences"] == 16
    assert (rows["good"].accuracy.count, rows["good"].accuracy.batch_size) == (80, 8)
    assert sum(p is not None for p in rows["good"].probabilities) == 16


@pytest.mark.slow
def test_latency_at_each_length_is_taken_where_asked_for(run):
    rows, _ = run(replace(FAST, by_length=True), good={})
    assert list(rows["good"].by_length) == list(scenarios.LENGTHS)
    assert all(len(samples.rounds) == 8 for samples in rows["good"].by_length.values())


@pytest.mark.slow
def test_an_answer_that_is_no_number_is_a_failure(run):
    rows, _ = run(good={}, bad={"nan_after": 100})
    assert rows["good"].status == "ok"
    assert (rows["bad"].status, "no number" in rows["bad"].reason) == ("failed", True)


@pytest.mark.slow
def test_an_answer_that_depends_on_its_batch_is_counted(run):
    rows, _ = run(steady={}, moody={"moody": True})
    assert rows["steady"].batch_changed == 0
    assert rows["moody"].batch_changed == 80


@pytest.mark.slow
def test_ten_per_cent_slower_is_found_with_an_interval_that_excludes_no_difference(fake, data, encoder):
    told = {"torch-fp32": {"us": 2000}, "slower": {"us": 2200}}
    cells = [Cell("fake", n, "fake", "cpu", fake(n, **does)) for n, does in told.items()]
    rows, how = bench(cells, data, encoder, FAST, lambda *_: None, FAKE)
    slower = compare([bench_run.make_result(rows, how, data, 512)])[1]
    assert slower.speedup.differs
    assert slower.speedup.low <= slower.speedup.value <= slower.speedup.high < 1
    assert slower.throughput_gain.high < 1


@pytest.mark.slow
def test_where_memory_is_short_processes_make_room_and_start_again(run, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=0))
    rows, _ = run(one={}, other={})
    assert [row.status for row in rows.values()] == ["ok", "ok"]
    assert all(len(row.cold_start.values()) > 2 for row in rows.values())


class Stopped(KeyboardInterrupt):
    pass


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(fake, data, encoder, tmp_path, monkeypatch):
    cells = [Cell("fake", n, "fake", "cpu", fake(n)) for n in ("a", "b")]
    head = {"cells": ["a@cpu", "b@cpu"], "protocol": "p"}
    file = tmp_path / "m-20260101T000000Z.journal"

    def stop(done, total, what):
        if what == "b@cpu, offline, round 6 of 8":
            raise Stopped

    with pytest.raises(Stopped):
        bench(cells, data, encoder, FAST, stop, FAKE, Journal.begin(file, head))
    with file.open("a") as torn:
        torn.write('{"cell": 0, "kind"')
    kept = Journal.resume(journal.find_newest(tmp_path, "m"), head)
    done_before = [r for r in kept.records if r["kind"] in ("single-stream", "offline")]
    assert len(done_before) >= 5 * 4
    asked = []
    real = bench_module._Bench._run_turn

    def spy(self, index, item, turn, work):
        asked.append((index, work.kind, turn))
        real(self, index, item, turn, work)

    monkeypatch.setattr(bench_module._Bench, "_run_turn", spy)
    rows, how = bench(cells, data, encoder, FAST, lambda *_: None, FAKE, kept)
    assert not {(r["cell"], r["kind"], r["turn"]) for r in done_before} & set(asked)
    assert len(done_before) + len(asked) == 2 * 2 * 8
    assert how["taken_up"]
    assert [len(row.latency.rounds) for row in rows] == [8, 8]
    assert rows[0].accuracy.correct == 72


def test_a_run_is_taken_up_by_the_same_command_only(tmp_path):
    file = tmp_path / "m-20260101T000000Z.journal"
    record = {"cell": 0, "kind": "peak", "turn": None, "reply": {}}
    Journal.begin(file, {"cells": [], "protocol": {"threads": 2}}).append(record)
    with pytest.raises(ResultFileError, match=r"had another value of protocol\. .*omit --resume"):
        Journal.resume(file, {"cells": [], "protocol": {"threads": 1}})
    with pytest.raises(ResultFileError, match="a record has an unknown cell"):
        Journal.resume(file, {"cells": [], "protocol": {"threads": 2}})
    file.write_text("[1]\n")
    with pytest.raises(ResultFileError, match="is not a valid journal"):
        Journal.resume(file, {"cells": []})
    with pytest.raises(ResultFileError, match="no interrupted run of other"):
        journal.find_newest(tmp_path, "other")
    with pytest.raises(ResultFileError, match="cannot be written"):
        Journal.begin(file / "below", {})


def test_two_runs_that_begin_in_one_second_have_a_journal_each(tmp_path):
    file, head = tmp_path / "m-20260101T000000Z.journal", {"cells": ["a"]}
    one, other = Journal.begin(file, head), Journal.begin(file, head)
    for kept, cell in ((one, 0), (other, 0)):
        kept.append({"cell": cell, "kind": "peak", "turn": None, "reply": kept.path.name})
    assert one.path == file
    one.end()
    assert journal.find_newest(tmp_path, "m") == other.path
    assert [record["reply"] for record in Journal.resume(other.path, head).records] == [other.path.name]


def test_taking_a_run_up_never_writes_its_records_anew(tmp_path, monkeypatch):
    """A kill in between would lose them: only the torn line is cut off."""
    file = tmp_path / "m-20260101T000000Z.journal"
    Journal.begin(file, {"cells": ["a"]}).append({"cell": 0, "kind": "peak", "turn": None, "reply": {}})
    whole = file.read_bytes()
    with file.open("ab") as torn:
        torn.write(b'{"cell": 0, "kind"')
    inode = file.stat().st_ino
    monkeypatch.setattr(os, "truncate", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        Journal.resume(file, {"cells": ["a"]})
    assert file.read_bytes().startswith(whole)
    monkeypatch.undo()
    assert len(Journal.resume(file, {"cells": ["a"]}).records) == 1
    assert (file.read_bytes(), file.stat().st_ino) == (whole, inode)


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
        pids.append(self.pid)
        return real(self, timeout_s)

    monkeypatch.setattr(Worker, "load", load)
    with pytest.raises(KeyboardInterrupt):
        bench([Cell("f", n, "fake", "cpu", fake(n)) for n in ("a", "b")], data, encoder, FAST, stop, FAKE)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIG_DFL)


def test_the_working_directory_cannot_stand_in_for_a_library(fake, encoder, tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    worker = Worker("fake_backend:FakeSession", fake("a").path, Place("cpu", 1), encoder, "text")
    try:
        assert worker.load(60)["facts"]["provider"] == "fake"
    finally:
        worker.close()


@pytest.mark.slow
@pytest.mark.usefixtures("short_bench")
def test_the_real_chain_on_the_tiny_checkpoint(built_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = bench_run.Request(("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"), ("cpu",), SHORT)
    result, kept = bench_run.measure(built_tiny, request, lambda line: None, lambda *_: None)
    assert kept.path.is_file()
    kept.end()
    assert not list(tmp_path.rglob("*.journal"))
    assert [row.cell for row in result.rows] == ["torch-fp32@cpu", "onnx-std@cpu", "onnx-fp32@cpu", "onnx-int8@cpu"]
    rows = {row.variant: row for row in result.rows}
    assert all(row.status == "ok" for row in rows.values()), [row.reason for row in rows.values()]
    assert rows["onnx-std"].accuracy == rows["onnx-fp32"].accuracy == rows["torch-fp32"].accuracy
    assert rows["torch-fp32"].facts["session"]["provider"] == "cpu"
    assert rows["onnx-int8"].artifact_id == built_tiny.load("onnx-int8").manifest.id
    assert rows["torch-fp32"].memory_bytes["imports"] > rows["onnx-fp32"].memory_bytes["imports"]
    assert result.data["rows"] == 872
    assert all(0 < row.size_bytes["gzip"] < row.size_bytes["total"] for row in rows.values())
    assert rows["torch-fp32"].facts["roofline"]["macs"] > rows["onnx-fp32"].facts["roofline"]["macs"] > 0
    assert all(0 < row.facts["roofline"]["share"] < 1 for row in rows.values())
    assert result.machine["versions"]["onnxruntime"]
    require_measured(result)


def test_a_runtime_that_is_not_installed_makes_its_cells_unavailable_and_no_others(fake, data, encoder):
    kinds = {**FAKE, "missing": Backend("fake_backend:FakeSession", ("no_such_runtime",))}
    cells = [Cell("fake", kind, kind, "cpu", fake(kind)) for kind in ("fake", "missing")]
    there, missing = bench(cells, data, encoder, FAST, lambda *_: None, kinds)[0]
    assert there.status == "ok"
    assert (missing.status, "no_such_runtime cannot be imported" in missing.reason) == ("unavailable", True)


def test_cells_are_planned_from_the_table():
    assert bench_run.planned_pairs((), ()) == [
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
    assert bench_run.planned_pairs(("onnx-fp32",), ("cuda",)) == [("onnx-fp32", "cuda")]
    with pytest.raises(BenchError, match=r"onnx-int8 does not run on cuda. It runs on cpu"):
        bench_run.planned_pairs(("onnx-int8",), ("cuda",))


def test_every_runtime_of_the_table_has_a_backend():
    from toolchain.artifacts import variants

    assert {variants.get(name).runtime for cells in variants.DEFAULT_CELLS.values() for name in cells} <= set(
        backends.BACKENDS
    )
