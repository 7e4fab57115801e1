"""Limits, regressions between two runs, and the CSV table."""

import csv
import dataclasses
import io
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_results import result, row

from toolchain.compare.limits import Limits, check_limits, require_winner
from toolchain.compare.regressions import find_regressions, parse_share, require_no_regressions
from toolchain.compare.report.flat import COLUMNS, to_csv
from toolchain.compare.report.verdict import choice_json, choice_lines, regression_json, regression_lines
from toolchain.compare.rows import compare
from toolchain.errors import ResultFileError, VerdictError
from toolchain.results.measurements import Accuracy, Measurement, Samples

RUN = {"threads": 2, "batch_size": 32}
LABELS = [1] * 100
NEWER = "2026-02-01T00:00:00+00:00"


def answers(wrong):
    return tuple(0 if index in wrong else 1 for index in range(100))


def timed(variant, ms, wrong=range(10), provider="cpu", **changes):
    """A row with these medians per round, in milliseconds; a sentence takes the same time in a batch."""
    medians = [ms] if isinstance(ms, int | float) else ms
    latency = Samples.from_single([[round(value * 1000)] for value in medians])
    batches = Samples.from_rounds([[round(value * 32000)] for value in medians], [[32]] * len(medians))
    figures = {
        "variant": variant,
        "provider": provider,
        "artifact_id": f"id of {variant}",
        "accuracy": Accuracy(100 - len(wrong), 100, 1),
        "predictions": answers(wrong),
        "latency": latency,
        "latency_ms": latency.milliseconds(),
        "batches": batches,
        "throughput_per_s": batches.per_second(),
        "memory_bytes": {"peak": 100_000_000},
        "size_bytes": {"total": 20_000_000},
    }
    return row(**{**figures, **changes})


def rows_of(*measurements, labels=True, **changes):
    data = {"name": "d", "rows": 100, "sha256": "0"} | ({"labels": LABELS} if labels else {})
    return compare([result(*measurements, **{"run": RUN, "data": data, **changes})])


def sized(variant, ms, megabytes, **changes):
    return timed(variant, ms, size_bytes={"total": round(megabytes * 1e6)}, **changes)


def cells(rows):
    return [r.measurement.cell for r in rows]


FP32 = timed("torch-fp32", 8)
INT8 = timed("onnx-int8", 1, range(11))
FAILED = Measurement("m", "onnx-int4", "cpu", None, "failed", "It crashed.", "Look.")
ABSENT = Measurement("m", "onnx-fp32", "cuda", None, "unavailable", "No GPU answers.", "Get one.")
PUBLISHED = Measurement("m", "torch-fp16", "cpu", None, "reported", accuracy=Accuracy(99, 100, 1))


# Limits


def test_the_fastest_row_within_the_limits_wins():
    rows = rows_of(FP32, INT8, sized("onnx-fp32", 3, 25), sized("torch-int8", 2, 40))
    verdict = check_limits(rows, Limits(max_drop=0.5, max_p95_ms=5, max_size_mb=30))
    assert verdict.winner.measurement.cell == "onnx-fp32@cpu"
    assert cells(verdict.passed) == ["onnx-fp32@cpu"]
    require_winner(verdict)


def test_the_baseline_itself_may_win():
    verdict = check_limits(rows_of(FP32, INT8), Limits(max_drop=0))
    assert verdict.winner.measurement is FP32


def test_a_figure_equal_to_its_limit_passes():
    limits = Limits(max_drop=1.0, max_p95_ms=1.0, max_size_mb=20, max_memory_mb=100)
    assert check_limits(rows_of(FP32, INT8), limits).winner.measurement is INT8


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (
            Limits(max_drop=0.4),
            "accuracy drop 1.00 points, limit 0.4: over by 0.6 (150.0%); McNemar p 1: may be chance",
        ),
        (Limits(max_p95_ms=0.8), "p95 1.00 ms, limit 0.8: over by 0.2 (25.0%)"),
        (Limits(max_size_mb=16), "size 20.00 MB, limit 16: over by 4 (25.0%)"),
        (Limits(max_memory_mb=80), "peak memory 100.00 MB, limit 80: over by 20 (25.0%)"),
        (Limits(max_size_mb=0), "size 20.00 MB, limit 0: over by 20"),
        (Limits(max_p95_ms=float("nan")), "p95 1.00 ms, limit nan: over by nan (nan%)"),
    ],
)
def test_a_miss_says_figure_limit_and_by_how_much(limits, says):
    rows = [r for r in rows_of(FP32, INT8) if r.measurement is INT8]
    verdict = check_limits(rows, limits)
    assert verdict.winner is None
    assert [str(broken) for broken in verdict.misses[0].broken] == [says]


@pytest.mark.parametrize(
    ("changes", "limits", "says"),
    [
        ({"size_bytes": {}}, Limits(max_size_mb=1e9), "size unknown, limit 1e+09 MB"),
        ({"memory_bytes": {}}, Limits(max_memory_mb=1e9), "peak memory unknown, limit 1e+09 MB"),
        ({"latency_ms": {}}, Limits(max_p95_ms=1e9), "p95 unknown, limit 1e+09 ms"),
        ({}, Limits(max_drop=100), "accuracy drop unknown, limit 100 points; the run has no baseline"),
    ],
)
def test_an_unknown_figure_does_not_pass(changes, limits, says):
    verdict = check_limits(rows_of(timed("onnx-int8", 1, **changes)), limits)
    assert not verdict.passed
    assert str(verdict.misses[0].broken[0]) == says


def test_a_row_without_an_accuracy_says_so():
    rows = rows_of(FP32, timed("onnx-int8", 1, accuracy=None, predictions=()))
    miss = check_limits(rows, Limits(max_drop=100)).misses[0]
    assert "the row or its baseline has no accuracy" in str(miss.broken[0])


def test_an_unknown_figure_is_no_obstacle_where_nothing_limits_it():
    assert check_limits(rows_of(timed("onnx-int8", 1, memory_bytes={})), Limits(max_p95_ms=5)).winner


def test_ties_go_to_the_smaller_then_the_more_accurate_then_the_first_by_name():
    small, large = sized("onnx-b", 1, 10), sized("onnx-a", 1, 20)
    assert check_limits(rows_of(large, small), Limits(max_p95_ms=5)).winner.measurement is small
    better, worse = timed("onnx-b", 1, range(5)), timed("onnx-a", 1)
    assert check_limits(rows_of(worse, better), Limits(max_p95_ms=5)).winner.measurement is better
    one, other = timed("onnx-b", 1), timed("onnx-a", 1)
    assert check_limits(rows_of(one, other), Limits(max_p95_ms=5)).winner.measurement is other


def test_the_nearest_misses_break_the_fewest_limits_and_those_least():
    both = sized("f", 5.01, 30.1)
    rows = rows_of(sized("a", 9, 90), sized("b", 9, 10), sized("c", 6, 10), sized("d", 4, 33), sized("e", 5, 31), both)
    verdict = check_limits(rows, Limits(max_p95_ms=5, max_size_mb=30))
    assert cells(miss.row for miss in verdict.misses) == ["e@cpu", "d@cpu", "c@cpu"]
    assert len(verdict.misses[0].broken) == 1


def test_an_unknown_figure_is_further_than_any_known_one():
    rows = rows_of(sized("a", 9, 99), timed("b", 1, size_bytes={}))
    assert cells(m.row for m in check_limits(rows, Limits(max_size_mb=1)).misses) == ["a@cpu", "b@cpu"]


def test_only_measured_rows_are_judged():
    rows = rows_of(FP32, FAILED, ABSENT) + rows_of(PUBLISHED)
    verdict = check_limits(rows, Limits(max_p95_ms=1))
    assert cells(miss.row for miss in verdict.misses) == ["torch-fp32@cpu"]


def test_the_front_is_that_of_the_table_within_the_limits_or_not():
    rows = rows_of(FP32, INT8, timed("onnx-slow", 9, range(20)))
    verdict = check_limits(rows, Limits(max_drop=0))
    assert cells(verdict.front) == ["onnx-int8@cpu", "torch-fp32@cpu"]
    assert (
        "Pareto front of accuracy, p50 and size: onnx-int8@cpu, torch-fp32@cpu; outside the limits: onnx-int8@cpu"
        in (choice_lines(verdict))
    )


def test_rows_of_several_machines_are_not_judged_together():
    elsewhere = dict(result().machine, id="y")
    with pytest.raises(ResultFileError, match="of one machine and one data set"):
        check_limits(rows_of(FP32) + rows_of(FP32, machine=elsewhere), Limits(max_p95_ms=9))


def test_nothing_within_the_limits_is_the_answer_no():
    verdict = check_limits(rows_of(FP32, INT8), Limits(max_p95_ms=0.5))
    with pytest.raises(
        VerdictError, match=r"No row is within the limits. The nearest is onnx-int8@cpu: p95 1.00 ms"
    ) as no:
        require_winner(verdict)
    assert no.value.exit_code == 3
    assert no.value.hint
    assert choice_lines(verdict)[0] == "Winner: none; no row is within the limits."
    assert choice_json(verdict)["winner"] is None
    with pytest.raises(VerdictError, match="There is no measured row to check"):
        require_winner(check_limits(rows_of(FAILED), Limits()))


def test_the_interval_says_what_may_be_chance_where_no_answers_are_kept():
    rows = rows_of(FP32, timed("onnx-int8", 1, range(12), predictions=()))
    broken = check_limits(rows, Limits(max_drop=1)).misses[0].broken[0]
    assert broken.remark.startswith("the interval 80.")
    assert broken.remark.endswith("includes the baseline's accuracy: may be chance")
    sure = rows_of(FP32, timed("onnx-int8", 1, range(60)))
    assert "McNemar p 1.8e-15" in check_limits(sure, Limits(max_drop=1)).misses[0].broken[0].remark
    assert "chance" not in check_limits(sure, Limits(max_drop=1)).misses[0].broken[0].remark
    far = rows_of(FP32, timed("onnx-int8", 1, range(60), predictions=()))
    assert check_limits(far, Limits(max_drop=1)).misses[0].broken[0].remark == ""


def test_a_noisy_or_stale_winner_is_called_so():
    noisy = timed("onnx-int8", 1, noise={"steal_share": 0.2})
    rows = compare([result(FP32, noisy, run=RUN)], None, {("m", "onnx-int8"): "another"})
    verdict = check_limits(rows, Limits(max_p95_ms=5))
    line = choice_lines(verdict)[0]
    assert line.startswith(
        "Winner: onnx-int8@cpu: p50 1.00 ms, p95 1.00 ms, accuracy 90.00% (+0.00 points), size 20.0 MB"
    )
    assert "[noisy: the host took 20% of the processor] [stale: a newer build has replaced the artifact]" in line
    assert choice_json(verdict)["winner"]["stale"] is True
    json.dumps(choice_json(verdict), allow_nan=False)


def test_the_text_names_winner_others_and_misses():
    lines = choice_lines(check_limits(rows_of(FP32, INT8, timed("onnx-fp32", 4)), Limits(max_p95_ms=5)))
    assert "accuracy 89.00% (-1.00 points, McNemar p 1: may be chance)" in lines[0]
    assert lines[1] == "Also within the limits: onnx-fp32@cpu"
    assert lines[-2:] == ["Nearest misses:", "  torch-fp32@cpu: p95 8.00 ms, limit 5: over by 3 (60.0%)"]


variants = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 20), st.none() | st.integers(1, 90)), min_size=1, max_size=5
)
bounds = st.tuples(*[st.none() | st.integers(0, 60)] * 3)


def judge(made, bound):
    measurements = [
        timed(f"v{i}", ms, range(wrong), size_bytes={} if size is None else {"total": size * 10**6})
        for i, (ms, wrong, size) in enumerate(made)
    ]
    return check_limits(rows_of(FP32, *measurements), Limits(*bound))


@given(variants, bounds, st.integers(0, 2), st.integers(0, 30))
def test_loosening_a_limit_loses_no_row_and_the_winner_is_one_that_passed(made, bound, which, more):
    tight = judge(made, bound)
    looser = list(bound)
    looser[which] = None if bound[which] is None or more == 30 else bound[which] + more
    assert set(cells(tight.passed)) <= set(cells(judge(made, looser).passed))
    assert (tight.winner in tight.passed) if tight.passed else tight.winner is None
    assert not {*cells(tight.passed)} & {*cells(m.row for m in tight.misses)}
    assert len(tight.misses) == min(3, len(made) + 1 - len(tight.passed))
    json.dumps(choice_json(tight), allow_nan=False)


# What got worse


def change(found, figure, cell="onnx-int8@cpu"):
    pair = next(pair for pair in found.pairs if pair.old.measurement.cell == cell)
    return next(change for change in pair.changes if change.figure == figure)


def against(old, new, limit=0.05, **changes):
    return find_regressions(rows_of(*new, created=NEWER, **changes), rows_of(*old), limit)


def wobbly(ms, share=0.01, seed=0, rounds=24):
    rng = random.Random(seed)
    return [ms * (1 + rng.uniform(-share, share)) for _ in range(rounds)]


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), ("5", 0.05), ("0", 0), ("0.05%", 0.0005), ("100 %", 1), ("7.5", 0.075)]
)
def test_a_percentage_is_a_share(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["-1", "-1%", "nan", "inf", "101", "1e9", "", "%", "5%%", "five", "1_0", "٥"])
def test_an_invalid_percentage_is_refused(text):
    with pytest.raises(ValueError, match="not a percentage from 0 to 100"):
        parse_share(text)


def test_a_bare_number_below_one_is_asked_for_its_sign():
    with pytest.raises(ValueError, match=r"may mean 5% or 0.05%; write the % sign"):
        parse_share("0.05")


def test_a_slower_cell_is_a_regression():
    old = [timed("torch-fp32", wobbly(8)), timed("onnx-int8", wobbly(1, seed=1))]
    new = [timed("torch-fp32", wobbly(8, seed=2)), timed("onnx-int8", wobbly(1.2, seed=3))]
    found = against(old, new)
    slower = change(found, "latency_p50_ms")
    assert slower.regressed
    assert slower.low < slower.worse < slower.high
    assert slower.worse == pytest.approx(0.2, abs=0.02)
    assert change(found, "throughput_per_s").regressed
    assert not change(found, "size_bytes").regressed
    with pytest.raises(
        VerdictError, match=r"1 of 2 cells are lost or worse by more than 5%: onnx-int8@cpu \(latency_p50_ms"
    ) as no:
        require_no_regressions(found)
    assert no.value.exit_code == 3
    require_no_regressions(against(old, new, 0.25))
    require_no_regressions(against(new, old))


def test_a_machine_that_is_slower_for_all_rows_is_no_regression():
    old = [timed("torch-fp32", wobbly(8)), timed("onnx-int8", wobbly(1))]
    new = [timed("torch-fp32", wobbly(12)), timed("onnx-int8", wobbly(1.5))]
    found = against(old, new)
    require_no_regressions(found)
    assert change(found, "latency_p50_ms").worse == pytest.approx(0, abs=0.01)
    own = change(found, "latency_p50_ms", "torch-fp32@cpu")
    assert own.worse == pytest.approx(0.5, abs=0.01)
    assert own.remark == "the baseline: not compared"


def test_without_a_common_baseline_times_are_compared_as_they_are():
    found = against([timed("onnx-int8", wobbly(1))], [timed("torch-fp32", 8), timed("onnx-int8", wobbly(1.2, seed=1))])
    slower = change(found, "latency_p50_ms")
    assert slower.regressed
    assert slower.worse == pytest.approx(0.2, abs=0.02)
    assert slower.remark.startswith("no common baseline")
    assert found.not_compared == (("m", "torch-fp32@cpu", "not measured in the old run"),)


def test_a_change_that_may_be_none_is_no_regression_however_large():
    old = [timed("torch-fp32", [8] * 8), timed("onnx-int8", [0.5, 1.5] * 4)]
    new = [timed("torch-fp32", [8] * 8), timed("onnx-int8", [0.6, 1.6] * 4)]
    open_ = change(against(old, new), "latency_p50_ms")
    assert open_.worse > 0.05
    assert open_.low < 0 < open_.high
    assert not open_.regressed
    assert open_.may_be_none


def test_the_interval_of_a_change_is_as_wide_as_those_of_both_runs_together():
    old = rows_of(timed("torch-fp32", wobbly(8, 0.05)), timed("onnx-int8", wobbly(1, 0.05, 1)))
    new = rows_of(timed("torch-fp32", wobbly(8, 0.1, 2)), timed("onnx-int8", wobbly(1, 0.1, 3)), created=NEWER)
    found = change(find_regressions(new, old, 0.05), "latency_p50_ms")
    was, now = old[1].speedup, new[1].speedup
    worse = was.value / now.value
    down = math.hypot(math.log(was.value / was.low), math.log(now.high / now.value))
    up = math.hypot(math.log(was.high / was.value), math.log(now.value / now.low))
    assert found.worse == pytest.approx(worse - 1)
    assert found.low == pytest.approx(worse * math.exp(-down) - 1)
    assert found.high == pytest.approx(worse * math.exp(up) - 1)


def test_too_few_rounds_for_an_interval_leave_the_limit_to_decide():
    found = against([FP32, INT8], [FP32, timed("onnx-int8", 1.06, range(11))])
    slower = change(found, "latency_p50_ms")
    assert slower.regressed
    assert slower.low is None
    assert not change(against([FP32, INT8], [FP32, timed("onnx-int8", 1.05, range(11))]), "latency_p50_ms").regressed


@pytest.mark.parametrize(("figure", "name"), [("memory_bytes", "peak"), ("size_bytes", "total")])
def test_bytes_regress_above_the_limit_alone(figure, name):
    column = {"memory_bytes": "peak_memory_bytes", "size_bytes": "size_bytes"}[figure]
    old = timed("onnx-int8", 1, **{figure: {name: 100}})
    for count, regressed in ((105, False), (106, True), (50, False)):
        found = against([old], [timed("onnx-int8", 1, **{figure: {name: count}})])
        assert change(found, column).regressed is regressed
        assert change(found, column).worse == pytest.approx(count / 100 - 1)
    assert against([timed("onnx-int8", 1, **{figure: {name: 0}})], [old]).regressed_pairs


def test_a_figure_that_is_unknown_now_has_regressed_and_one_that_was_unknown_is_not_compared():
    bare = timed("onnx-int8", 1, memory_bytes={})
    lost = change(against([INT8], [bare]), "peak_memory_bytes")
    assert (lost.regressed, lost.new, lost.worse) == (True, None, None)
    pair = against([bare], [timed("onnx-int8", 1)]).pairs[0]
    assert "peak_memory_bytes" not in [c.figure for c in pair.changes]
    assert not pair.regressed


def test_accuracy_regresses_by_more_wrong_answers_that_are_no_chance():
    found = change(against([timed("onnx-int8", 1, range(10))], [timed("onnx-int8", 1, range(20))]), "accuracy")
    assert found.regressed
    assert found.worse == pytest.approx(1.0)
    assert found.remark == "McNemar p 0.002"
    chance = change(against([timed("onnx-int8", 1, range(10))], [timed("onnx-int8", 1, range(12))]), "accuracy")
    assert not chance.regressed
    assert (chance.may_be_none, chance.remark) == (True, "McNemar p 0.5")
    assert not change(against([INT8], [timed("onnx-int8", 1, range(9))]), "accuracy").regressed
    allowed = against([timed("onnx-int8", 1, range(50))], [timed("onnx-int8", 1, range(56))], 0.2)
    assert not change(allowed, "accuracy").regressed


def test_accuracy_without_answers_is_left_to_the_limit():
    for options in ({"predictions": ()}, {}):
        found = find_regressions(
            rows_of(timed("onnx-int8", 1, range(12), **options), labels=False, created=NEWER),
            rows_of(timed("onnx-int8", 1, range(10), **options), labels=False),
            0.05,
        )
        assert change(found, "accuracy").regressed
        assert change(found, "accuracy").worse == pytest.approx(0.2)


def test_a_first_wrong_answer_counts_as_that_many_times_one():
    found = against([timed("onnx-int8", 1, range(0))], [timed("onnx-int8", 1, range(7))])
    assert change(found, "accuracy").worse == pytest.approx(7)
    assert change(found, "accuracy").regressed


@pytest.mark.parametrize(
    ("new", "lost"),
    [
        ([FP32, dataclasses.replace(FAILED, variant="onnx-int8")], "failed: It crashed."),
        ([FP32, dataclasses.replace(ABSENT, variant="onnx-int8", provider="cpu")], "unavailable: No GPU answers."),
        ([FP32], "missing"),
    ],
)
def test_a_row_that_was_measured_and_is_not_any_more_has_regressed(new, lost):
    found = against([FP32, INT8], new)
    assert [(pair.old.measurement.cell, pair.lost) for pair in found.regressed_pairs] == [("onnx-int8@cpu", lost)]
    with pytest.raises(VerdictError, match=rf"onnx-int8@cpu \({lost.partition(':')[0]}\)"):
        require_no_regressions(found)
    assert f"onnx-int8@cpu was measured before and is now {lost}" in regression_lines(found)


def test_a_row_that_was_not_measured_before_cannot_regress():
    found = against([FP32, FAILED], [FP32, FAILED, ABSENT])
    assert not found.regressed_pairs
    assert not found.not_compared


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"machine": dict(result().machine, id="y")}, "another machine"),
        ({"data": {"name": "d", "rows": 100, "sha256": "1"}}, "other data"),
        ({"run": {**RUN, "threads": 1}}, "another number of threads"),
        ({"run": {"threads": 1, "batch_size": 8}}, "another number of threads, another batch size"),
    ],
)
def test_runs_of_another_machine_data_or_manner_are_not_compared(changes, why):
    with pytest.raises(ResultFileError, match=f"cannot be compared: {why}") as cause:
        against([FP32], [FP32], **changes)
    assert cause.value.hint
    both = rows_of(INT8, created=NEWER) + rows_of(FP32, created=NEWER, **changes)
    found = find_regressions(both, rows_of(FP32, INT8), 0.05)
    assert found.not_compared == (("m", "torch-fp32@cpu", why),)
    assert f"torch-fp32@cpu is not compared: {why}." in regression_lines(found)


def test_another_gpu_is_another_device_for_its_own_rows_alone():
    gpu = timed("torch-fp32", 4, provider="cuda")
    found = against([FP32, gpu], [FP32, gpu], run={**RUN, "device_id": 1})
    assert found.not_compared == (("m", "torch-fp32@cuda", "another GPU"),)


def test_runs_that_share_nothing_are_an_error_in_words():
    for old in ([FP32], [FAILED], []):
        with pytest.raises(ResultFileError, match="no measured cell in common"):
            find_regressions(rows_of(INT8), rows_of(*old) if old else [], 0.05)


def test_the_newest_of_several_rows_is_the_one_compared():
    older = rows_of(FP32, timed("onnx-int8", 5, range(11)), created="2026-01-15T00:00:00+00:00")
    new = rows_of(FP32, INT8, created=NEWER)
    for rows in (older + new, new + older):
        assert not find_regressions(rows, rows_of(FP32, INT8), 0.05).regressed_pairs


@pytest.mark.slow
@given(variants, st.sampled_from([0, 0.01, 0.5]))
def test_a_run_against_itself_has_no_regression(made, limit):
    measurements = [
        timed(f"v{i}", ms, range(wrong), size_bytes={} if size is None else {"total": size})
        for i, (ms, wrong, size) in enumerate(made)
    ]
    rows = rows_of(FP32, *measurements, FAILED)
    found = find_regressions(rows, rows, limit)
    assert len(found.pairs) == len(made) + 1
    require_no_regressions(found)
    json.dumps(regression_json(found), allow_nan=False)


@pytest.mark.slow
def test_two_runs_of_the_same_are_hardly_ever_a_regression():
    """Even without any tolerance, an interval at 95 % is wrong on one side in 2.5 % of the cases."""
    found = []
    for seed in range(0, 160, 4):
        old = [timed("torch-fp32", wobbly(8, 0.1, seed)), timed("onnx-int8", wobbly(1, 0.1, seed + 1))]
        new = [timed("torch-fp32", wobbly(8, 0.1, seed + 2)), timed("onnx-int8", wobbly(1, 0.1, seed + 3))]
        found.append(change(against(old, new, 0.0), "latency_p50_ms").regressed)
    assert sum(found) <= 4


def test_the_text_shows_every_change_and_marks_those_that_regressed():
    slow = timed("onnx-int8", 1.2, range(11), noise={"others_share": 0.3})
    lines = regression_lines(against([FP32, INT8], [FP32, slow]))
    assert lines[0] == "2 cells of the old run, 1 lost or worse by more than 5%:"
    assert lines[1].split("  ")[0] == "cell"
    assert "+20.0%!" in lines[3]
    assert len({len(line) for line in lines[1:4]}) == 1
    detail = next(line for line in lines if line.startswith("onnx-int8@cpu: p50"))
    assert "p50 1.00 → 1.20 ms, latency +20.0%, against torch-fp32@cpu of each run [new run noisy" in detail
    assert "sentences/s 1000.00 → 833.33, time a sentence +20.0%" in "\n".join(lines)


def test_json_has_every_change_as_a_share():
    body = regression_json(against([FP32, INT8], [FP32, timed("onnx-int8", 1.2, memory_bytes={})]))
    assert (body["max_regression"], body["regressed"]) == (0.05, 1)
    by_figure = {change["figure"]: change for change in body["pairs"][1]["changes"]}
    assert by_figure["latency_p50_ms"]["worse"] == pytest.approx(0.2)
    assert by_figure["peak_memory_bytes"]["new"] is None
    json.dumps(body, allow_nan=False)


# The flat table


def read(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_is_read_back_as_it_was_measured():
    rows = rows_of(timed("torch-fp32", wobbly(8)), timed("onnx-int8", wobbly(1), range(11)), FAILED)
    base, int8, failed = read(to_csv(rows))
    assert list(base) == list(COLUMNS)
    assert float(int8["latency_p50_ms"]) == rows[1].measurement.latency_ms["p50"]
    assert float(int8["speedup_low"]) == pytest.approx(rows[1].speedup.low)
    assert float(int8["accuracy"]) == 0.89
    assert float(int8["accuracy_points"]) == pytest.approx(-1)
    assert (int8["lost"], int8["won"], int8["mcnemar_p"]) == ("1", "0", "1")
    assert (int8["size_bytes"], int8["gzip_bytes"], int8["stale"]) == ("20000000", "", "false")
    assert base["pareto"] in ("true", "false")
    assert (failed["status"], failed["reason"], failed["accuracy"], failed["speedup"]) == (
        "failed",
        "It crashed.",
        "",
        "",
    )


def test_csv_keeps_line_breaks_quotes_and_commas():
    reason = 'It said "no",\nand stopped.'
    text = to_csv(rows_of(dataclasses.replace(FAILED, reason=reason)))
    assert read(text)[0]["reason"] == reason
    assert text.count("\r\n") == 2


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_becomes_a_formula(start):
    text = f"{start}HYPERLINK(1)"
    found = read(to_csv(rows_of(dataclasses.replace(FAILED, reason=text, model=text))))[0]
    assert found["reason"] == found["model"] == f"'{text}"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00")))
def test_any_text_survives_csv(text):
    found = read(to_csv(rows_of(dataclasses.replace(FAILED, reason=text))))[0]["reason"]
    assert found in (text, f"'{text}")
    assert not found.startswith(("=", "+", "-", "@"))
