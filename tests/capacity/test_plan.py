"""Tests of plans, and of the command that prints them."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_samples import SIZES, measured, measured_result

from toolchain.capacity import replicas as planning
from toolchain.capacity import text
from toolchain.capacity.load import Load
from toolchain.capacity.machines import Machines
from toolchain.capacity.outcome import choose_rows, plan_all
from toolchain.capacity.queueing import Batching
from toolchain.capacity.replicas import QueryGoal, ReplicaPlan, plan_replicas, simulate
from toolchain.capacity.rows import RowsGoal, plan_rows, seconds_per_row
from toolchain.capacity.service import service_of
from toolchain.errors import BenchError, VerdictError
from toolchain.results import statistics
from toolchain.results.measurements import Samples

MACHINES = Machines("core", 2, 8)
WAKE_US = {0: 0, 1000: 200, 16_000: 1000}


def plan_queries(row, qps, p99_ms, **goal):
    return plan_replicas(row, MACHINES, QueryGoal(Load(qps), p99_ms / 1000, **goal), lambda _: None)


@pytest.fixture(autouse=True)
def short_simulations(monkeypatch):
    monkeypatch.setattr(planning, "QUERIES", 4000)
    monkeypatch.setattr(planning, "SEEDS", 12)


# Rows


@settings(deadline=None)
@given(rows=st.floats(1e5, 1e12), hours=st.floats(0.5, 100), factor=st.integers(2, 50), price=st.floats(0, 10))
def test_a_plan_for_rows_scales_with_the_rows(rows, hours, factor, price):
    row = measured()
    one, more = (plan_rows(row, MACHINES, RowsGoal(n, 3600 * hours, price)) for n in (rows, rows * factor))
    assert more.unit_hours.value == pytest.approx(factor * one.unit_hours.value, rel=1e-12)
    assert more.cost.value == pytest.approx(factor * one.cost.value, rel=1e-12)
    assert factor * (one.processes - 1) < more.processes <= factor * one.processes
    for plan, count in ((one, rows), (more, rows * factor)):
        assert plan.cost.value == pytest.approx(plan.units * plan.hours.value * price)
        assert plan.cost.low <= plan.cost.value <= plan.cost.high
        assert plan.hours.value <= hours
        # The processes end in time at the slow end of the interval, and one process fewer does not.
        assert plan.hours.high <= hours * (1 + 1e-9)
        assert plan.rows_per_s.low * 3600 * hours * (plan.processes - 1) < count + plan.processes


def test_seconds_per_row_are_those_of_batches_and_of_tokenising():
    row = measured(spread=0.0)
    assert seconds_per_row(row).value == pytest.approx(0.6 * 4e-3 + 1e-4)
    row = measured()
    seconds = seconds_per_row(row)
    assert seconds.value == pytest.approx(1 / row.throughput_per_s + 1e-4, rel=1e-4)
    low, high = statistics.mean_interval([us + 100 for us in row.batches.sentence_times()])
    assert (seconds.low, seconds.high) == pytest.approx((low / 1e6, high / 1e6), rel=1e-3)
    few = seconds_per_row(measured(rounds=3))
    assert (few.low, few.high, few.largest) == (None, None, few.value)


def test_a_time_shorter_than_one_row_is_refused():
    with pytest.raises(VerdictError, match=r"for one row, which is more than the 0.001 s of --within"):
        plan_rows(measured(), MACHINES, RowsGoal(10, 0.001))


@pytest.mark.parametrize(("lost", "what"), [("batches", "times of batches"), ("with_tokenizing", "single sentences")])
def test_rows_need_samples(lost, what):
    with pytest.raises(BenchError, match=f"has no .*{what}.* `toolchain bench --variant onnx-int8 --provider cpu`"):
        plan_rows(measured(**{lost: None}), MACHINES, RowsGoal(1e6, 3600))


def test_machines_are_as_large_as_the_measured_one():
    assert [MACHINES.count_for(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert Machines("core", 8, 4).count_for(3) == Machines("core", 2, 0).count_for(3) == 3
    gpus = [{"name": "A GPU"}, {"name": "A GPU"}]
    result = measured_result(measured(provider="cuda"))
    result.machine["gpu"].extend(gpus)
    assert Machines.of(result, result.rows[0]) == Machines("GPU", 1, 2)
    cpu = measured_result(measured())
    assert Machines.of(cpu, cpu.rows[0]) == Machines("core", 2, 2)


# Service times


def test_service_times_are_those_of_the_file_and_interpolated_between_sizes():
    row = measured()
    service = service_of(row)
    assert service.sizes == [1, *SIZES]
    moments = np.arange(2000) * 0.01
    times = service.draw(moments, np.random.default_rng(0))
    measured_s = {size: set() for size in service.sizes}
    measured_s[1] = {us / 1e6 for us in row.with_tokenizing.values()}
    for us, size in zip(row.mixed_batches.values(), sum(row.mixed_batches.sentences, ()), strict=True):
        measured_s[size].add(us / 1e6)
    for size in service.sizes:
        assert set(times(size)) <= measured_s[size]
    assert np.array(times(6)) == pytest.approx((np.array(times(4)) + np.array(times(8))) / 2)
    assert np.array(times(5)) == pytest.approx(0.75 * np.array(times(4)) + 0.25 * np.array(times(8)))
    assert service.per_second(1) < 8 / service.mean_s(8) <= service.per_second(8)


def test_times_of_one_period_come_from_one_round():
    rounds = [[1000 + number] * 20 for number in range(8)]
    samples = Samples.from_single(rounds)
    row = measured(with_tokenizing=samples, with_tokenizing_ms=samples.milliseconds(), mixed_batches=None)
    service = service_of(row)
    assert service.round_s == pytest.approx(0.02, rel=0.01)
    moments = np.arange(4000) * service.round_s / 20
    times = np.array(service.draw(moments, np.random.default_rng(0))(1)).reshape(-1, 20)
    assert (np.ptp(times, axis=1) == 0).mean() > 0.9  # the edges of the periods have rounding errors
    assert 2 < len(np.unique(times)) <= 8


def test_idle_time_takes_the_measured_difference_after_a_pause():
    wake = service_of(measured(wake_us=WAKE_US)).wake()
    idle_s = [0.0005, 0.001, 0.0085, 0.016, 9.0]
    assert [wake(each) for each in idle_s] == pytest.approx([0.0001, 0.0002, 0.0006, 0.001, 0.001])
    assert service_of(measured()).wake()(1.0) == 0
    without_zero = {pause: samples for pause, samples in measured(wake_us=WAKE_US).after_pause.items() if pause}
    assert service_of(measured(after_pause=without_zero)).wake_s == {}
    unequal = {**measured(wake_us=WAKE_US).after_pause, 0: Samples.from_single([[4000]] * 8)}
    assert service_of(measured(after_pause=unequal)).wake_s == {}


def test_batches_that_a_round_lacks_do_not_count_as_measured():
    row = measured()
    rounds = [list(times) for times in row.mixed_batches.rounds]
    sizes = [list(row_sizes) for row_sizes in row.mixed_batches.sentences]
    sizes[3] = [size if size != 8 else 7 for size in sizes[3]]
    assert service_of(measured(mixed_batches=Samples.from_rounds(rounds, sizes))).sizes == [1, 2, 4]
    assert service_of(measured(mixed_batches=Samples.from_rounds(rounds[1:], sizes[1:]))).sizes == [1]


# Replicas


def test_a_plan_keeps_its_goal_and_one_replica_fewer_does_not():
    row = measured()
    plan = plan_queries(row, 1500, 40)
    assert plan.latency.p99_s.high <= 0.04
    assert plan.latency.seeds == tuple(range(20, 32))
    service = service_of(row)
    fewer = simulate(service, Load(1500), plan.batching, plan.replicas - 1, plan.latency.seeds, queries=4000)
    assert fewer.p99_s.high > 0.04
    assert plan.shared_replicas <= plan.replicas
    assert plan.median_replicas <= plan.replicas
    for count, keeps in ((plan.median_replicas, True), (plan.median_replicas - 1, False)):
        at_median = simulate(service, Load(1500), plan.batching, count, plan.latency.seeds)
        assert (at_median.p99_s.value <= 0.04) == keeps
    shared = simulate(service, Load(1500), plan.batching, plan.shared_replicas, plan.latency.seeds, shared=True)
    assert shared.p99_s.high <= 0.045
    assert plan_queries(row, 1500, 40) == plan  # the seeds determine the plan


def test_no_replica_is_always_busy():
    row = measured(spread=0.0, mixed_batches=None)
    rate = service_of(row).per_second(1)
    plan = plan_queries(row, 2.9 * rate, 100_000)
    assert plan.replicas == plan.median_replicas == plan.shared_replicas == 4
    assert plan_queries(row, 2.8 * rate, 100_000).replicas == 3


def test_the_first_queries_do_not_count_because_they_wait_for_nobody(monkeypatch):
    service = service_of(measured())
    load = Load(0.95 * service.per_second(1))
    counted = simulate(service, load, Batching(), 1, range(20), queries=1000)
    monkeypatch.setattr(planning, "WARM_UP", 0.0)
    assert counted.p50_s.value > 1.05 * simulate(service, load, Batching(), 1, range(20), queries=1000).p50_s.value


def test_batches_that_save_time_need_fewer_replicas():
    batched = plan_queries(measured(batch_share=0.2), 3000, 40)
    single = plan_queries(measured(batch_share=1.1), 3000, 40)
    assert batched.replicas < 0.6 * single.replicas
    assert batched.batching.largest > 1
    assert batched.latency.mean_batch > 1
    assert single.batching.window_s == 0


def test_a_goal_that_one_query_misses_has_no_plan():
    with pytest.raises(VerdictError, match="No number of replicas keeps a p99 of 2 ms for onnx-int8@cpu: even if no"):
        plan_queries(measured(), 10, 2)


def test_a_rate_beyond_all_replicas_has_no_plan(monkeypatch):
    monkeypatch.setattr(planning, "MOST_REPLICAS", 20)
    with pytest.raises(VerdictError, match="The rate needs more than 20 replicas of onnx-int8@cpu"):
        plan_queries(measured(), 1e6, 40)
    with pytest.raises(
        VerdictError, match=r"No number of replicas up to 20 keeps a p99 of 6 ms for onnx-int8@cpu\. Allow"
    ):
        plan_queries(measured(), 4300, 6)
    with pytest.raises(VerdictError, match="A replica that was idle takes up to 1 ms longer"):
        plan_queries(measured(wake_us=WAKE_US), 20, 5.5)


def test_idle_replicas_need_the_time_to_wake_up():
    quick, slow = (plan_queries(measured(wake_us=wake), 20, 40) for wake in (None, WAKE_US))
    assert slow.latency.p50_s.value == pytest.approx(quick.latency.p50_s.value + 0.001, rel=0.1)
    assert (quick.wake_ms, slow.wake_ms) == (None, pytest.approx(1.0))


def test_the_load_of_a_trace_counts_its_bursts():
    burst = np.sort(np.concatenate([np.linspace(0, 100, 2000), np.linspace(50, 50.5, 500)]))
    even = np.linspace(0, 100, 2500)
    plans = [
        plan_replicas(measured(), MACHINES, QueryGoal(Load.of_trace(each), 0.04), lambda _: None)
        for each in (burst, even)
    ]
    assert plans[0].replicas > 2 * plans[1].replicas
    assert plans[0].latency.busy < 1


@settings(deadline=None, max_examples=10)
@given(replicas=st.integers(2, 12), batching=st.sampled_from([Batching(), Batching(8), Batching(8, 0.002)]))
def test_more_replicas_have_a_lower_p99(replicas, batching):
    service = service_of(measured(spread=0.0))
    load = Load(0.9 * (replicas - 1) * service.per_second(1))
    for shared in (False, True):
        fewer, more = (
            simulate(service, load, batching, count, range(4), queries=4000, shared=shared).p99_s.value
            for count in (replicas, 2 * replicas)
        )
        assert more <= fewer * 1.01


def test_the_fewest_number_is_found_with_few_questions():
    for answer in range(1, 200):
        asked = []

        def keeps(number, answer=answer, asked=asked):
            asked.append(number)
            return number >= answer

        assert planning._fewest(1, 150, keeps) == min(answer, 150)
        assert len(asked) <= 18


# The command


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "result.json"
    rows = [measured(), measured(8000.0, variant="torch-fp32", batch_share=1.0, seed=2)]
    measured_result(*rows).write(path)
    return path


def table_cell(out, cell, column):
    """Returns the text in a column of the printed table."""
    header, *rows = [re.split(r"\s{2,}", line) for line in out.splitlines() if "  " in line and "*" not in line]
    (row,) = [row for row in rows if row[0] == cell]
    return row[header.index(column)]


def test_the_command_plans_rows(say, file):
    code, out, err = say("plan", file, "--rows", "1e9", "--within", "6h", "--price", "0.05")
    assert (code, err) == (0, "")
    assert out.startswith("1,000,000,000 rows within 6 h, measured on c (2 cores):")
    assert out.index("onnx-int8@cpu") < out.index("torch-fp32@cpu")
    assert "Each machine runs one process with 2 cores" in out
    code, out, _ = say("plan", file, "--rows", "1e9", "--within", "6h", "--price", "0.05", "--json")
    body = json.loads(out)
    assert body["goal"] == {"rows": 1e9, "within_s": 21_600.0, "price": 0.05}
    first = body["plans"][0]
    assert (first["units"], first["machines"]) == (2 * first["processes"], first["processes"])
    assert first["cost"]["value"] == pytest.approx(first["unit_hours"]["value"] * 0.05, rel=1e-5)
    assert first["hours"]["low"] <= first["hours"]["value"] <= first["hours"]["high"] <= 6


def test_the_command_plans_queries(say, file, tmp_path):
    options = ("--qps", "1000", "--p99-ms", "60", "--variant", "onnx-int8", "--price", "0.1")
    code, out, _ = say("plan", file, *options)
    assert code == 0
    assert "torch-fp32" not in out
    code, printed, _ = say("plan", file, *options, "--json")
    body = json.loads(printed)
    (plan,) = body["plans"]
    assert table_cell(out, "onnx-int8@cpu", "replicas") == str(plan["replicas"])
    assert table_cell(out, "onnx-int8@cpu", "with one queue") == str(plan["shared_replicas"])
    assert table_cell(out, "onnx-int8@cpu", "at the median") == str(plan["median_replicas"])
    assert plan["p99_ms"]["high"] <= 60
    assert plan["cost_per_hour"] == pytest.approx(plan["units"] * 0.1)
    assert plan["seeds"] == list(range(20, 32))
    assert body["goal"]["trace"] is None
    assert any("random replica, as a Kubernetes Service does" in each for each in body["assumptions"])
    assert any("of 1, 2, 4, 8 queries" in each for each in body["assumptions"])
    (tmp_path / "trace.csv").write_text("at\n" + "\n".join(str(0.001 * n) for n in range(3000)))
    code, printed, _ = say("plan", file, *options[2:], "--trace", tmp_path / "trace.csv", "--json")
    assert code == 0
    assert json.loads(printed)["goal"]["qps"] == pytest.approx(1000)


def test_variants_that_cannot_reach_the_goal_are_named(say, file):
    code, out, _ = say("plan", file, "--qps", "5", "--p99-ms", "7")
    assert code == 0
    assert "No number of replicas keeps a p99 of 7 ms for torch-fp32@cpu" in out
    code, out, err = say("plan", file, "--qps", "5", "--p99-ms", "1", "--json")
    assert code == 3
    assert json.loads(out)["plans"] == []
    assert len(json.loads(out)["refusals"]) == 2
    assert "No number of replicas keeps a p99 of 1 ms for onnx-int8@cpu" in err
    assert "1 other cell cannot reach the goal either." in err
    assert err.count("Allow a larger p99") == 1
    code, out, err = say("plan", file, "--qps", "5", "--p99-ms", "1", "--variant", "onnx-int8@cpu")
    assert (code, out) == (3, "")
    code, out, err = say("plan", file, "--rows", "5", "--within", "0.001s")
    assert (code, out) == (3, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give a goal: --rows with --within, or --qps with --p99-ms."),
        (["--price", "1"], "Give a goal"),
        (["--rows", "5", "--within", "1h", "--qps", "5", "--p99-ms", "5"], "--rows excludes --qps and --trace."),
        (["--rows", "5", "--within", "1h", "--trace", "x"], "--rows excludes --qps and --trace."),
        (["--rows", "5"], "--rows and --within need each other."),
        (["--qps", "5", "--p99-ms", "5", "--within", "1h"], "--rows and --within need each other."),
        (["--qps", "5"], "--p99-ms and --qps (or --trace) need each other."),
        (["--trace", "x"], "--p99-ms and --qps (or --trace) need each other."),
        (["--rows", "5", "--within", "1h", "--p99-ms", "5"], "--p99-ms and --qps (or --trace) need each other."),
        (["--qps", "5", "--p99-ms", "5", "--trace-column", "x"], "--trace-column needs --trace."),
        (["--rows", "-5", "--within", "1h"], "--rows"),
        (["--rows", "nan", "--within", "1h"], "must be a finite number"),
        (["--rows", "inf", "--within", "1h"], "--rows"),
        (["--rows", "5", "--within", "6 hours"], "is not a duration such as 90s, 20m, 2h or 1d"),
        (["--rows", "5", "--within", "-6h"], "is not a duration"),
        (["--rows", "5", "--within", "0h"], "is not a duration"),
        (["--qps", "0", "--p99-ms", "5"], "--qps"),
        (["--qps", "-1", "--p99-ms", "5"], "--qps"),
        (["--qps", "5", "--p99-ms", "nan"], "must be a finite number"),
        (["--qps", "5", "--p99-ms", "5", "--price", "-1"], "--price"),
    ],
)
def test_wrong_options_are_usage_errors(say, file, options, message):
    code, out, err = say("plan", file, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_a_result_without_the_samples_names_the_command_that_measures_them(say, tmp_path):
    path = tmp_path / "old.json"
    old = measured(with_tokenizing=None, with_tokenizing_ms={}, mixed_batches=None)
    measured_result(old).write(path)
    for options in (("--rows", "5", "--within", "1h"), ("--qps", "5", "--p99-ms", "50")):
        code, out, err = say("plan", path, *options)
        assert (code, out) == (1, "")
        assert "`toolchain bench --variant onnx-int8 --provider cpu`" in err
        assert "[E-BENCH]" in err
    code, _, err = say("plan", path, "--qps", "5", "--p99-ms", "50", "--variant", "onnx-fp32")
    assert code == 1
    assert "has no measurement of onnx-fp32" in err
    assert "`toolchain bench --variant onnx-fp32`" in err
    code, _, err = say("plan", tmp_path / "missing.json", "--rows", "5", "--within", "1h")
    assert code == 1
    assert "There is no result file" in err


def test_a_result_without_batches_and_pauses_plans_single_queries(say, tmp_path):
    path = tmp_path / "single.json"
    measured_result(measured(mixed_batches=None)).write(path)
    code, out, _ = say("plan", path, "--qps", "500", "--p99-ms", "60")
    assert code == 0
    assert table_cell(out, "onnx-int8@cpu", "largest batch") == "1"
    assert out.count("`toolchain bench --service-times`") == 2


def test_plans_of_failed_rows_are_not_made():
    failed = measured(variant="onnx-fp32", status="failed", reason="It crashed.")
    result = measured_result(measured(), failed)

    assert [row.cell for row in choose_rows(result, ())] == ["onnx-int8@cpu"]
    with pytest.raises(BenchError, match="has no measurement of onnx-fp32"):
        choose_rows(result, ("onnx-fp32",))
    with pytest.raises(BenchError, match="has no measured row"):
        choose_rows(measured_result(failed), ())


def test_cores_and_gpus_have_tables_of_their_own(say, tmp_path):
    result = measured_result(measured(8000.0), measured(500.0, provider="cuda"), measured(variant="onnx-fp32"))
    result.machine["gpu"].append({"name": "A GPU"})
    result.write(tmp_path / "both.json")
    options = ("plan", tmp_path / "both.json", "--rows", "1e9", "--within", "6h")
    code, out, _ = say(*options)
    assert code == 0
    places = [
        out.index(each) for each in ("core hours", "onnx-fp32@cpu", "onnx-int8@cpu", "GPU hours", "onnx-int8@cuda")
    ]
    assert places == sorted(places)
    assert "Each machine runs one process with 2 cores" in out
    assert "Each machine runs one process with 1 GPU" in out
    code, out, err = say(*options, "--price", "2")
    assert (code, out) == (2, "")
    assert "the result file has rows for both. Choose cells with --variant, such as --variant onnx-int8@cpu." in err
    assert say(*options, "--price", "2", "--variant", "onnx-int8@cuda")[0] == 0


@pytest.mark.parametrize("width", [80, 132])
def test_lines_fit_into_a_terminal(width):
    result = measured_result(measured(), measured(8000.0, variant="onnx-pruned50-int8", seed=2))
    rows_goal, goal = RowsGoal(1e9, 3600, 0.05), QueryGoal(Load(300), 0.06, 0.1)
    rows = plan_all(result, result.rows, lambda row, machines: plan_rows(row, machines, rows_goal))
    queries = plan_all(result, result.rows, lambda row, machines: plan_replicas(row, machines, goal, lambda _: None))
    for lines, args in ((text.rows_lines, (rows_goal, rows)), (text.replica_lines, (goal, "", queries))):
        narrow, wide = lines(result, *args, width), lines(result, *args)
        assert max(map(len, narrow)) <= width < max(map(len, wide))
        # No word is lost. The names of the cells come again with each part of the table.
        assert set(" ".join(narrow).split()) == set(" ".join(wide).split())


def test_a_plan_has_no_price_without_a_price():
    plan = plan_queries(measured(), 500, 60)
    assert isinstance(plan, ReplicaPlan)
    assert plan.cost_per_hour is plan.to_json()["cost_per_hour"] is None
