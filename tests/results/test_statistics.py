"""Statistics: coverage of intervals, significance tests against published values, noise."""

import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_results import FP32, INT8, RUN, measured, of, result

from toolchain.bench.noise import Noise
from toolchain.compare.report.columns import notes
from toolchain.compare.rows import arrange, compare
from toolchain.errors import ResultFileError
from toolchain.results import statistics
from toolchain.results.measurements import Samples
from toolchain.results.statistics import ratio

POSITIVE = st.floats(1e-3, 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [8, 24])
def test_of_a_thousand_equal_pairs_three_to_seven_per_cent_are_called_different(rounds):
    rng = np.random.default_rng(20)
    different = 0
    for _ in range(1000):
        drift = rng.normal(0, 0.05, rounds)  # of the machine: it hits both
        one, other = (np.exp(drift + rng.normal(0, 0.02, rounds)) for _ in range(2))
        different += bool(ratio(list(one), list(other)).differs)
    assert 30 <= different <= 70


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=30))
def test_a_ratio_lies_in_its_interval_and_turns_over_with_its_sides(pairs):
    one, other = zip(*pairs, strict=True)
    found, turned = ratio(one, other), ratio(other, one)
    assert found.value == pytest.approx(1 / turned.value)
    if len(pairs) < statistics.FEWEST_ROUNDS:
        assert found.differs is None
    else:
        assert found.low <= found.value * (1 + 1e-9)
        assert found.high >= found.value * (1 - 1e-9)


def test_the_same_times_are_no_difference():
    times = [1.0, 2.0, 3.0, 1.5, 2.5, 3.5]
    assert ratio(times, times) == statistics.Ratio(1.0, 1.0, 1.0)
    assert ratio(times, times).differs is False


@pytest.mark.slow
def test_the_interval_of_a_median_covers_it():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(100):
        rounds = [[max(1, round(v)) for v in rng.lognormal(7, 0.3, 60)] for _ in range(8)]
        low, high = statistics.median_interval(Samples.from_single(rounds))
        covered += low <= math.exp(7) / 1000 <= high
    assert covered >= 88
    assert statistics.median_interval(Samples.from_single([[1], [2]])) is None


def test_published_values():
    low, high = statistics.wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert statistics.mcnemar(0, 0) == 1
    assert statistics.mcnemar(5, 15) == pytest.approx(0.0414, abs=1e-4)  # two sides of a coin thrown 20 times


def test_macro_f1_counts_every_label_alike():
    assert statistics.macro_f1(statistics.count_by_label([0, 0, 0, 1], [0, 0, 0, 1], False)) == 1
    assert statistics.macro_f1(statistics.count_by_label([0, 0, 0, 0], [0, 0, 0, 1], False)) == pytest.approx(
        (6 / 7 + 0) / 2
    )


def test_calibration_error_is_what_confidence_has_over_accuracy():
    assert statistics.calibration_error([[1.0, 0.0]] * 4, [0, 0, 0, 0], False) == 0
    assert statistics.calibration_error([[0.2, 0.8]] * 4, [0, 0, 0, 1], False) == pytest.approx(0.55)


LABELS = [0, 1] * 50


def answering(variant, wrong, shift=0):
    """Answers right but for these sentences, `shift` less sure of it than 90 %."""
    answers = tuple(1 - y if i in wrong else y for i, y in enumerate(LABELS))
    sure = 9000 - shift
    chances = tuple((10_000 - sure, sure) if a else (sure, 10_000 - sure) for a in answers)
    found = {"predictions": answers, "probabilities": chances, "batch_changed": 3}
    return measured(variant, 5, correct=100 - len(wrong), **found)


def test_quality_figures_of_the_answers():
    base, other = answering("torch-fp32", {1, 2, 3}), answering("onnx-int8", {3, 4, 5, 6, 7, 8, 9}, shift=500)
    data = {"name": "d", "rows": 100, "sha256": "0", "labels": LABELS}
    row = of(compare([result(base, other, run=RUN, data=data)]), "onnx-int8@cpu")
    assert (row.quality.lost, row.quality.won, row.quality.batch_changed) == (6, 2, 3)
    assert (row.changed_sentences("lost"), row.changed_sentences("won")) == ([4, 5, 6, 7, 8, 9], [1, 2])
    assert row.quality.p == pytest.approx(0.2891, abs=1e-4)
    assert row.quality.largest_shift == pytest.approx(0.75)
    assert row.quality.mean_shift == pytest.approx((8 * 0.75 + 92 * 0.05) / 100)
    assert row.quality.low < 0.93 < row.quality.high
    assert row.quality.macro_f1 == pytest.approx(0.93, abs=1e-3)
    assert row.quality.calibration_error == pytest.approx(0.08)
    assert row.to_json()["quality"]["lost"] == 6


def test_without_labels_there_is_only_the_interval():
    row = compare([result(FP32, run=RUN)])[0]
    assert row.quality.low < 0.9 < row.quality.high
    assert row.quality.lost is row.quality.macro_f1 is None


def test_rows_that_nothing_beats_are_marked():
    worse = measured("onnx-fp32", 9, correct=90)
    rows = compare([result(FP32, INT8, worse, run=RUN)])
    assert {row.measurement.variant for row in rows if row.pareto} == {"torch-fp32", "onnx-int8"}


def test_rows_are_chosen_sorted_and_marked_anew():
    rows = compare([result(FP32, INT8, measured("onnx-fp32", 9), run=RUN)])
    assert [r.measurement.variant for r in arrange(rows, "latency", ())] == ["onnx-int8", "torch-fp32", "onnx-fp32"]
    assert [r.measurement.variant for r in arrange(rows, "accuracy", ("onnx-*",))] == ["onnx-fp32", "onnx-int8"]
    assert [r.pareto for r in arrange(rows, None, ("onnx-fp32@cpu",), "cpu")] == [True]
    with pytest.raises(
        ResultFileError, match=r"No row matches bnb-\*, \*@cuda. The cells are: torch-fp32@cpu, onnx-int8"
    ):
        arrange(rows, None, ("bnb-*",), "cuda")


def test_a_noisy_row_names_its_disturbance():
    disturbed = measured("onnx-int8", 5, noise={"steal_share": 0.05, "others_share": 0.2, "load_1m": 3.0})
    row = of(compare([result(FP32, disturbed, run=RUN)]), "onnx-int8@cpu")
    assert row.noisy == "the host took 5% of the processor, other processes used 20% of the processor"
    wide = Samples.from_single([[1000], [1000], [1000], [9000], [9000], [9000], [5000]])
    row = compare([result(measured("torch-fp32", 5, latency=wide, latency_ms=wide.milliseconds()), run=RUN)])[0]
    assert "the median's interval is" in row.noisy


def test_only_other_processes_count_as_noise():
    spin = "import time\nend = time.time() + 1.2\nwhile time.time() < end: pass"
    theirs, mine = Noise(), Noise()
    with subprocess.Popen([sys.executable, "-c", spin]) as other, theirs.watch([]), mine.watch([other.pid]):
        time.sleep(0.8)
    assert theirs.shares()["others_share"] > mine.shares()["others_share"] + 0.1
    assert Noise().shares() == {}


def test_latency_by_length_is_told():
    by_length = {16: Samples.from_single([[1500], [1700]]), 512: Samples.from_single([[40_000]])}
    said = notes(compare([result(measured("onnx-int8", 5, by_length=by_length), run=RUN)]))
    assert "onnx-int8@cpu, p50 ms by length: 16 tokens 1.60, 512 tokens 40.00." in said
