"""Tests of samples, result rows, and valid and invalid result files."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_results import EXIT_POINT, EXITS, result, row, samples_of

from toolchain.errors import ResultFileError
from toolchain.results.measurements import MAX_SAMPLES, Measurement, Samples
from toolchain.results.result_file import ResultFile

rounds = st.lists(st.lists(st.integers(1, 10**7), max_size=700), min_size=1, max_size=8).filter(lambda r: any(r))


@given(rounds)
def test_thinning_is_even_and_keeps_the_rounds_and_the_count(times):
    samples = samples_of(times)
    assert samples.count == sum(map(len, times))
    assert len(samples.values()) == min(samples.count, MAX_SAMPLES)
    assert len(samples.rounds) == len(times)
    for kept_round, timed_round in zip(samples.rounds, times, strict=True):
        remaining = iter(timed_round)
        assert all(value in remaining for value in kept_round)  # Thinning keeps the order of the samples.
        share = MAX_SAMPLES / samples.count if samples.count > MAX_SAMPLES else 1
        assert abs(len(kept_round) - share * len(timed_round)) <= 1


def test_thinning_loses_different_sentences_in_each_repetition():
    """The samples are four repetitions of 250 sentences in each of 8 rounds.

    If thinning kept each n-th sample, it would lose some sentences entirely.
    """
    sentence_ids = list(range(1, 251)) * 4
    samples = samples_of([sentence_ids] * 8)
    assert len(samples.values()) == MAX_SAMPLES
    assert len(set(samples.values())) > 240


@given(rounds)
def test_quantiles_equal_those_of_numpy(times):
    samples = samples_of(times)
    figures = samples.milliseconds()
    for name, q in {"p50": 50, "p90": 90, "p95": 95, "p99": 99}.items():
        assert figures[name] == pytest.approx(np.percentile(samples.values(), q) / 1000, abs=1e-4)
    assert figures["p50"] <= figures["p90"] <= figures["p95"] <= figures["p99"]


def test_throughput_is_sentences_per_second():
    assert Samples.from_rounds([[1000, 3000]], [[32, 8]]).per_second() == 10_000


def test_a_result_file_can_be_written_and_read_back(tmp_path):
    unavailable_row = Measurement("m", "onnx-fp32", "cuda", None, "unavailable", "No GPU.", "Get one.")
    reported_row = Measurement(
        "m", "torch-fp32", "cpu", None, "reported", latency_ms={"p50": 9.0}, throughput_per_s=3.0
    )
    result_file = result(row(), unavailable_row, reported_row)
    result_file.write(tmp_path / "deep" / "r.json")
    assert ResultFile.read(tmp_path / "deep" / "r.json") == result_file
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_a_result_file_has_one_line_of_raw_samples_per_row(tmp_path):
    result(row()).write(tmp_path / "r.json")
    body = json.loads((tmp_path / "r.json").read_text())
    assert body["schema"] == 2
    assert body["rows"][0]["samples"]["latency"] == {
        "unit": "us",
        "rounds": [[900, 1000], [1100]],
        "sentences": [[1, 1], [1]],
        "count": 3,
    }
    assert body["rows"][0]["accuracy"] == {"value": 0.9, "correct": 9, "count": 10, "batch_size": 1}
    assert len([line for line in (tmp_path / "r.json").read_text().splitlines() if "onnx-int8" in line]) == 1


def test_the_exit_of_each_sentence_is_stored_and_its_shares_follow(tmp_path):
    early = row(facts={"exits": EXITS}, predictions=(0, 1, 0, 1, 0), exits=(0, None, 0, 2, 1))
    result(early).write(tmp_path / "r.json")
    (read,) = ResultFile.read(tmp_path / "r.json").rows
    assert (read.exits, read.exit_shares) == (early.exits, (0.5, 0.25, 0.25))
    old = dataclasses.replace(early, exits=())
    assert "exits" not in old.to_json()
    assert old.exit_shares == ()


def change_row(**changes):
    def change(body):
        body["rows"][0].update(changes)

    return change


def change_samples(values):
    def change(body):
        body["rows"][0]["samples"]["latency"]["rounds"] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(schema=3), "schema: Input should be 1 or 2"),
        (lambda body: body.pop("rows"), "rows: Field required"),
        (lambda body: body.pop("machine"), "machine"),
        (change_row(status="great"), "rows.0.status: Input should be"),
        (change_row(cell="other@cpu"), "cell 'other@cpu'"),
        (change_row(latency_ms={"p50": 0.1}), "latency_ms does not follow from its samples"),
        (change_row(throughput_per_s=10**6), "throughput_per_s does not follow from its samples"),
        (change_samples([[900, -5], [1100]]), "is not positive"),
        (change_samples([[900, 0.5], [1100]]), "valid integer"),
        (change_samples([["fast"]]), "valid integer"),
        (change_samples([[900], [1100]]), "a round does not have one number of sentences for each time"),
        (
            change_row(accuracy={"value": 1.1, "correct": 11, "count": 10, "batch_size": 1}),
            "from 11 correct predictions of 10",
        ),
        (change_row(surprise=1), "surprise"),
        (change_row(samples={}), "lacks samples"),
        (change_row(accuracy=None), "lacks samples, score"),
        (
            change_row(accuracy={"value": 1.0, "correct": 9, "count": 10, "batch_size": 1}),
            "from 9 correct predictions of 10",
        ),
        (change_row(accuracy={"value": 0.0, "correct": 0, "count": 0, "batch_size": 1}), "0 correct predictions of 0"),
        (change_row(memory_bytes=None), "rows.0.memory_bytes: Input should be a"),
        (change_row(memory_bytes={"peak": "x"}), "memory_bytes.peak: Input should be a valid integer"),
        (change_row(size_bytes={"total": -5}), "size_bytes.total: the number is negative"),
        (change_row(model=5), "rows.0.model: Input should be a valid string"),
        (change_samples([]), "there is a round without a time"),
        (lambda body: body["machine"].pop("cpu"), "machine.cpu: Field required"),
        (lambda body: body["machine"].update(gpu=["x"]), "machine.gpu.0: Input should be an object"),
        (lambda body: body["machine"].update(cores="two"), "machine.cores: Input should be a valid integer"),
        (lambda body: body.update(run=None), "run: Input should be"),
        (lambda body: body.update(data={}), "data.name: Field required"),
        (lambda body: body["data"].update(rows=11), "10 predictions for 11 sentences"),
        (lambda body: body["rows"].append(body["rows"][0]), "two rows have the same cell"),
        (change_row(exits=[0]), "a sentence with an unknown exit"),
        (change_row(exits=[0, 3], facts={"exits": EXITS}), "a sentence with an unknown exit"),
        (change_row(exits=[-1], facts={"exits": EXITS}), "exits.0.*the number is negative"),
        (change_row(facts={"exits": {**EXITS, "layers": [0]}}), "another number of shares than layers"),
        (change_row(facts={"exits": {**EXITS, "curve": [{**EXIT_POINT, "shares": []}]}}), "another number of shares"),
        (change_row(facts={"exits": {**EXITS, "curve": [EXIT_POINT] * 1001}}), "too many exits, or too many points"),
    ],
)
def test_an_inconsistent_result_file_is_refused(tmp_path, change, message):
    result(row()).write(tmp_path / "r.json")
    body = json.loads((tmp_path / "r.json").read_text())
    change(body)
    (tmp_path / "r.json").write_text(json.dumps(body))
    with pytest.raises(ResultFileError, match=message):
        ResultFile.read(tmp_path / "r.json")


RIGHT = {"accuracy": {"value": 1.0, "correct": 2, "count": 2, "batch_size": 1}, "predictions": [0, 1]}


def write_answers(path, *all_probabilities, **data):
    """Writes a result of two sentences with the labels 0 and 1, and one row for each list of probabilities."""
    body = json.loads(result(row()).to_json())
    body["labels"], body["data"] = [0, 1], {**body["data"], "rows": 2, **data}
    body["rows"] = [
        {**body["rows"][0], **RIGHT, "variant": f"v{i}", "cell": f"v{i}@cpu", "probabilities": probabilities}
        for i, probabilities in enumerate(all_probabilities)
    ]
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("all_probabilities", "names", "message"),
    [
        ([[[9000, 1000], [2000]]], (), "another number of probabilities than labels"),
        ([[[], []]], (), "another number of probabilities than labels"),
        ([[[10000], None]], (), "a prediction or a label without a probability"),
        ([[[9000, 1000]] * 2, [[9000, 500, 500]] * 2], (), "another number of probabilities than labels"),
        ([[[9000, 1000]] * 2], ("a", "b", "c"), "another number of probabilities than labels"),
    ],
)
def test_answers_probabilities_and_names_have_the_same_number_of_labels(tmp_path, all_probabilities, names, message):
    file = tmp_path / "r.json"
    write_answers(file, *all_probabilities, label_names=list(names))
    with pytest.raises(ResultFileError, match=message):
        ResultFile.read(file)
    write_answers(file, [[9000, 1000], None], label_names=["a", "b"])
    assert ResultFile.read(file).rows[0].score.value == 1
    write_answers(file, [[9000, 1000], None], labels=[1, 1])
    with pytest.raises(ResultFileError, match="the labels are in the wrong place"):
        ResultFile.read(file)


def test_samples_that_would_need_a_huge_table_are_refused(tmp_path):
    latency = Samples.from_single([*[[1000]] * 1000, [1000] * 1000])
    assert latency.count == MAX_SAMPLES
    result(row(latency=latency, latency_ms=latency.milliseconds())).write(tmp_path / "r.json")
    with pytest.raises(ResultFileError, match="one round has far more times than the others"):
        ResultFile.read(tmp_path / "r.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1, "rows": [NaN]}', "\x00"])
def test_a_file_without_a_result_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ResultFileError, match="is not a valid result file"):
        ResultFile.read(tmp_path / "r.json")
    with pytest.raises(ResultFileError, match="There is no result file"):
        ResultFile.read(tmp_path / "missing.json")


def test_a_truncated_file_is_refused_at_any_length(tmp_path):
    result(row()).write(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    for length in range(0, len(text) - 2, 37):
        (tmp_path / "r.json").write_text(text[:length])
        with pytest.raises(ResultFileError):
            ResultFile.read(tmp_path / "r.json")


def test_a_path_that_cannot_be_written_raises_a_result_file_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultFileError, match="cannot be written"):
        result(row()).write(tmp_path / "file" / "r.json")


def test_a_nan_is_not_written(tmp_path):
    row_with_nan = dataclasses.replace(row(), memory_bytes={"peak": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        result(row_with_nan).write(tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_an_old_result_of_a_multi_label_model_keeps_its_task():
    old = result(row())
    assert old.task == "single_label_classification"
    assert dataclasses.replace(old, data={**old.data, "multi_label": True}).task == "multi_label_classification"
