"""Tests of intervals, significance tests and quality figures."""

import math
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_results import FP32, INT8, RUN, measured_row, result, row_of_cell

from toolchain.bench.noise import Noise
from toolchain.compare.report.notes import notes
from toolchain.compare.rows import arrange, compare
from toolchain.errors import ResultFileError
from toolchain.results import statistics
from toolchain.results.measurements import Samples
from toolchain.results.statistics import ratio

POSITIVE = st.floats(1e-3, 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [8, 24])
def test_three_to_seven_per_cent_of_equal_pairs_are_called_different(rounds):
    rng = np.random.default_rng(20)
    different_count = 0
    for _ in range(1000):
        drift = rng.normal(0, 0.05, rounds)  # The machine's speed drifts between rounds, equally for both variants.
        first, second = (np.exp(drift + rng.normal(0, 0.02, rounds)) for _ in range(2))
        different_count += bool(ratio(list(first), list(second)).differs)
    assert 30 <= different_count <= 70


def test_the_interval_of_a_mean_contains_the_mean_and_needs_six_rounds():
    values = [10.0, 11, 9, 10.5, 9.5, 10]
    low, high = statistics.mean_interval(values)
    assert 9 < low < 10 < high < 11
    assert statistics.mean_interval([each + 5 for each in values]) == pytest.approx((low + 5, high + 5))
    assert statistics.mean_interval(values[:5]) is None


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=30))
def test_a_ratio_is_within_its_interval_and_inverts_when_its_sides_swap(pairs):
    first, second = zip(*pairs, strict=True)
    forward, inverse = ratio(first, second), ratio(second, first)
    assert forward.value == pytest.approx(1 / inverse.value)
    if len(pairs) < statistics.FEWEST_ROUNDS:
        assert forward.differs is None
    else:
        assert forward.low <= forward.value * (1 + 1e-9)
        assert forward.high >= forward.value * (1 - 1e-9)


def test_the_same_times_give_no_difference():
    times = [1.0, 2.0, 3.0, 1.5, 2.5, 3.5]
    assert ratio(times, times) == statistics.Ratio(1.0, 1.0, 1.0)
    assert ratio(times, times).differs is False


@pytest.mark.slow
def test_the_interval_of_a_median_usually_contains_it():
    rng, covered_count = np.random.default_rng(1), 0
    for _ in range(100):
        rounds = [[max(1, round(v)) for v in rng.lognormal(7, 0.3, 60)] for _ in range(8)]
        low, high = statistics.median_interval(Samples.from_single(rounds))
        covered_count += low <= math.exp(7) / 1000 <= high
    assert covered_count >= 88
    assert statistics.median_interval(Samples.from_single([[1], [2]])) is None


def test_wilson_and_mcnemar_give_published_values():
    low, high = statistics.wilson(81, 263)  # The expected interval is from Newcombe 1998, table I.
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert statistics.mcnemar(0, 0) == 1
    # The expected p-value is the probability of at most 5 or at least 15 heads in 20 coin flips.
    assert statistics.mcnemar(5, 15) == pytest.approx(0.0414, abs=1e-4)


def test_macro_f1_gives_every_label_the_same_weight():
    assert statistics.macro_f1(statistics.count_by_label([0, 0, 0, 1], [0, 0, 0, 1], False)) == 1
    assert statistics.macro_f1(statistics.count_by_label([0, 0, 0, 0], [0, 0, 0, 1], False)) == pytest.approx(
        (6 / 7 + 0) / 2
    )


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    assert statistics.calibration_error([[1.0, 0.0]] * 4, [0, 0, 0, 0], False) == 0
    assert statistics.calibration_error([[0.2, 0.8]] * 4, [0, 0, 0, 1], False) == pytest.approx(0.55)


LABELS = [0, 1] * 50


def row_with_errors(variant, wrong_rows, shift=0):
    """Returns a result row whose predicted labels are wrong only for the sentences with the indices `wrong_rows`.

    The confidence of every answer is (9000 - `shift`) / 100 per cent.
    """
    answers = tuple(1 - y if i in wrong_rows else y for i, y in enumerate(LABELS))
    confidence = 9000 - shift
    probabilities = tuple(
        (10_000 - confidence, confidence) if a else (confidence, 10_000 - confidence) for a in answers
    )
    figures = {"predictions": answers, "probabilities": probabilities, "batch_changed": 3}
    return measured_row(variant, 5, correct=100 - len(wrong_rows), **figures)


def test_a_row_has_quality_figures_from_its_answers():
    base_row, int8_row = (
        row_with_errors("torch-fp32", {1, 2, 3}),
        row_with_errors("onnx-int8", {3, 4, 5, 6, 7, 8, 9}, shift=500),
    )
    data = {"name": "d", "rows": 100, "sha256": "0", "labels": LABELS}
    row = row_of_cell(compare([result(base_row, int8_row, run=RUN, data=data)]), "onnx-int8@cpu")
    assert (row.quality.lost, row.quality.won, row.quality.batch_changed) == (6, 2, 3)
    assert (row.changed_sentences("lost"), row.changed_sentences("won")) == ([4, 5, 6, 7, 8, 9], [1, 2])
    assert row.quality.p == pytest.approx(0.2891, abs=1e-4)
    assert row.quality.largest_shift == pytest.approx(0.75)
    assert row.quality.mean_shift == pytest.approx((8 * 0.75 + 92 * 0.05) / 100)
    assert row.quality.low < 0.93 < row.quality.high
    assert row.quality.macro_f1 == pytest.approx(0.93, abs=1e-3)
    assert row.quality.calibration_error == pytest.approx(0.08)
    assert row.to_json()["quality"]["lost"] == 6


def test_without_labels_a_row_has_only_the_interval_of_its_accuracy():
    row = compare([result(FP32, run=RUN)])[0]
    assert row.quality.low < 0.9 < row.quality.high
    assert row.quality.lost is row.quality.macro_f1 is None


def test_the_pareto_front_has_the_rows_that_no_other_beats():
    worse_row = measured_row("onnx-fp32", 9, correct=90)
    rows = compare([result(FP32, INT8, worse_row, run=RUN)])
    assert {row.measurement.variant for row in rows if row.pareto} == {"torch-fp32", "onnx-int8"}


def test_arrange_filters_and_sorts_rows_and_marks_the_front_again():
    rows = compare([result(FP32, INT8, measured_row("onnx-fp32", 9), run=RUN)])
    assert [r.measurement.variant for r in arrange(rows, "latency", ())] == ["onnx-int8", "torch-fp32", "onnx-fp32"]
    assert [r.measurement.variant for r in arrange(rows, "accuracy", ("onnx-*",))] == ["onnx-fp32", "onnx-int8"]
    assert [r.pareto for r in arrange(rows, None, ("onnx-fp32@cpu",), "cpu")] == [True]
    with pytest.raises(
        ResultFileError, match=r"No row matches bnb-\*, \*@cuda. The cells are: torch-fp32@cpu, onnx-int8"
    ):
        arrange(rows, None, ("bnb-*",), "cuda")


def test_a_noisy_row_states_its_cause():
    disturbed_row = measured_row("onnx-int8", 5, noise={"steal_share": 0.05, "others_share": 0.2, "load_1m": 3.0})
    row = row_of_cell(compare([result(FP32, disturbed_row, run=RUN)]), "onnx-int8@cpu")
    assert row.noisy == (
        "the host took 5% of the processor time of the virtual machine, other processes used 20% of the processor time"
    )
    wide_samples = Samples.from_single([[1000], [1000], [1000], [9000], [9000], [9000], [5000]])
    row = compare(
        [result(measured_row("torch-fp32", 5, latency=wide_samples, latency_ms=wide_samples.milliseconds()), run=RUN)]
    )[0]
    assert "the median's interval is" in row.noisy


def test_noise_counts_other_processes_and_not_the_cells_own():
    noise_with_child, noise_without_child = Noise(), Noise()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        used_s = psutil.Process(child.pid).cpu_times
        start, used_before_s = time.monotonic(), used_s().user
        with noise_with_child.watch([]), noise_without_child.watch([child.pid]):
            while used_s().user < used_before_s + 0.5:  # a busy machine gives the child little time
                time.sleep(0.02)
        available_s = (time.monotonic() - start) * psutil.cpu_count()
    finally:
        child.kill()
        child.wait()
    shares = [noise.shares()["others_share"] for noise in (noise_with_child, noise_without_child)]
    assert (shares[0] - shares[1]) * available_s == pytest.approx(0.5, abs=0.15)
    assert Noise().shares() == {}


def test_a_note_states_the_latency_by_length():
    by_length = {16: Samples.from_single([[1500], [1700]]), 512: Samples.from_single([[40_000]])}
    lines = notes(compare([result(measured_row("onnx-int8", 5, by_length=by_length), run=RUN)]))
    assert "onnx-int8@cpu, p50 ms by length: 16 tokens 1.60, 512 tokens 40.00." in lines


def test_the_interval_of_r2_is_finite_if_some_labels_are_nearly_equal():
    bounds = statistics.r2_interval((5.0,) + (0.0,) * 12, (0.0,) * 11 + (1e-155, 1.0))
    assert np.isfinite(bounds).all()
