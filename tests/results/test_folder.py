"""Tests of the results folder: the newest run, free file names, and the measurements of an artifact."""

import dataclasses

import pytest
from conftest import ROOT
from sample_results import FP32, INT8, NO_GPU, measured_row, result

from toolchain.errors import BenchError
from toolchain.results.folder import ResultsFolder, read_old_run, require_measured
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile


def test_newest_returns_the_newest_result_of_the_model(tmp_path):
    folder = ResultsFolder(tmp_path)
    with pytest.raises(BenchError, match="no result of m"):
        folder.read_newest("m", pytest.fail)
    result(FP32, created="2026-01-01T00:00:00+00:00").write(tmp_path / "old.json")
    result(INT8, created="2026-01-02T00:00:00+00:00").write(folder.local / "new.json")
    assert folder.read_newest("m", pytest.fail).rows == (INT8,)
    with pytest.raises(BenchError, match="no result of other"):
        folder.read_newest("other", pytest.fail)
    (tmp_path / "broken.json").write_text("{")
    messages = []
    assert folder.read_newest("m", messages.append).rows == (INT8,)
    assert "broken.json is not a valid result file" in messages[0]


def test_runs_that_end_in_the_same_second_have_separate_files(tmp_path):
    folder = ResultsFolder(tmp_path)
    files = [folder.save_local(result(FP32, run={"id": name}), "m") for name in "abc"]
    assert [path.name for path in files] == [f"m-20260101T000000Z{number}.json" for number in ("", ".2", ".3")]
    assert [ResultFile.read(path).run["id"] for path in files] == ["a", "b", "c"]
    assert folder.save_local(result(FP32), "m", "0123").name == "m-20260101T000000Z-0123.json"


def test_a_run_without_a_measured_row_or_with_a_failed_one_is_refused():
    require_measured(result(FP32, NO_GPU))
    with pytest.raises(BenchError, match="No cell was measured: No GPU"):
        require_measured(result(NO_GPU))
    failed_row = Measurement("m", "onnx-int8", "cpu", None, "failed", "It crashed.", "Look.")
    with pytest.raises(BenchError, match="1 of 2 cells failed: onnx-int8@cpu: It crashed"):
        require_measured(result(FP32, failed_row))


def test_measurements_of_an_artifact_start_with_the_newest(tmp_path):
    folder = ResultsFolder(tmp_path)
    committed_file = ResultFile.read(ROOT / "benchmarks" / "results" / "reference-xeon-2cores.json")
    row = committed_file.rows[0]
    for path, created in (
        (folder.local / "a.json", "2026-01-02T00:00:00+00:00"),
        (folder.path / "b.json", "2026-01-01T00:00:00+00:00"),
    ):
        dataclasses.replace(committed_file, rows=(row,), created=created).write(path)
    measurements = folder.measurements_of([row.artifact_id, "nothing"], pytest.fail)
    assert measurements.keys() == {row.artifact_id}
    assert measurements[row.artifact_id][0].created.startswith("2026-01-02")


def test_rows_with_cuda_graphs_or_tensorrt_are_no_measurements_for_a_bundle(tmp_path):
    rows = [measured_row("onnx-fp16", 2, provider) for provider in ("cuda", "cuda-graphs", "tensorrt")]
    result(*rows).write(tmp_path / "a.json")
    measurements = ResultsFolder(tmp_path).measurements_of([rows[0].artifact_id], pytest.fail)
    assert [row.cell for _, row in measurements.values()] == ["onnx-fp16@cuda"]


def test_an_old_run_is_not_compared_with_itself(tmp_path):
    result(FP32, run={"id": "a"}).write(tmp_path / "a.json")
    with pytest.raises(BenchError, match="is the new run itself, so there is no older run"):
        read_old_run(tmp_path / "a.json", [result(FP32, run={"id": "a"})])
    assert read_old_run(tmp_path / "a.json", [result(FP32, run={"id": "b"})]).run["id"] == "a"
