"""Tests of the scenario server: its search of the highest rate, its clock, its rows, and MLPerf's LoadGen beside it."""

import itertools
import math
import statistics
import time
from collections import deque
from dataclasses import replace
from threading import Event, Thread
from types import SimpleNamespace

import pytest
from fake_backend import Clock
from hypothesis import given, settings
from hypothesis import strategies as st
from instant_worker import InstantWorker
from sample_results import measured_row, result
from scipy.stats import kstest

from toolchain.backends import Backend, Place
from toolchain.bench import run as bench_run
from toolchain.bench import runner, server, worker
from toolchain.bench.cells import Cell
from toolchain.bench.journal import Journal
from toolchain.bench.process import Worker
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import Protocol
from toolchain.compare.report.columns import columns
from toolchain.compare.report.flat import to_csv
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import compare
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import ResultFileError
from toolchain.results.result_file import ResultFile

FAKE = {"fake": Backend("fake_backend:FakeSession", ("json",))}
TEXTS = tuple(f"sentence number {i} {'word ' * (i % 7)}" for i in range(80))
DATA = Data("fake", TEXTS, tuple(i % 2 for i in range(80)))
PROTOCOL = Protocol(passes=1, min_s=0.5, pass_s=40, starts=1, threads=1, batch_size=8, server_p99_ms=20.0)
FIXED = replace(PROTOCOL, server_p99_ms=None, server_qps=500.0)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(runner, "SETTLE_S", 0.0)


@pytest.fixture(scope="module")
def encoder():
    return Encoder.open(inputs.SST2.parent / "model", ("input_ids", "attention_mask"), 512)


def search(keeps, single_qps=100.0, protocol=PROTOCOL):
    """Runs the search on a server that keeps the p99 if `keeps(rate, is_search)`; returns outcome and turns."""
    turns = []
    while rate := server.next_rate(turns, protocol, single_qps):
        latency_us = 1000 if keeps(*rate) else 1_000_000
        turns.append(server.Turn(*rate, planned=100, us=[latency_us] * 100, sizes=[1] * 100))
    return server.outcome(turns, protocol), turns


@settings(deadline=None)
@given(capacity=st.floats(2, 5000), single_qps=st.just(100.0))
def test_the_search_finds_the_highest_rate_within_its_resolution(capacity, single_qps):
    outcome, turns = search(lambda qps, _: qps <= capacity, single_qps)
    assert capacity / server.RESOLUTION**2 < outcome.qps <= capacity
    assert len(outcome.turns) == server.ROUNDS
    assert len(turns) < 40


def test_a_session_that_no_rate_overloads_ends_the_search():
    outcome, _ = search(lambda *_: True)
    assert 100 * server.HIGHEST_FACTOR / 2 <= outcome.qps <= 100 * server.HIGHEST_FACTOR


def test_a_session_that_is_always_late_has_the_rate_0():
    outcome, turns = search(lambda *_: False)
    assert outcome.qps == 0
    assert {turn.qps for turn in outcome.turns} == {min(turn.qps for turn in turns)}
    assert outcome.fact(PROTOCOL) == {"qps": 0.0, "p99_limit_ms": 20.0, "mean_batch": 1.0}


def test_longer_turns_that_miss_the_limit_lower_the_rate():
    outcome, _ = search(lambda qps, is_search: qps <= (200 if is_search else 150))
    assert 150 / server.RESOLUTION < outcome.qps <= 150
    assert search(lambda _, is_search: is_search)[0].qps == 0


def test_a_turn_that_stopped_early_does_not_keep_the_limit():
    stopped = server.Turn(50.0, True, planned=100, us=[1000] * 99, sizes=[1] * 99)
    assert server.next_rate([stopped], PROTOCOL, 100.0) == (50.0, True)
    assert server.next_rate([stopped, stopped], PROTOCOL, 100.0) == (25.0, True)
    kept = replace(stopped, us=[1000] * 100)
    assert server.next_rate([stopped, kept], PROTOCOL, 100.0) == (100.0, True)


def test_a_fixed_rate_is_not_searched():
    outcome, turns = search(lambda *_: False, protocol=FIXED)
    assert {turn.qps for turn in turns} == {outcome.qps} == {500.0}
    assert outcome.fact(FIXED) == {"qps": 500.0, "mean_batch": 1.0}
    assert server.next_rate([], replace(FIXED, server_qps=None), 100.0) is None


@settings(deadline=None)
@given(turn=st.integers(0, 50), qps=st.floats(0.01, 1e5), is_search=st.booleans())
def test_a_turn_has_a_bounded_number_of_poisson_arrivals(turn, qps, is_search):
    work = server.plan(turn, qps, is_search, range(80), PROTOCOL)
    count = len(work.arrivals_us)
    assert count == len(work.sentences)
    assert server.FEWEST_QUERIES <= count <= server.MOST_QUERIES
    assert work.arrivals_us == sorted(work.arrivals_us)
    mean = work.arrivals_us[-1] / count / 1e6 * qps  # 1 for infinitely many arrivals
    assert abs(mean - 1) < 6 / math.sqrt(count)
    other = server.plan(turn, 2 * qps, is_search, range(80), PROTOCOL)
    assert other.sentences[:50] == work.sentences[:50]
    assert other.arrivals_us[49] == pytest.approx(work.arrivals_us[49] / 2, abs=1)


def open_worker(fake, encoder, **behaviour):
    return Worker("fake_backend:FakeSession", fake("m", **behaviour).path, Place("cpu", 1), encoder, TEXTS[0])


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_waiting_agrees_with_queueing_theory(fake, encoder, load):
    """The mean wait of Poisson arrivals at one server is given by the formula of Pollaczek and Khinchine."""
    session = open_worker(fake, encoder, us=0, clock_us=1000)
    try:
        session.load(60)
        session.ask({"do": "data", "texts": TEXTS, "lengths": []}, 60)
        work = server.plan(0, 1000 * load, False, range(80), replace(FIXED, min_s=20 / load))
        reply = session.ask(work.message(batch_size=1), 60)
    finally:
        session.close()
    assert reply["sizes"] == [1] * len(work.sentences)
    service_us, second_moment = 1000, 1000**2 * (1 + 0.05**2 / 3)  # the clock varies evenly by 5 %
    wait_us = load / service_us * second_moment / (2 * (1 - load))
    assert statistics.mean(reply["us"]) == pytest.approx(service_us + wait_us, rel=0.1)


def test_a_batch_takes_the_waiting_sentences_that_fit():
    child = object.__new__(worker._Child)
    child._ids = [[0] * 4, [0] * 300, [0] * 600]
    assert child._take_batch([0, 0, 0], 8) == [0, 0, 0]
    assert child._take_batch([0] * 20, 8) == [0] * 8
    assert child._take_batch([1, 0, 0], 8) == [1]  # 2 × 300 tokens exceed 8 × 64
    assert child._take_batch([2, 0], 8) == [2]  # one sentence always fits


@pytest.fixture
def measure(fake, encoder):
    def run(protocol, **behaviours):
        cells = [Cell("m", name, "fake", "cpu", fake(name, us=0, **b)) for name, b in behaviours.items()]
        rows, facts = bench(cells, DATA, encoder, protocol, lambda *_: None, FAKE)
        return bench_run.make_result(rows, facts, DATA, 512)

    return run


def test_the_comparison_shows_the_highest_rate(measure, tmp_path):
    measured = measure(PROTOCOL, fast={"clock_us": 1000}, slow={"clock_us": 4000}, late={"clock_us": 30_000})
    measured.write(tmp_path / "run.json")
    rows = compare([ResultFile.read(tmp_path / "run.json")], "slow")
    fast, slow, late = (row.measurement.facts["server"]["qps"] for row in rows)
    # Queueing theory (M/D/1) gives the rates with a p99 of 20 ms: about 900 queries per second if a query takes 1 ms,
    # and about 160 if a query takes 4 ms. Batches save no time here: each sentence of a batch takes this time.
    assert 600 < fast < 1000
    assert 50 < slow < 250
    assert late == 0
    assert all(row.measurement.server_ms["p99"] <= 20 for row in rows[:2])
    assert rows[0].server_gain.value == pytest.approx(fast / slow)
    assert rows[2].server_gain is None
    texts = {column.name: column.text(rows[0]) for column in columns(rows)}
    assert texts["server rate"] == f"{fast:.4g} ({fast / slow:.2f}×)"
    assert "server p99" not in texts
    note = "Queries/s: the highest rate of random arrivals whose p99 is at most 20 ms, waiting included."
    assert notes(rows).count(note) == 1
    header = to_csv(rows).splitlines()[0]
    assert ",server_qps,server_p99_limit_ms,server_p99_ms,server_mean_batch,server_gain," in header


def test_at_a_fixed_rate_the_comparison_shows_the_p99(measure):
    rows = compare([measure(FIXED, fast={"clock_us": 1000}, slow={"clock_us": 1900})], "fast")
    p99 = [row.measurement.server_ms["p99"] for row in rows]
    assert p99[0] < p99[1]
    texts = {column.name: column.text(rows[1]) for column in columns(rows)}
    assert texts["server p99"] == f"{p99[1]:.1f}"
    assert "server rate" not in texts
    assert rows[1].server_gain is None
    assert "Server p99: latency with random arrivals at 500 queries/s, waiting included." in notes(rows)


def test_a_rate_that_its_samples_contradict_is_refused():
    samples = {"server": measured_row("a", 8).latency, "server_ms": measured_row("a", 8).latency_ms}
    fact = {"qps": 10.0, "p99_limit_ms": 9.0, "mean_batch": 1.0}
    measured_row("a", 8, facts={"server": fact}, **samples).check()
    with pytest.raises(ValueError, match="exceeds the limit of its p99"):
        measured_row("a", 8, facts={"server": {**fact, "p99_limit_ms": 7.0}}, **samples).check()
    with pytest.raises(ValueError, match="lacks its samples"):
        measured_row("a", 8, facts={"server": fact}).check()
    assert result(measured_row("a", 8, facts={"server": fact}, **samples)).to_json()


def test_an_interrupted_scenario_resumes(fake, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Worker", InstantWorker)
    cells = [Cell("m", name, "fake", "cpu", fake(name)) for name in ("a", "b")]
    journal = Journal.begin(tmp_path / "m-20260101T000000Z.journal", {"cells": ["a@cpu", "b@cpu"]})
    complete, _ = bench(cells, DATA, encoder, FIXED, lambda *_: None, FAKE, journal)
    lines = journal.path.read_text().splitlines(keepends=True)
    served = [number for number, line in enumerate(lines) if '"kind":"server"' in line]
    assert len(served) == 2 * server.ROUNDS

    def resume(text):
        journal.path.write_text(text)
        again = Journal.resume(journal.path, {"cells": ["a@cpu", "b@cpu"]})
        return bench(cells, DATA, encoder, FIXED, lambda *_: None, FAKE, again)[0]

    rows = resume("".join(lines[: served[2]]))
    assert [row.facts["server"] for row in rows] == [row.facts["server"] for row in complete]
    assert [len(row.server.rounds) for row in rows] == [server.ROUNDS, server.ROUNDS]
    for old, new in (('"qps":500.0', '"qps":501.0'), ('"is_search":false', '"is_search":true')):
        with pytest.raises(ResultFileError, match="does not fit the run"):
            resume("".join(lines).replace(old, new))
    with pytest.raises(ResultFileError, match="the numbers of queries contradict each other"):
        resume("".join(lines).replace('"sizes":[1', '"sizes":[2'))
    without_singles = [line for line in lines if '"kind":"single-stream"' not in line]
    with pytest.raises(ResultFileError, match="does not fit the run"):
        resume("".join(without_singles))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--qps", "5"], "--p99-ms and --qps need --scenario server."),
        (["--scenario", "server", "--qps", "5", "--p99-ms", "5"], "--p99-ms and --qps exclude each other."),
        (["--scenario", "server", "--p99-ms", "0"], "--p99-ms"),
        (["--scenario", "server", "--qps", "-1"], "--qps"),
        (["--scenario", "offline"], "--scenario"),
    ],
)
def test_wrong_options_are_usage_errors(say, options, message):
    code, _, err = say("bench", *options)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_loadgen_of_mlperf_measures_the_same(tmp_path, monkeypatch):
    """LoadGen sends queries to a server; the worker answers the same arrivals in the same times on a fake clock.

    The times are those that the server really took, so the load of the machine has the same effect on both.
    """
    loadgen = pytest.importorskip("mlperf_loadgen")
    rate, count = 100.0, 300
    arrived_s, answered_s, summary = _measure_with_loadgen(loadgen, rate, count, tmp_path)
    arrivals_us = [round(1e6 * (arrival - arrived_s[0])) + 1 for arrival in arrived_s]
    services_s = [
        answer - max(arrival, earlier)
        for answer, arrival, earlier in zip(answered_s, arrived_s, [0.0, *answered_s], strict=False)
    ]
    clock, remaining_s = Clock(), iter([0.0, 0.0, *services_s])  # the worker first runs two sentences as a warm-up
    child = object.__new__(worker._Child)
    child._ids, child._encode_batch = [[0]], lambda batch: batch
    child._session = SimpleNamespace(run=lambda _: clock.sleep(next(remaining_s)))
    monkeypatch.setattr(worker, "time", clock)
    times_us = child.server(arrivals_us, [0] * count, 10**9, 0, batch_size=1)["us"]
    assert statistics.mean(times_us) * 1000 == pytest.approx(summary["Mean latency (ns)"], rel=0.1)
    assert statistics.quantiles(times_us, n=100)[98] * 1000 == pytest.approx(
        summary["99.00 percentile latency (ns)"], rel=0.1
    )
    ours_us = server.plan(0, rate, False, range(80), replace(FIXED, min_s=count / rate)).arrivals_us
    gaps = [[later - earlier for earlier, later in itertools.pairwise(times)] for times in (ours_us, arrivals_us)]
    assert kstest(*gaps).pvalue > 1e-4  # both have the same distribution


def _measure_with_loadgen(loadgen, rate, count, folder):
    """Returns the arrivals and the answers of the queries in seconds, and the figures that LoadGen reports."""
    waiting, arrived, ended = deque(), Event(), Event()
    arrivals_s, answers_s = [], []

    def issue(samples):
        arrivals_s.append(time.perf_counter())
        waiting.extend(sample.id for sample in samples)
        arrived.set()

    def answer():
        while not ended.is_set():
            arrived.wait(0.1)
            arrived.clear()
            while waiting:
                time.sleep(0.004)
                answers_s.append(time.perf_counter())
                loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(waiting.popleft(), 0, 0)])

    settings, logs = loadgen.TestSettings(), loadgen.LogSettings()
    settings.scenario, settings.mode = loadgen.TestScenario.Server, loadgen.TestMode.PerformanceOnly
    settings.server_target_qps, settings.server_target_latency_ns = rate, 10**9
    settings.min_query_count = settings.max_query_count = count
    settings.min_duration_ms = 0
    logs.log_output.outdir = str(folder)
    system = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(80, 80, lambda _: None, lambda _: None)
    thread = Thread(target=answer)
    thread.start()
    try:
        loadgen.StartTestWithLogSettings(system, library, settings, logs)
    finally:
        ended.set()
        thread.join()
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(system)
    lines = (folder / "mlperf_log_summary.txt").read_text().splitlines()
    figures = dict(line.split(" : ") for line in lines if "latency (ns)" in line and " : " in line)
    return arrivals_s, answers_s, {name.strip(): float(value) for name, value in figures.items()}
