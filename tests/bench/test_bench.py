"""Tests of the benchmark on fake sessions that misbehave, and once on real sessions."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from instant_worker import InstantWorker
from sample_results import EXITS
from short_bench import SHORT

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
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import compare
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import BenchError, ResultFileError
from toolchain.results.folder import require_measured
from toolchain.results.result_file import ResultFile

FAKE = {"fake": Backend("fake_backend:FakeSession", ("json",))}
TEXTS = tuple(f"sentence number {i} {'word ' * (i % 7)}" for i in range(80))
FAST = Protocol(passes=1, min_s=0.16, pass_s=40, starts=2, threads=1, batch_size=8)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    """Removes the pause after each measurement, in which runtime threads go idle; fake sessions start no threads."""
    monkeypatch.setattr(bench_module, "SETTLE_S", 0.0)


@pytest.fixture(scope="module")
def encoder():
    return Encoder.open(inputs.SST2.parent / "model", ("input_ids", "attention_mask"), 512)


@pytest.fixture(scope="module")
def data(encoder):
    """Texts with the labels that the fake session predicts, except every tenth text, whose label is wrong."""
    labels = [int(sum(ids) % 2 == 0) for ids in encoder.encode(TEXTS)]
    return Data("fake", TEXTS, tuple(1 - y if i % 10 == 0 else y for i, y in enumerate(labels)))


@pytest.fixture
def run(fake, data, encoder):
    """Returns a function that measures fake variants; its keyword arguments map variant names to behaviours."""

    def measure(protocol=FAST, **behaviours):
        cells = [Cell("fake", name, "fake", "cpu", fake(name, **behaviour)) for name, behaviour in behaviours.items()]
        rows, run_facts = bench(cells, data, encoder, protocol, lambda *_: None, FAKE)
        return {row.variant: row for row in rows}, run_facts

    return measure


def test_a_row_has_its_figures_and_its_raw_samples(run, fake):
    rows, run_facts = run(good={"us": 300})
    row = rows["good"]
    assert row.status == "ok"
    assert (row.score.correct, row.score.count, row.score.batch_size) == (72, 80, 1)
    assert (row.score_batched.correct, row.score_batched.batch_size) == (72, 8)
    # The fake session needs at least 0.3 ms for a sentence, and several times as much on a busy machine.
    assert 0.3 <= row.latency_ms["p50"] < 15
    assert 1 / 0.015 < row.throughput_per_s < 1 / 0.0003
    memory = row.memory_bytes
    assert 0 < memory["bare"] < memory["imports"] + 1e6
    assert 0 < memory["imports"] < memory["load"] + 1e6
    assert memory["peak"] > memory["bare"]
    assert "VmHWM" in memory["method"]
    assert row.size_bytes["total"] > 0
    assert row.latency.count % 80 == 0  # each of the 80 sentences was measured equally often
    assert len(row.latency.rounds) == run_facts["rounds"] == 8
    assert len(row.predictions) == 80
    assert run_facts["threads"] == 1
    assert 0 <= row.noise["steal_share"] <= 1
    assert 0 <= row.noise["others_share"] <= 1
    assert len(row.cold_start.values()) == len(row.load.values()) == 2
    assert row.cold_start_ms["p50"] > row.load_ms["p50"] > 0
    assert row.with_tokenizing_ms["p50"] >= row.latency_ms["p50"]
    assert row.probabilities[0] == ((2689, 7311) if row.predictions[0] else (7311, 2689))
    assert row.batch_changed == 0


@pytest.mark.slow
def test_each_cell_runs_in_its_own_process_with_the_thread_limit_and_without_the_hub(run):
    rows, _ = run(one={}, other={})
    facts = [row.facts["session"] for row in rows.values()]
    assert len({os.getpid(), *(f["pid"] for f in facts)}) == 3
    assert {(f["threads"], f["omp"], f["hub"]) for f in facts} == {(1, "1", "1")}


@pytest.mark.slow
def test_a_row_states_the_cost_of_the_option_for_exact_products(run):
    rows, _ = run(
        saturable={"us": 2000, "headroom": 0.5, "option_time": 2.0},
        portable={"headroom": 1.0, "option_time": 2.0},
        elsewhere={"headroom": 0.5},
    )
    exactness = rows["saturable"].facts["exactness"]
    assert exactness["option"] == ["an.option", "1"]
    assert 1.5 < exactness["time"]["value"] < 2.5
    assert exactness["time"]["low"] <= exactness["time"]["value"] <= exactness["time"]["high"]
    assert "exactness" not in rows["portable"].facts
    assert "exactness" not in rows["elsewhere"].facts
    result = bench_run.make_result(list(rows.values()), {}, Data("fake", TEXTS, (0,) * len(TEXTS)), 512)
    line = next(line for line in notes(compare([result])) if "saturate" in line)
    assert re.fullmatch(
        r"saturable@cpu: 8-bit products saturate on this processor, so an\.option = 1 is set to make them exact\. "
        r"Time with an\.option / time without it: \d\.\d\d \[\d\.\d\d, \d\.\d\d\]\.",
        line,
    )


DEATHS = {
    "exits": ({"exit": 7}, "ended with exit code 7. Last output of the process:.*last words"),
    "crashes": ({"signal": "SIGSEGV"}, "crashed with SIGSEGV"),
    "is-killed": ({"signal": "SIGKILL"}, "was killed"),
    "raises": ({"raise": "no such kernel"}, "RuntimeError: no such kernel"),
}


@pytest.mark.slow
@pytest.mark.parametrize("runs", [0, 60])
def test_a_failed_cell_gives_a_row_with_the_reason_and_the_run_continues(run, runs):
    """Four cells fail in four ways in one run, while the cells before and after them succeed."""
    failing = {name: {**behaviour, "after": runs} for name, (behaviour, _) in DEATHS.items()}
    rows, _ = run(good={}, **failing, best={})
    assert [row.status for row in rows.values()] == ["ok", *["failed"] * len(DEATHS), "ok"]
    for name, (_, reason) in DEATHS.items():
        assert rows[name].latency_ms == {}
        assert re.search(reason, rows[name].reason), rows[name].reason


@pytest.mark.slow
def test_a_cell_that_hangs_is_stopped(run, monkeypatch):
    monkeypatch.setattr(bench_module, "TURN_TIMEOUT_S", 0.5)
    start = time.monotonic()
    rows, _ = run(good={}, bad={"hang": 600, "after": 100})
    assert rows["bad"].status == "failed"
    assert "did not answer within" in rows["bad"].reason
    assert rows["good"].status == "ok"
    assert time.monotonic() - start < 60


def test_a_provider_that_refuses_is_unavailable_not_failed(run):
    rows, _ = run(good={}, refused={"refuse": "This provider is not installed."})
    row = rows["refused"]
    assert (row.status, row.reason, row.mend) == ("unavailable", "This provider is not installed.", "Use another one.")


@pytest.mark.slow
def test_a_slower_variant_has_higher_latency_and_lower_throughput(run):
    rows, _ = run(fast={"clock_us": 400, "us": 0}, slow={"clock_us": 800, "us": 0})
    assert rows["slow"].latency_ms["p50"] / rows["fast"].latency_ms["p50"] == pytest.approx(2, rel=0.02)
    assert rows["fast"].throughput_per_s / rows["slow"].throughput_per_s == pytest.approx(2, rel=0.02)


@pytest.mark.slow
def test_peak_memory_shows_a_leak(run):
    rows, _ = run(tight={}, leaky={"leak": 100_000})
    run_count = 100  # a quick run calls the session at least 100 times
    assert rows["leaky"].memory_bytes["peak"] - rows["tight"].memory_bytes["peak"] > 100_000 * run_count


@pytest.mark.slow
def test_each_round_measures_every_cell_on_the_same_batches(fake, data, encoder, monkeypatch):
    turns = []
    original_turn = bench_module._Bench._run_turn

    def spy(self, index, item, turn, work):
        turns.append((item.cell.variant, work.kind, tuple(map(tuple, work.batches))))
        original_turn(self, index, item, turn, work)

    monkeypatch.setattr(bench_module._Bench, "_run_turn", spy)
    cells = [Cell("fake", n, "fake", "cpu", fake(n)) for n in ("a", "b", "c")]
    bench(cells, data, encoder, FAST, lambda *_: None, FAKE)
    groups = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all({name for name, _, _ in group} == {"a", "b", "c"} for group in groups)
    assert all(len({(kind, work) for _, kind, work in group}) == 1 for group in groups)
    assert len({tuple(name for name, _, _ in group) for group in groups}) > 1  # the order varies
    for kind in ("single-stream", "offline"):
        measured_indices = sorted(
            i for name, work_kind, work in turns if (name, work_kind) == ("a", kind) for batch in work for i in batch
        )
        assert measured_indices == list(range(80))


@pytest.mark.parametrize(
    ("count", "slowest_s", "sample_size"),
    [(872, 0.01, 872), (872, 0.1, 400), (872, 10.0, 100), (80, 10.0, 80), (10**5, 0.001, 2000)],
)
def test_a_data_set_too_large_for_the_slowest_cell_is_sampled(count, slowest_s, sample_size):
    sample = scenarios.choose_sentences(count, slowest_s, scenarios.QUICK)
    assert len(set(sample)) == len(sample) == sample_size
    assert sample == scenarios.choose_sentences(count, slowest_s, scenarios.QUICK)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=200), st.integers(1, 64))
def test_batches_hold_each_sentence_once_within_the_size_and_token_limits(lengths, size):
    batches = scenarios.offline_batches(lengths, size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= size * scenarios.TOKENS_A_SENTENCE
    longest_lengths = [max(lengths[i] for i in batch) for batch in batches]
    assert longest_lengths == sorted(longest_lengths)


def test_accuracy_covers_the_whole_data_set_where_batch_1_is_sampled(run, monkeypatch):
    monkeypatch.setattr(scenarios, "MOST_SENTENCES", 16)
    rows, run_facts = run(good={})
    assert run_facts["single_sentences"] == 16
    assert (rows["good"].score.count, rows["good"].score.batch_size) == (80, 8)
    assert sum(p is not None for p in rows["good"].probabilities) == 16


@pytest.mark.slow
def test_by_length_measures_the_latency_at_each_length(run):
    rows, _ = run(replace(FAST, by_length=True), good={})
    assert list(rows["good"].by_length) == list(scenarios.LENGTHS)
    assert all(len(samples.rounds) == 8 for samples in rows["good"].by_length.values())


@given(st.lists(st.integers(1, 512), min_size=1, max_size=60), st.integers(1, 40), st.integers(0, 7))
def test_mixed_batches_have_every_size_that_fits(lengths, size, turn):
    protocol = replace(FAST, batch_size=size)
    sentences = range(len(lengths))
    batches = scenarios.mixed_batches(turn, sentences, lengths, protocol)
    assert batches == scenarios.mixed_batches(turn, sentences, lengths, protocol)
    assert set(map(len, batches)) <= set(scenarios.batch_sizes(size))
    assert all(scenarios.fits_batch(len(b), max(lengths[i] for i in b), size) for b in batches)
    if size > 1 and max(lengths) <= scenarios.TOKENS_A_SENTENCE:
        counts = [max(4, 32 // each) for each in scenarios.batch_sizes(size)]
        assert [list(map(len, batches)).count(each) for each in scenarios.batch_sizes(size)] == counts
    if min(lengths) > size * scenarios.TOKENS_A_SENTENCE / 2:
        assert batches == []


def test_a_large_batch_is_not_chosen_for_its_short_sentences():
    """Eight sentences fit together only if all of them are short, which is rare."""
    lengths = [10, 512] * 100
    for turn in range(8):
        batches = scenarios.mixed_batches(turn, range(len(lengths)), lengths, replace(FAST, batch_size=32))
        assert set(map(len, batches)) == {2, 4}


@pytest.mark.parametrize(("largest", "sizes"), [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (9, [2, 4, 8, 9])])
def test_the_sizes_of_mixed_batches_double(largest, sizes):
    assert scenarios.batch_sizes(largest) == sizes


def test_service_times_are_batches_and_single_sentences_after_pauses(run, data, tmp_path):
    rows, run_facts = run(replace(FAST, service_times=True), good={"us": 300}, other={"clock_us": 300})
    bench_run.make_result(list(rows.values()), run_facts, data, 512).write(tmp_path / "run.json")
    read = {row.variant: row for row in ResultFile.read(tmp_path / "run.json").rows}
    for name, row in rows.items():
        assert read[name].mixed_batches == row.mixed_batches
        assert read[name].after_pause == row.after_pause
    for row in read.values():
        samples = row.mixed_batches
        assert [sorted(sizes) for sizes in samples.sentences] == 8 * [[2] * 16 + [4] * 8 + [8] * 4]
        assert min(us / size for us, size in zip(samples.values(), sum(samples.sentences, ()), strict=True)) > 280
        assert list(row.after_pause) == list(scenarios.PAUSES_US)
        for paused in row.after_pause.values():
            assert [len(times) for times in paused.rounds] == 8 * [scenarios.PAUSED_SENTENCES]
            assert min(paused.values()) > 280
    # On the clock of this session, a pause has exactly its planned length.
    assert all(max(paused.values()) < 320 for paused in read["other"].after_pause.values())


def test_service_times_of_batches_of_one_are_the_pauses(run):
    rows, _ = run(replace(FAST, service_times=True, batch_size=1), good={"clock_us": 300})
    assert rows["good"].mixed_batches is None
    assert list(rows["good"].after_pause) == list(scenarios.PAUSES_US)


@pytest.mark.slow
def test_a_nan_logit_fails_the_row(run):
    rows, _ = run(good={}, bad={"nan_after": 100})
    assert rows["good"].status == "ok"
    assert (rows["bad"].status, "not finite" in rows["bad"].reason) == ("failed", True)


@pytest.mark.slow
def test_a_row_counts_the_answers_that_depend_on_their_batch(run):
    rows, _ = run(steady={}, moody={"moody": True})
    assert rows["steady"].batch_changed == 0
    assert rows["moody"].batch_changed == 80


@pytest.mark.slow
def test_a_variant_that_is_ten_per_cent_slower_has_a_speedup_interval_below_one(fake, data, encoder):
    behaviours = {"torch-fp32": {"clock_us": 2000, "us": 0}, "slower": {"clock_us": 2200, "us": 0}}
    cells = [Cell("fake", name, "fake", "cpu", fake(name, **behaviour)) for name, behaviour in behaviours.items()]
    rows, run_facts = bench(cells, data, encoder, FAST, lambda *_: None, FAKE)
    slow_row = compare([bench_run.make_result(rows, run_facts, data, 512)])[1]
    assert slow_row.speedup.differs
    assert slow_row.speedup.low <= slow_row.speedup.value <= slow_row.speedup.high < 1
    assert slow_row.throughput_gain.high < 1


@pytest.mark.slow
def test_processes_end_and_restart_where_memory_is_short(run, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=0))
    rows, _ = run(one={}, other={})
    assert [row.status for row in rows.values()] == ["ok", "ok"]
    assert all(len(row.cold_start.values()) > 2 for row in rows.values())


class RunStopped(KeyboardInterrupt):
    pass


@pytest.mark.slow
def test_a_resumed_run_measures_only_the_missing_turns(fake, data, encoder, tmp_path, monkeypatch):
    cells = [Cell("fake", n, "fake", "cpu", fake(n)) for n in ("a", "b")]
    head = {"cells": ["a@cpu", "b@cpu"], "protocol": "p"}
    file = tmp_path / "m-20260101T000000Z.journal"

    def stop(done, total, label):
        if label == "b@cpu, offline, round 6 of 8":
            raise RunStopped

    with pytest.raises(RunStopped):
        bench(cells, data, encoder, FAST, stop, FAKE, Journal.begin(file, head))
    with file.open("a") as stream:
        stream.write('{"cell": 0, "kind"')
    run_journal = Journal.resume(journal.find_newest(tmp_path, "m"), head)
    old_records = [r for r in run_journal.records if r["kind"] in ("single-stream", "offline")]
    assert len(old_records) >= 5 * 4
    turns = []
    original_turn = bench_module._Bench._run_turn

    def spy(self, index, item, turn, work):
        turns.append((index, work.kind, turn))
        original_turn(self, index, item, turn, work)

    monkeypatch.setattr(bench_module._Bench, "_run_turn", spy)
    rows, run_facts = bench(cells, data, encoder, FAST, lambda *_: None, FAKE, run_journal)
    assert not {(r["cell"], r["kind"], r["turn"]) for r in old_records} & set(turns)
    assert len(old_records) + len(turns) == 2 * 2 * 8
    assert run_facts["taken_up"]
    assert [len(row.latency.rounds) for row in rows] == [8, 8]
    assert rows[0].score.correct == 72


def test_only_the_same_command_can_resume_a_run(tmp_path):
    file = tmp_path / "m-20260101T000000Z.journal"
    record = {"cell": 0, "kind": "peak", "turn": None, "reply": {"peak": 1}}
    Journal.begin(file, {"cells": [], "protocol": {"threads": 2}}).append(record)
    with pytest.raises(ResultFileError, match=r"had another value of protocol\. .*omit --resume"):
        Journal.resume(file, {"cells": [], "protocol": {"threads": 1}})
    with pytest.raises(ResultFileError, match="a record has an unknown cell"):
        Journal.resume(file, {"cells": [], "protocol": {"threads": 2}})
    file.write_text("[1]\n")
    with pytest.raises(ResultFileError, match="is not a valid journal"):
        Journal.resume(file, {"cells": []})
    with pytest.raises(ResultFileError, match="no interrupted run of unknown-model"):
        journal.find_newest(tmp_path, "unknown-model")
    with pytest.raises(ResultFileError, match="cannot be written"):
        Journal.begin(file / "below", {})


def test_two_runs_that_begin_in_the_same_second_have_separate_journals(tmp_path):
    file, head = tmp_path / "m-20260101T000000Z.journal", {"cells": ["a"]}
    first, second = Journal.begin(file, head), Journal.begin(file, head)
    for run_journal, peak in ((first, 1), (second, 2)):
        run_journal.append({"cell": 0, "kind": "peak", "turn": None, "reply": {"peak": peak}})
    assert first.path == file
    first.end()
    assert journal.find_newest(tmp_path, "m") == second.path
    assert [record["reply"] for record in Journal.resume(second.path, head).records] == [{"peak": 2}]


def test_resuming_a_run_does_not_rewrite_its_records(tmp_path, monkeypatch):
    """A killed run must not lose its records, so `Journal.resume` only cuts off the incomplete last line."""
    file = tmp_path / "m-20260101T000000Z.journal"
    Journal.begin(file, {"cells": ["a"]}).append({"cell": 0, "kind": "peak", "turn": None, "reply": {"peak": 1}})
    complete = file.read_bytes()
    with file.open("ab") as stream:
        stream.write(b'{"cell": 0, "kind"')
    inode = file.stat().st_ino
    monkeypatch.setattr(os, "truncate", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        Journal.resume(file, {"cells": ["a"]})
    assert file.read_bytes().startswith(complete)
    monkeypatch.undo()
    assert len(Journal.resume(file, {"cells": ["a"]}).records) == 1
    assert (file.read_bytes(), file.stat().st_ino) == (complete, inode)


def test_a_cell_without_an_artifact_keeps_its_reason(data, encoder):
    cells = [
        Cell("fake", "a", "fake", "cuda", None, "unavailable", "No GPU.", "Get one."),
        Cell("fake", "b", "fake", "cpu", None, "failed", "The build crashed.", "Mend it."),
    ]
    rows, _ = bench(cells, data, encoder, FAST, lambda *_: None, FAKE)
    assert [(r.status, r.reason, r.mend) for r in rows] == [
        ("unavailable", "No GPU.", "Get one."),
        ("failed", "The build crashed.", "Mend it."),
    ]


def test_an_interrupt_ends_all_processes(fake, data, encoder, monkeypatch):
    pids = []

    def stop(done, total, label):
        if label.startswith("b@cpu"):
            raise KeyboardInterrupt

    original_load = Worker.load

    def load(self, timeout_s):
        pids.append(self.pid)
        return original_load(self, timeout_s)

    monkeypatch.setattr(Worker, "load", load)
    with pytest.raises(KeyboardInterrupt):
        bench([Cell("f", n, "fake", "cpu", fake(n)) for n in ("a", "b")], data, encoder, FAST, stop, FAKE)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIG_DFL)


def test_a_worker_imports_no_library_from_the_working_directory(fake, encoder, tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    worker = Worker("fake_backend:FakeSession", fake("a").path, Place("cpu", 1), encoder, "text")
    try:
        assert worker.load(60)["facts"]["provider"] == "fake"
    finally:
        worker.close()


@pytest.mark.slow
@pytest.mark.usefixtures("short_bench")
def test_a_benchmark_of_real_sessions_measures_the_tiny_checkpoint(built_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = bench_run.Request(("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"), ("cpu",), SHORT)
    result, run_journal = bench_run.measure(built_tiny, request, lambda line: None, lambda *_: None)
    assert run_journal.path.is_file()
    run_journal.end()
    assert not list(tmp_path.rglob("*.journal"))
    assert [row.cell for row in result.rows] == ["torch-fp32@cpu", "onnx-std@cpu", "onnx-fp32@cpu", "onnx-int8@cpu"]
    rows = {row.variant: row for row in result.rows}
    assert all(row.status == "ok" for row in rows.values()), [row.reason for row in rows.values()]
    assert rows["onnx-std"].score == rows["onnx-fp32"].score == rows["torch-fp32"].score
    assert rows["torch-fp32"].facts["session"]["provider"] == "cpu"
    assert rows["onnx-int8"].artifact_id == built_tiny.load("onnx-int8").manifest.id
    assert rows["torch-fp32"].memory_bytes["imports"] > rows["onnx-fp32"].memory_bytes["imports"]
    assert result.data["rows"] == 872
    assert all(0 < row.size_bytes["gzip"] < row.size_bytes["total"] for row in rows.values())
    assert rows["torch-fp32"].facts["roofline"]["macs"] > rows["onnx-fp32"].facts["roofline"]["macs"] > 0
    assert all(0 < row.facts["roofline"]["share"] < 1 for row in rows.values())
    assert result.machine["versions"]["onnxruntime"]
    require_measured(result)


def test_a_missing_runtime_makes_only_its_own_cells_unavailable(fake, data, encoder):
    kinds = {**FAKE, "missing": Backend("fake_backend:FakeSession", ("no_such_runtime",))}
    cells = [Cell("fake", kind, kind, "cpu", fake(kind)) for kind in ("fake", "missing")]
    present, missing = bench(cells, data, encoder, FAST, lambda *_: None, kinds)[0]
    assert present.status == "ok"
    assert (missing.status, "no_such_runtime cannot be imported" in missing.reason) == ("unavailable", True)


def test_planned_returns_the_default_cells_and_checks_the_provider():
    assert bench_run.planned_pairs((), ()) == [
        ("torch-fp32", "cpu"),
        ("torch-bf16", "cpu"),
        ("torch-compile", "cpu"),
        ("torch-compile-bf16", "cpu"),
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
        ("torch-compile-fp16", "cuda-graphs"),
        ("onnx-fp16", "cuda-graphs"),
        ("onnx-std", "tensorrt"),
    ]
    assert bench_run.planned_pairs(("onnx-fp32",), ("cuda",)) == [("onnx-fp32", "cuda")]
    with pytest.raises(BenchError, match=r"onnx-int8 does not run on cuda. onnx-int8 runs on cpu"):
        bench_run.planned_pairs(("onnx-int8",), ("cuda",))


def test_the_provider_cuda_includes_the_cell_with_cuda_graphs():
    assert bench_run.planned_pairs(("onnx-fp16",), ("cuda",)) == [("onnx-fp16", "cuda"), ("onnx-fp16", "cuda-graphs")]
    assert bench_run.planned_pairs(("onnx-fp16",), ("cuda-graphs",)) == [("onnx-fp16", "cuda-graphs")]
    with pytest.raises(BenchError, match=r"onnx-fp32 does not run on cuda-graphs. onnx-fp32 runs on cpu and cuda"):
        bench_run.planned_pairs(("onnx-fp32",), ("cuda-graphs",))


def test_a_run_prepares_tensorrt_for_its_largest_batch():
    assert bench_run.planned_pairs(("onnx-std",), ("tensorrt",)) == [("onnx-std", "tensorrt")]
    assert bench_run.planned_pairs((), ("tensorrt",)) == [("onnx-std", "tensorrt")]
    assert replace(scenarios.QUICK, batch_size=8).place("tensorrt").batch_size == 8


def test_every_runtime_in_the_variant_table_has_a_backend():
    from toolchain.artifacts import variants

    assert {variants.get(name).runtime for cells in variants.DEFAULT_CELLS.values() for name in cells} <= set(
        backends.BACKENDS
    )


def with_exits(artifact):
    """Returns the artifact as one with two exits."""
    return replace(artifact, manifest=replace(artifact.manifest, facts={"exits": EXITS}))


@pytest.fixture(params=[False, True], ids=["without exits", "with exits"])
def resume(fake, data, encoder, tmp_path, monkeypatch, request):
    """Returns a function that resumes a complete run after a change of its records; returns the row of the cell."""
    monkeypatch.setattr(bench_module, "Worker", InstantWorker)
    artifact = with_exits(fake("a")) if request.param else fake("a")
    cells = [Cell("m", "a", "fake", "cpu", artifact), Cell("m", "b", "fake", "cuda", None, "unavailable", "No GPU.")]
    head = {"cells": ["a@cpu", "b@cuda"]}
    first = Journal.begin(tmp_path / "m-20260101T000000Z.journal", head)
    bench(cells, data, encoder, FAST, lambda *_: None, FAKE, first)
    lines = [json.loads(line) for line in first.path.read_text().splitlines()]

    def run(change):
        records = [record for record in lines[1:] if change(record) is not False]
        first.path.write_text("".join(json.dumps(line) + "\n" for line in [head, *records]))
        return bench(cells, data, encoder, FAST, lambda *_: None, FAKE, Journal.resume(first.path, head))[0][0]

    return run


def test_a_run_that_ended_before_its_memory_peak_measures_the_peak(resume):
    row = resume(lambda record: record["kind"] != "peak")
    assert (row.status, row.memory_bytes["peak"]) == ("ok", 5)


@pytest.mark.parametrize("resume", [True], indirect=True)
def test_a_run_that_ended_before_it_found_the_exits_finds_them(resume):
    expected = tuple(index % 3 for index in range(len(TEXTS)))
    for kind in ("", "exits"):
        row = resume(lambda record, kind=kind: record["kind"] != kind)
        assert (row.status, row.exits) == ("ok", expected)
    assert row.exit_shares == (0.3375, 0.3375, 0.325)


@pytest.mark.parametrize("resume", [False], indirect=True)
def test_a_cell_without_exits_has_no_sentences_that_exit(resume):
    row = resume(lambda record: None)
    assert (row.exits, row.exit_shares) == ((), ())


def change_reply(kind, **changes):
    def change(record):
        if record["kind"] == kind:
            record["reply"] = {**record["reply"], **changes}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(cell=1), "a record belongs to a cell without an artifact"),
        (
            lambda record: record.update(kind="surprise") if record["turn"] else None,
            "the kind or the number of a turn is unknown",
        ),
        (change_reply("start", memory={}), "the memory after loading is unknown"),
        (change_reply("start", load_us=0), "reply.load_us: the time is not positive"),
        (change_reply("start", surprise=1), "reply.surprise"),
        (change_reply("peak", peak=-1), "reply.peak: the number is negative"),
        (change_reply("single-stream", us=[]), "a record of a@cpu does not fit the run"),
        (change_reply("single-stream", answered=[0]), "a record of a@cpu does not fit the run"),
        (change_reply("single-stream", probabilities=[]), "a record of a@cpu does not fit the run"),
        (change_reply("single-stream", resident_us=[1]), "a record of a@cpu does not fit the run"),
        (change_reply("offline", answers=[[7] * 8] * 2), "a record of a@cpu does not fit the run"),
        (change_reply("offline", sizes=[1]), "a record of a@cpu does not fit the run"),
        (lambda record: record.update(turn=99) if record["turn"] else None, "a record of a@cpu does not fit the run"),
    ],
)
def test_a_record_that_does_not_fit_the_run_is_refused(resume, change, message):
    with pytest.raises(ResultFileError, match=f"is not a valid journal: .*{message}"):
        resume(change)


@pytest.mark.parametrize(
    ("resume", "change", "message"),
    [
        (True, change_reply("exits", exits=[]), "the numbers of exits and of sentences contradict each other"),
        (True, change_reply("exits", exits=[3] * len(TEXTS)), "a record of a@cpu does not fit the run"),
        (True, change_reply("exits", exits=[-1] * len(TEXTS)), "reply.exits.0: the number is negative"),
        (True, change_reply("exits", answered=[0] * len(TEXTS)), "a record of a@cpu does not fit the run"),
        (
            False,
            lambda record: (
                record.update(kind="exits", reply={"exits": [0], "answered": [0]}) if record["kind"] == "peak" else None
            ),
            "a record of a@cpu does not fit the run",
        ),
    ],
    indirect=["resume"],
)
def test_exits_that_do_not_fit_the_run_are_refused(resume, change, message):
    with pytest.raises(ResultFileError, match=f"is not a valid journal: .*{message}"):
        resume(change)


def test_only_an_error_of_the_toolchain_ends_a_cell(resume):
    def fail(record, name="GraphError"):
        record.update(kind="failure", turn=None, reply={"type": name, "cause": "It\x1b broke.", "mend": ""})

    row = resume(fail)
    assert (row.status, row.reason) == ("failed", "It\ufffd broke.")
    with pytest.raises(ResultFileError, match="this is not an error of the toolchain"):
        resume(lambda record: fail(record, "Path"))
