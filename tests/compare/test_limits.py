"""Tests of limits for benchmark rows, of regressions between two runs, and of CSV output."""

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
from toolchain.results.measurements import Measurement, Samples
from toolchain.results.scores import Accuracy

RUN = {"threads": 2, "batch_size": 32}
LABELS = [1] * 100
NEWER = "2026-02-01T00:00:00+00:00"


def answers_with_errors(wrong_rows):
    return tuple(0 if index in wrong_rows else 1 for index in range(100))


def timed_row(variant, ms, wrong_rows=range(10), provider="cpu", **changes):
    """Returns the measurement of a cell with the given median time of each round, in milliseconds.

    In this measurement, a sentence takes the same time alone and in a batch.
    """
    medians = [ms] if isinstance(ms, int | float) else ms
    latency = Samples.from_single([[round(value * 1000)] for value in medians])
    batches = Samples.from_rounds([[round(value * 32000)] for value in medians], [[32]] * len(medians))
    figures = {
        "variant": variant,
        "provider": provider,
        "artifact_id": f"id of {variant}",
        "score": Accuracy(100 - len(wrong_rows), 100, 1),
        "predictions": answers_with_errors(wrong_rows),
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


def sized_row(variant, ms, megabytes, **changes):
    return timed_row(variant, ms, size_bytes={"total": round(megabytes * 1e6)}, **changes)


def cells(rows):
    return [r.measurement.cell for r in rows]


FP32 = timed_row("torch-fp32", 8)
INT8 = timed_row("onnx-int8", 1, range(11))
FAILED = Measurement("m", "onnx-int4", "cpu", None, "failed", "It crashed.", "Look.")
ABSENT = Measurement("m", "onnx-fp32", "cuda", None, "unavailable", "No GPU answers.", "Get one.")
PUBLISHED = Measurement("m", "torch-fp16", "cpu", None, "reported", score=Accuracy(99, 100, 1))


# Limits


def test_the_fastest_row_within_the_limits_wins():
    rows = rows_of(FP32, INT8, sized_row("onnx-fp32", 3, 25), sized_row("torch-int8", 2, 40))
    verdict = check_limits(rows, Limits(max_drop=0.5, max_p95_ms=5, max_size_mb=30))
    assert verdict.winner.measurement.cell == "onnx-fp32@cpu"
    assert cells(verdict.passed) == ["onnx-fp32@cpu"]
    require_winner(verdict)


def test_the_baseline_can_win():
    verdict = check_limits(rows_of(FP32, INT8), Limits(max_drop=0))
    assert verdict.winner.measurement is FP32


def test_a_figure_equal_to_its_limit_passes():
    limits = Limits(max_drop=1.0, max_p95_ms=1.0, max_size_mb=20, max_memory_mb=100)
    assert check_limits(rows_of(FP32, INT8), limits).winner.measurement is INT8


@pytest.mark.parametrize(
    ("limits", "message"),
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
def test_a_miss_states_the_figure_the_limit_and_the_excess(limits, message):
    rows = [r for r in rows_of(FP32, INT8) if r.measurement is INT8]
    verdict = check_limits(rows, limits)
    assert verdict.winner is None
    assert [str(violation) for violation in verdict.misses[0].broken] == [message]


@pytest.mark.parametrize(
    ("changes", "limits", "message"),
    [
        ({"size_bytes": {}}, Limits(max_size_mb=1e9), "size unknown, limit 1e+09 MB"),
        ({"memory_bytes": {}}, Limits(max_memory_mb=1e9), "peak memory unknown, limit 1e+09 MB"),
        ({"latency_ms": {}}, Limits(max_p95_ms=1e9), "p95 unknown, limit 1e+09 ms"),
        ({}, Limits(max_drop=100), "accuracy drop unknown, limit 100 points; the run has no baseline"),
    ],
)
def test_an_unknown_figure_does_not_pass(changes, limits, message):
    verdict = check_limits(rows_of(timed_row("onnx-int8", 1, **changes)), limits)
    assert not verdict.passed
    assert str(verdict.misses[0].broken[0]) == message


def test_a_row_without_an_accuracy_fails_the_limit_with_a_reason():
    rows = rows_of(FP32, timed_row("onnx-int8", 1, score=None, predictions=()))
    miss = check_limits(rows, Limits(max_drop=100)).misses[0]
    assert "the row or its baseline has no score" in str(miss.broken[0])


def test_an_unknown_figure_without_a_limit_passes():
    assert check_limits(rows_of(timed_row("onnx-int8", 1, memory_bytes={})), Limits(max_p95_ms=5)).winner


def test_ties_are_decided_by_size_then_accuracy_then_name():
    small_row, large_row = sized_row("onnx-b", 1, 10), sized_row("onnx-a", 1, 20)
    assert check_limits(rows_of(large_row, small_row), Limits(max_p95_ms=5)).winner.measurement is small_row
    better_row, worse_row = timed_row("onnx-b", 1, range(5)), timed_row("onnx-a", 1)
    assert check_limits(rows_of(worse_row, better_row), Limits(max_p95_ms=5)).winner.measurement is better_row
    last_row, first_row = timed_row("onnx-b", 1), timed_row("onnx-a", 1)
    assert check_limits(rows_of(last_row, first_row), Limits(max_p95_ms=5)).winner.measurement is first_row


def test_the_nearest_misses_exceed_the_fewest_limits_by_the_least():
    double_miss = sized_row("f", 5.01, 30.1)
    rows = rows_of(
        sized_row("a", 9, 90),
        sized_row("b", 9, 10),
        sized_row("c", 6, 10),
        sized_row("d", 4, 33),
        sized_row("e", 5, 31),
        double_miss,
    )
    verdict = check_limits(rows, Limits(max_p95_ms=5, max_size_mb=30))
    assert cells(miss.row for miss in verdict.misses) == ["e@cpu", "d@cpu", "c@cpu"]
    assert len(verdict.misses[0].broken) == 1


def test_an_unknown_figure_is_a_greater_miss_than_any_known_one():
    rows = rows_of(sized_row("a", 9, 99), timed_row("b", 1, size_bytes={}))
    assert cells(m.row for m in check_limits(rows, Limits(max_size_mb=1)).misses) == ["a@cpu", "b@cpu"]


def test_only_measured_rows_are_judged():
    rows = rows_of(FP32, FAILED, ABSENT) + rows_of(PUBLISHED)
    verdict = check_limits(rows, Limits(max_p95_ms=1))
    assert cells(miss.row for miss in verdict.misses) == ["torch-fp32@cpu"]


def test_the_pareto_front_includes_rows_outside_the_limits():
    rows = rows_of(FP32, INT8, timed_row("onnx-slow", 9, range(20)))
    verdict = check_limits(rows, Limits(max_drop=0))
    assert cells(verdict.front) == ["onnx-int8@cpu", "torch-fp32@cpu"]
    assert (
        "Pareto front of accuracy, p50 and size: onnx-int8@cpu, torch-fp32@cpu; outside the limits: onnx-int8@cpu"
        in (choice_lines(verdict))
    )


def test_limits_refuse_rows_of_several_machines():
    other_machine = dict(result().machine, id="y")
    with pytest.raises(ResultFileError, match="of one machine and one data set"):
        check_limits(rows_of(FP32) + rows_of(FP32, machine=other_machine), Limits(max_p95_ms=9))


def test_no_row_within_the_limits_gives_the_verdict_no():
    verdict = check_limits(rows_of(FP32, INT8), Limits(max_p95_ms=0.5))
    with pytest.raises(
        VerdictError, match=r"No row is within the limits. The nearest row is onnx-int8@cpu: p95 1.00 ms"
    ) as error:
        require_winner(verdict)
    assert error.value.exit_code == 3
    assert error.value.hint
    assert choice_lines(verdict)[0] == "Winner: none; no row is within the limits."
    assert choice_json(verdict)["winner"] is None
    with pytest.raises(VerdictError, match="There is no measured row to check"):
        require_winner(check_limits(rows_of(FAILED), Limits()))


def test_without_stored_answers_the_interval_decides_what_may_be_chance():
    rows = rows_of(FP32, timed_row("onnx-int8", 1, range(12), predictions=()))
    violation = check_limits(rows, Limits(max_drop=1)).misses[0].broken[0]
    assert violation.remark.startswith("the interval 80.")
    assert violation.remark.endswith("includes the baseline's accuracy, so the difference may be chance")
    certain_rows = rows_of(FP32, timed_row("onnx-int8", 1, range(60)))
    assert "McNemar p 1.8e-15" in check_limits(certain_rows, Limits(max_drop=1)).misses[0].broken[0].remark
    assert "chance" not in check_limits(certain_rows, Limits(max_drop=1)).misses[0].broken[0].remark
    distant_rows = rows_of(FP32, timed_row("onnx-int8", 1, range(60), predictions=()))
    assert check_limits(distant_rows, Limits(max_drop=1)).misses[0].broken[0].remark == ""


def test_a_noisy_or_stale_winner_is_marked():
    noisy_row = timed_row("onnx-int8", 1, noise={"steal_share": 0.2})
    rows = compare([result(FP32, noisy_row, run=RUN)], None, {("m", "onnx-int8"): "another"})
    verdict = check_limits(rows, Limits(max_p95_ms=5))
    line = choice_lines(verdict)[0]
    assert line.startswith(
        "Winner: onnx-int8@cpu: p50 1.00 ms, p95 1.00 ms, accuracy 90.00% (+0.00 points), size 20.0 MB"
    )
    assert (
        "[noisy: the host took 20% of the processor time of the virtual machine] "
        "[stale: a newer build has replaced the artifact]"
    ) in line
    assert choice_json(verdict)["winner"]["stale"] is True
    json.dumps(choice_json(verdict), allow_nan=False)


def test_the_text_names_the_winner_the_other_rows_and_the_misses():
    lines = choice_lines(check_limits(rows_of(FP32, INT8, timed_row("onnx-fp32", 4)), Limits(max_p95_ms=5)))
    assert "accuracy 89.00% (-1.00 points, McNemar p 1: may be chance)" in lines[0]
    assert lines[1] == "Also within the limits: onnx-fp32@cpu"
    assert lines[-2:] == ["Nearest misses:", "  torch-fp32@cpu: p95 8.00 ms, limit 5: over by 3 (60.0%)"]


variants = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 20), st.none() | st.integers(1, 90)), min_size=1, max_size=5
)
limit_values = st.tuples(*[st.none() | st.integers(0, 60)] * 3)


def choose_from(figures, limits):
    measurements = [
        timed_row(f"v{i}", ms, range(wrong_count), size_bytes={} if size is None else {"total": size * 10**6})
        for i, (ms, wrong_count, size) in enumerate(figures)
    ]
    return check_limits(rows_of(FP32, *measurements), Limits(*limits))


@given(variants, limit_values, st.integers(0, 2), st.integers(0, 30))
def test_a_looser_limit_keeps_every_passed_row_and_the_winner_passes(figures, tight_limits, index, increase):
    verdict = choose_from(figures, tight_limits)
    loose_limits = list(tight_limits)
    loose_limits[index] = None if tight_limits[index] is None or increase == 30 else tight_limits[index] + increase
    assert set(cells(verdict.passed)) <= set(cells(choose_from(figures, loose_limits).passed))
    assert (verdict.winner in verdict.passed) if verdict.passed else verdict.winner is None
    assert not {*cells(verdict.passed)} & {*cells(m.row for m in verdict.misses)}
    assert len(verdict.misses) == min(3, len(figures) + 1 - len(verdict.passed))
    json.dumps(choice_json(verdict), allow_nan=False)


# Regressions


def change_of(comparison, figure, cell="onnx-int8@cpu"):
    pair = next(pair for pair in comparison.pairs if pair.old.measurement.cell == cell)
    return next(change for change in pair.changes if change.figure == figure)


def compare_with(old_rows, new_rows, limit=0.05, **changes):
    return find_regressions(rows_of(*new_rows, created=NEWER, **changes), rows_of(*old_rows), limit)


def noisy_times(ms, share=0.01, seed=0, rounds=24):
    rng = random.Random(seed)
    return [ms * (1 + rng.uniform(-share, share)) for _ in range(rounds)]


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), ("5", 0.05), ("0", 0), ("0.05%", 0.0005), ("100 %", 1), ("7.5", 0.075)]
)
def test_parse_share_reads_a_percentage(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["-1", "-1%", "nan", "inf", "101", "1e9", "", "%", "5%%", "five", "1_0", "٥"])
def test_parse_share_refuses_other_texts(text):
    with pytest.raises(ValueError, match="not a percentage from 0 to 100"):
        parse_share(text)


def test_parse_share_refuses_a_number_below_one_without_a_percent_sign():
    with pytest.raises(ValueError, match=r"may mean 5% or 0.05%; write the % sign"):
        parse_share("0.05")


def test_a_slower_cell_is_a_regression():
    old = [timed_row("torch-fp32", noisy_times(8)), timed_row("onnx-int8", noisy_times(1, seed=1))]
    new = [timed_row("torch-fp32", noisy_times(8, seed=2)), timed_row("onnx-int8", noisy_times(1.2, seed=3))]
    comparison = compare_with(old, new)
    latency_change = change_of(comparison, "latency_p50_ms")
    assert latency_change.regressed
    assert latency_change.low < latency_change.worse < latency_change.high
    assert latency_change.worse == pytest.approx(0.2, abs=0.02)
    assert change_of(comparison, "throughput_per_s").regressed
    assert not change_of(comparison, "size_bytes").regressed
    with pytest.raises(
        VerdictError,
        match=r"1 of 2 cells are no longer measured or are worse by more than 5%: onnx-int8@cpu \(latency_p50_ms",
    ) as error:
        require_no_regressions(comparison)
    assert error.value.exit_code == 3
    require_no_regressions(compare_with(old, new, 0.25))
    require_no_regressions(compare_with(new, old))


def test_the_same_slowdown_of_all_rows_is_no_regression():
    old = [timed_row("torch-fp32", noisy_times(8)), timed_row("onnx-int8", noisy_times(1))]
    new = [timed_row("torch-fp32", noisy_times(12)), timed_row("onnx-int8", noisy_times(1.5))]
    comparison = compare_with(old, new)
    require_no_regressions(comparison)
    assert change_of(comparison, "latency_p50_ms").worse == pytest.approx(0, abs=0.01)
    baseline_change = change_of(comparison, "latency_p50_ms", "torch-fp32@cpu")
    assert baseline_change.worse == pytest.approx(0.5, abs=0.01)
    assert baseline_change.remark == "the baseline: not compared"


def test_without_a_common_baseline_absolute_times_are_compared():
    comparison = compare_with(
        [timed_row("onnx-int8", noisy_times(1))],
        [timed_row("torch-fp32", 8), timed_row("onnx-int8", noisy_times(1.2, seed=1))],
    )
    latency_change = change_of(comparison, "latency_p50_ms")
    assert latency_change.regressed
    assert latency_change.worse == pytest.approx(0.2, abs=0.02)
    assert latency_change.remark.startswith("no common baseline")
    assert comparison.not_compared == (("m", "torch-fp32@cpu", "not measured in the old run"),)


def test_a_large_change_whose_interval_includes_zero_is_no_regression():
    old = [timed_row("torch-fp32", [8] * 8), timed_row("onnx-int8", [0.5, 1.5] * 4)]
    new = [timed_row("torch-fp32", [8] * 8), timed_row("onnx-int8", [0.6, 1.6] * 4)]
    uncertain_change = change_of(compare_with(old, new), "latency_p50_ms")
    assert uncertain_change.worse > 0.05
    assert uncertain_change.low < 0 < uncertain_change.high
    assert not uncertain_change.regressed
    assert uncertain_change.may_be_none


def test_the_interval_of_a_change_combines_the_intervals_of_both_runs():
    old = rows_of(timed_row("torch-fp32", noisy_times(8, 0.05)), timed_row("onnx-int8", noisy_times(1, 0.05, 1)))
    new = rows_of(
        timed_row("torch-fp32", noisy_times(8, 0.1, 2)), timed_row("onnx-int8", noisy_times(1, 0.1, 3)), created=NEWER
    )
    latency_change = change_of(find_regressions(new, old, 0.05), "latency_p50_ms")
    old_speedup, new_speedup = old[1].speedup, new[1].speedup
    ratio = old_speedup.value / new_speedup.value
    lower_width = math.hypot(
        math.log(old_speedup.value / old_speedup.low), math.log(new_speedup.high / new_speedup.value)
    )
    upper_width = math.hypot(
        math.log(old_speedup.high / old_speedup.value), math.log(new_speedup.value / new_speedup.low)
    )
    assert latency_change.worse == pytest.approx(ratio - 1)
    assert latency_change.low == pytest.approx(ratio * math.exp(-lower_width) - 1)
    assert latency_change.high == pytest.approx(ratio * math.exp(upper_width) - 1)


def test_without_an_interval_the_limit_alone_decides():
    comparison = compare_with([FP32, INT8], [FP32, timed_row("onnx-int8", 1.06, range(11))])
    latency_change = change_of(comparison, "latency_p50_ms")
    assert latency_change.regressed
    assert latency_change.low is None
    assert not change_of(
        compare_with([FP32, INT8], [FP32, timed_row("onnx-int8", 1.05, range(11))]), "latency_p50_ms"
    ).regressed


@pytest.mark.parametrize(("figure", "name"), [("memory_bytes", "peak"), ("size_bytes", "total")])
def test_bytes_regress_only_above_the_limit(figure, name):
    column = {"memory_bytes": "peak_memory_bytes", "size_bytes": "size_bytes"}[figure]
    old = timed_row("onnx-int8", 1, **{figure: {name: 100}})
    for count, regressed in ((105, False), (106, True), (50, False)):
        comparison = compare_with([old], [timed_row("onnx-int8", 1, **{figure: {name: count}})])
        assert change_of(comparison, column).regressed is regressed
        assert change_of(comparison, column).worse == pytest.approx(count / 100 - 1)
    assert compare_with([timed_row("onnx-int8", 1, **{figure: {name: 0}})], [old]).regressed_pairs


def test_a_figure_missing_in_the_new_run_regresses_and_one_missing_in_the_old_run_is_not_compared():
    row_without_memory = timed_row("onnx-int8", 1, memory_bytes={})
    memory_change = change_of(compare_with([INT8], [row_without_memory]), "peak_memory_bytes")
    assert (memory_change.regressed, memory_change.new, memory_change.worse) == (True, None, None)
    pair = compare_with([row_without_memory], [timed_row("onnx-int8", 1)]).pairs[0]
    assert "peak_memory_bytes" not in [c.figure for c in pair.changes]
    assert not pair.regressed


def test_accuracy_regresses_only_by_a_significant_change_above_the_limit():
    significant_change = change_of(
        compare_with([timed_row("onnx-int8", 1, range(10))], [timed_row("onnx-int8", 1, range(20))]), "accuracy"
    )
    assert significant_change.regressed
    assert significant_change.worse == pytest.approx(1.0)
    assert significant_change.remark == "McNemar p 0.002"
    small_change = change_of(
        compare_with([timed_row("onnx-int8", 1, range(10))], [timed_row("onnx-int8", 1, range(12))]), "accuracy"
    )
    assert not small_change.regressed
    assert (small_change.may_be_none, small_change.remark) == (True, "McNemar p 0.5")
    assert not change_of(compare_with([INT8], [timed_row("onnx-int8", 1, range(9))]), "accuracy").regressed
    tolerant_comparison = compare_with(
        [timed_row("onnx-int8", 1, range(50))], [timed_row("onnx-int8", 1, range(56))], 0.2
    )
    assert not change_of(tolerant_comparison, "accuracy").regressed


def test_accuracy_without_stored_answers_regresses_above_the_limit():
    for options in ({"predictions": ()}, {}):
        comparison = find_regressions(
            rows_of(timed_row("onnx-int8", 1, range(12), **options), labels=False, created=NEWER),
            rows_of(timed_row("onnx-int8", 1, range(10), **options), labels=False),
            0.05,
        )
        assert change_of(comparison, "accuracy").regressed
        assert change_of(comparison, "accuracy").worse == pytest.approx(0.2)


def test_seven_wrong_answers_after_none_count_as_seven_times_one():
    comparison = compare_with([timed_row("onnx-int8", 1, range(0))], [timed_row("onnx-int8", 1, range(7))])
    assert change_of(comparison, "accuracy").worse == pytest.approx(7)
    assert change_of(comparison, "accuracy").regressed


@pytest.mark.parametrize(
    ("new", "state"),
    [
        ([FP32, dataclasses.replace(FAILED, variant="onnx-int8")], "failed: It crashed."),
        ([FP32, dataclasses.replace(ABSENT, variant="onnx-int8", provider="cpu")], "unavailable: No GPU answers."),
        ([FP32], "missing"),
    ],
)
def test_a_lost_row_is_a_regression(new, state):
    comparison = compare_with([FP32, INT8], new)
    assert [(pair.old.measurement.cell, pair.lost) for pair in comparison.regressed_pairs] == [("onnx-int8@cpu", state)]
    with pytest.raises(VerdictError, match=rf"onnx-int8@cpu \({state.partition(':')[0]}\)"):
        require_no_regressions(comparison)
    assert f"onnx-int8@cpu was measured in the old run and is now {state}" in regression_lines(comparison)


def test_a_row_without_an_old_measurement_cannot_regress():
    comparison = compare_with([FP32, FAILED], [FP32, FAILED, ABSENT])
    assert not comparison.regressed_pairs
    assert not comparison.not_compared


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"machine": dict(result().machine, id="y")}, "another machine"),
        ({"data": {"name": "d", "rows": 100, "sha256": "1"}}, "other data"),
        ({"run": {**RUN, "threads": 1}}, "another number of threads"),
        ({"run": {"threads": 1, "batch_size": 8}}, "another number of threads, another batch size"),
    ],
)
def test_runs_with_another_machine_data_or_settings_are_not_compared(changes, reason):
    with pytest.raises(ResultFileError, match=f"cannot be compared: {reason}") as cause:
        compare_with([FP32], [FP32], **changes)
    assert cause.value.hint
    new_rows = rows_of(INT8, created=NEWER) + rows_of(FP32, created=NEWER, **changes)
    comparison = find_regressions(new_rows, rows_of(FP32, INT8), 0.05)
    assert comparison.not_compared == (("m", "torch-fp32@cpu", reason),)
    assert f"torch-fp32@cpu is not compared: {reason}." in regression_lines(comparison)


def test_another_gpu_makes_only_gpu_rows_incomparable():
    gpu_row = timed_row("torch-fp32", 4, provider="cuda")
    comparison = compare_with([FP32, gpu_row], [FP32, gpu_row], run={**RUN, "device_id": 1})
    assert comparison.not_compared == (("m", "torch-fp32@cuda", "another GPU"),)


def test_runs_without_a_common_cell_give_an_error():
    for old in ([FP32], [FAILED], []):
        with pytest.raises(ResultFileError, match="no measured cell in common"):
            find_regressions(rows_of(INT8), rows_of(*old) if old else [], 0.05)


def test_regressions_compares_the_newest_of_several_rows():
    older_rows = rows_of(FP32, timed_row("onnx-int8", 5, range(11)), created="2026-01-15T00:00:00+00:00")
    new_rows = rows_of(FP32, INT8, created=NEWER)
    for rows in (older_rows + new_rows, new_rows + older_rows):
        assert not find_regressions(rows, rows_of(FP32, INT8), 0.05).regressed_pairs


@pytest.mark.slow
@given(variants, st.sampled_from([0, 0.01, 0.5]))
def test_a_run_compared_with_itself_has_no_regression(figures, limit):
    measurements = [
        timed_row(f"v{i}", ms, range(wrong_count), size_bytes={} if size is None else {"total": size})
        for i, (ms, wrong_count, size) in enumerate(figures)
    ]
    rows = rows_of(FP32, *measurements, FAILED)
    comparison = find_regressions(rows, rows, limit)
    assert len(comparison.pairs) == len(figures) + 1
    require_no_regressions(comparison)
    json.dumps(regression_json(comparison), allow_nan=False)


@pytest.mark.slow
def test_two_runs_of_the_same_variants_rarely_show_a_regression():
    """At zero tolerance, a 95 % interval shows a regression by chance in 2.5 % of the comparisons."""
    regressed_flags = []
    for seed in range(0, 160, 4):
        old = [
            timed_row("torch-fp32", noisy_times(8, 0.1, seed)),
            timed_row("onnx-int8", noisy_times(1, 0.1, seed + 1)),
        ]
        new = [
            timed_row("torch-fp32", noisy_times(8, 0.1, seed + 2)),
            timed_row("onnx-int8", noisy_times(1, 0.1, seed + 3)),
        ]
        regressed_flags.append(change_of(compare_with(old, new, 0.0), "latency_p50_ms").regressed)
    assert sum(regressed_flags) <= 4


def test_the_text_shows_every_change_and_marks_regressions():
    slow_row = timed_row("onnx-int8", 1.2, range(11), noise={"others_share": 0.3})
    lines = regression_lines(compare_with([FP32, INT8], [FP32, slow_row]))
    assert lines[0] == (
        "Compared cells of the old run: 2. Regressed cells: 1. "
        "A regressed cell is no longer measured, or a figure of the cell is worse by more than 5%."
    )
    assert lines[1].split("  ")[0] == "cell"
    assert "+20.0%!" in lines[3]
    assert len({len(line) for line in lines[1:4]}) == 1
    detail = next(line for line in lines if line.startswith("onnx-int8@cpu: p50"))
    assert "p50 1.00 → 1.20 ms, latency +20.0%, relative to torch-fp32@cpu of each run [the new run is noisy" in detail
    assert "sentences/s 1000.00 → 833.33, time a sentence +20.0%" in "\n".join(lines)


def test_json_has_each_change_as_a_fraction():
    body = regression_json(compare_with([FP32, INT8], [FP32, timed_row("onnx-int8", 1.2, memory_bytes={})]))
    assert (body["max_regression"], body["regressed"]) == (0.05, 1)
    by_figure = {change["figure"]: change for change in body["pairs"][1]["changes"]}
    assert by_figure["latency_p50_ms"]["worse"] == pytest.approx(0.2)
    assert by_figure["peak_memory_bytes"]["new"] is None
    json.dumps(body, allow_nan=False)


# CSV


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_keeps_the_measured_figures():
    rows = rows_of(timed_row("torch-fp32", noisy_times(8)), timed_row("onnx-int8", noisy_times(1), range(11)), FAILED)
    base_row, int8_row, failed_row = read_csv(to_csv(rows))
    assert list(base_row) == list(COLUMNS)
    assert float(int8_row["latency_p50_ms"]) == rows[1].measurement.latency_ms["p50"]
    assert float(int8_row["speedup_low"]) == pytest.approx(rows[1].speedup.low)
    assert float(int8_row["accuracy"]) == 0.89
    assert float(int8_row["accuracy_points"]) == pytest.approx(-1)
    assert (int8_row["lost"], int8_row["won"], int8_row["mcnemar_p"]) == ("1", "0", "1")
    assert (int8_row["size_bytes"], int8_row["gzip_bytes"], int8_row["stale"]) == ("20000000", "", "false")
    assert base_row["pareto"] in ("true", "false")
    assert (failed_row["status"], failed_row["reason"], failed_row["accuracy"], failed_row["speedup"]) == (
        "failed",
        "It crashed.",
        "",
        "",
    )


def test_csv_keeps_line_breaks_quotes_and_commas():
    reason = 'It said "no",\nand stopped.'
    text = to_csv(rows_of(dataclasses.replace(FAILED, reason=reason)))
    assert read_csv(text)[0]["reason"] == reason
    assert text.count("\r\n") == 2


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_contains_no_formula(start):
    text = f"{start}HYPERLINK(1)"
    row = read_csv(to_csv(rows_of(dataclasses.replace(FAILED, reason=text, model=text))))[0]
    assert row["reason"] == row["model"] == f"'{text}"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00")))
def test_csv_keeps_any_text(text):
    reason = read_csv(to_csv(rows_of(dataclasses.replace(FAILED, reason=text))))[0]["reason"]
    assert reason in (text, f"'{text}")
    assert not reason.startswith(("=", "+", "-", "@"))
