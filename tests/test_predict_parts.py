"""Tests of `predict` into a folder: order and columns, killed runs, other runs' folders, and rows without an answer."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.data.chunks import open_reader
from toolchain.errors import ArtifactError, CheckpointError, DataError
from toolchain.predict import load_model, load_variant_model, parts
from toolchain.predict.chunk_scoring import ROW_BITS
from toolchain.predict.parts import Request, predict_parts
from toolchain.progress import no_bar

TEXTS = [f"film {'long ' * (i % 5)}{i}" for i in range(10)]
ANSWERS = ["prediction", "score_NEGATIVE", "score_POSITIVE"]
MARK = "the tokenizer fails here"


def quiet(line):
    pass


@pytest.fixture(scope="module")
def model(built_tiny):
    return load_variant_model(built_tiny, "onnx-fp32", quiet, no_bar)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_ROWS", 3)


def write_csv(path, texts, start=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("id,text\n" + "".join(f"{start + i},{text}\n" for i, text in enumerate(texts)))
    return str(path)


def read_parts(folder):
    tables = [pyarrow.parquet.read_table(file) for file in sorted(folder.glob("part-*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


class CountingModel:
    """A loaded model that counts the scored texts, and fails to tokenise texts with `MARK`."""

    def __init__(self, inner, texts, limit=None):
        self.inner, self.texts, self.limit = inner, texts, limit

    def encode(self, texts):
        if any(MARK in text for text in texts):
            raise CheckpointError("The tokenizer fails on a text.", "")
        return self.inner.encode(texts)

    def logits(self, texts, rows):
        if self.limit is not None and len(self.texts) >= self.limit:
            raise KeyboardInterrupt
        self.texts.extend(texts)
        return self.inner.logits(texts, rows)

    def close(self):
        self.inner.close()


def counting(texts, limit=None):
    return lambda model, threads: CountingModel(load_model(model, threads), texts, limit)


@pytest.fixture(scope="module")
def reader():
    with open_reader() as opened:
        yield opened


@pytest.fixture(autouse=True)
def one_reader(reader, monkeypatch):
    """Lets all tests of this file use one child process, which saves time."""
    monkeypatch.setattr(parts, "open_reader", lambda: contextlib.nullcontext(reader))


def run(model, inputs, output, load=load_model, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "load_model", load)
        return predict_parts(model, Request(inputs, str(output), **options), quiet, no_bar)


def test_rows_have_ids_columns_and_answers_in_order(model, tmp_path, small_chunks):
    inputs = [write_csv(tmp_path / "b.csv", TEXTS[:4]), write_csv(tmp_path / "a.csv", TEXTS[4:], 4)]
    summary = run(model, inputs, tmp_path / "out")
    rows = read_parts(tmp_path / "out")
    assert list(rows[0]) == ["row_id", "id", "text", *ANSWERS]
    assert [row["text"] for row in rows] == TEXTS
    assert [row["id"] for row in rows] == [str(i) for i in range(10)]
    assert [row["row_id"] for row in rows] == [*range(4), *((1 << ROW_BITS) + i for i in range(6))]
    manifest = json.loads((tmp_path / "out" / "_toolchain.json").read_text())
    assert (manifest["model"], manifest["rows"], manifest["errors"]) == (model.id, 10, 0)
    assert manifest["digest"] == summary.digest
    lines = subprocess.run(
        ["sha256sum", *sorted(p.name for p in (tmp_path / "out").glob("part-*"))],
        cwd=tmp_path / "out", capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert subprocess.run(["sha256sum"], input=lines, capture_output=True, check=True).stdout.decode()[:64] == (
        summary.digest
    )


@given(cuts=st.sets(st.integers(1, 9)), chunk_rows=st.integers(1, 12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8, deadline=None)
def test_files_and_chunks_do_not_change_the_answers(model, tmp_path_factory, cuts, chunk_rows):
    folder = tmp_path_factory.mktemp("split")
    bounds = [0, *sorted(cuts), 10]
    inputs = [
        write_csv(folder / f"{number}.csv", TEXTS[start:end], start)
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "CHUNK_ROWS", chunk_rows)
        run(model, inputs, folder / "out")
    run(model, [write_csv(folder / "whole.csv", TEXTS)], folder / "whole")
    rows, expected = read_parts(folder / "out"), read_parts(folder / "whole")
    assert [row["row_id"] for row in rows] == sorted(row["row_id"] for row in rows)
    for row, other in zip(rows, expected, strict=True):
        assert (row["id"], row["text"], row["prediction"]) == (other["id"], other["text"], other["prediction"])
        assert [row[n] for n in ANSWERS[1:]] == pytest.approx([other[n] for n in ANSWERS[1:]], abs=1e-5)


def test_an_interrupted_run_continues_with_the_same_digest(model, tmp_path, small_chunks):
    inputs = [write_csv(tmp_path / "in" / "a.csv", TEXTS), write_csv(tmp_path / "in" / "b.csv", TEXTS)]
    expected = run(model, inputs, tmp_path / "expected")
    with pytest.raises(KeyboardInterrupt):
        run(model, inputs, tmp_path / "out", counting([], limit=13))
    assert not (tmp_path / "out" / "_toolchain.json").exists()
    done = [row["text"] for row in read_parts(tmp_path / "out")]
    assert 6 <= len(done) <= 13
    scored = []
    assert run(model, inputs, tmp_path / "out", counting(scored)) == expected
    assert len(scored) == 20 - len(done)
    assert run(model, inputs, tmp_path / "out", lambda *_: pytest.fail("the model was loaded")) == expected


KILLED = """
import os, signal, sys
from pathlib import Path
from toolchain.predict import load_folder_model, parts
from toolchain.predict.output_folder import OutputFolder
from toolchain.progress import no_bar
parts.CHUNK_ROWS = 3
write, left = OutputFolder.write, [int(sys.argv[4])]
def write_or_die(self, name, content):
    write(self, name, content)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
OutputFolder.write = write_or_die
model = load_folder_model(Path(sys.argv[1]), print)
parts.predict_parts(model, parts.Request([sys.argv[2]], sys.argv[3]), lambda line: None, no_bar)
"""


@pytest.mark.slow
@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_killed_run_continues(model, tmp_path, small_chunks, writes):
    """Kills the run after the record of the run, after the first part, and after the first part's record."""
    source = write_csv(tmp_path / "a.csv", TEXTS)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(model.folder), source, str(tmp_path / "out"), str(writes)], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    scored = []
    summary = run(model, [source], tmp_path / "out", counting(scored))
    assert len(scored) == (7 if writes == 3 else 10)
    assert summary == run(model, [source], tmp_path / "expected")


@pytest.mark.parametrize("damage", ["part", "record"])
def test_a_half_written_file_is_scored_again(model, tmp_path, small_chunks, damage):
    source = write_csv(tmp_path / "a.csv", TEXTS)
    expected = run(model, [source], tmp_path / "out")
    name = {"part": "part-00000-000002.parquet", "record": "_records/part-00000-000002.json"}[damage]
    file = tmp_path / "out" / name
    file.write_bytes(file.read_bytes()[:-10])
    scored = []
    assert run(model, [source], tmp_path / "out", counting(scored)) == expected
    assert sorted(scored) == sorted(TEXTS[6:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "They come from the model"),
        ("input", r"a\.csv has changed since then"),
        ("inputs", "They come from other input files"),
        ("column", "They come from other columns"),
        ("files", "holds files that `predict` did not write"),
        ("record", r"run\.json is damaged"),
    ],
)
def test_the_folder_of_another_run_is_refused(model, tmp_path, small_chunks, change, message):
    inputs, output = [write_csv(tmp_path / "a.csv", TEXTS)], tmp_path / "out"
    run(model, inputs, output)
    before = sorted(output.rglob("*.parquet"))
    chosen_model, options = model, {}
    if change == "model":
        chosen_model = dataclasses.replace(model, id="f" * 64)
    elif change == "input":
        write_csv(tmp_path / "a.csv", TEXTS[::-1])
        os.utime(tmp_path / "a.csv", ns=(1, 1))
    elif change == "inputs":
        inputs.append(write_csv(tmp_path / "b.csv", TEXTS))
    elif change == "column":
        options["column"] = "text"
    elif change == "files":
        shutil.rmtree(output / "_records")
    else:
        (output / "_records" / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match=message) as error:
        run(chosen_model, inputs, output, **options)
    assert error.value.hint
    assert sorted(output.rglob("*.parquet")) == before


def test_an_output_folder_inside_an_input_is_refused(model, tmp_path):
    write_csv(tmp_path / "in" / "a.csv", TEXTS)
    with pytest.raises(DataError, match="lies in the input"):
        run(model, [str(tmp_path / "in")], tmp_path / "in" / "out")
    with pytest.raises(DataError, match="lies in the input"):
        run(model, ["memory://inside/"], "memory://inside/out/")


def break_column(path):
    path.write_text("id,review\n1,a\n")


def add_column(path):
    path.write_text("id,text,more\n1,a,b\n")


def break_type(path):
    path.unlink()
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": ["a"]}), path.with_suffix(".parquet"))


def cut_parquet(path):
    break_type(path)
    file = path.with_suffix(".parquet")
    file.write_bytes(file.read_bytes()[:-20])


def cut_row(path):
    path.write_text("id,text\n1,a\n2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_column, r"b\.csv has no column 'text', which .*a\.csv has"),
        (add_column, r"b\.csv has the column 'more', which .*a\.csv lacks"),
        (break_type, r"The column 'id' has the type int64 in .*b\.parquet, but string in .*a\.csv"),
        (cut_parquet, r"b\.parquet cannot be read"),
        (cut_row, r"b\.csv, row 2: the number of fields is 1 instead of 2"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_file_stops_the_run_and_finished_parts_stay(model, tmp_path, small_chunks, change, message):
    write_csv(tmp_path / "in" / "a.csv", TEXTS)
    write_csv(tmp_path / "in" / "b.csv", TEXTS)
    change(tmp_path / "in" / "b.csv")
    with pytest.raises(DataError, match=message) as error:
        run(model, [str(tmp_path / "in")], tmp_path / "out")
    assert error.value.hint
    assert [row["text"] for row in read_parts(tmp_path / "out")][:10] == TEXTS
    assert not (tmp_path / "out" / "_toolchain.json").exists()


def test_rows_without_an_answer_are_listed_up_to_a_bound(model, tmp_path, small_chunks):
    source = tmp_path / "a.parquet"
    texts = ["a", None, "c", MARK, "e"]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source)
    for most, message in ((0, "row 2: the column 'text' holds no text"), (1, "row 4: The tokenizer fails on a text")):
        with pytest.raises(DataError, match=message):
            run(model, [str(source)], tmp_path / "out", counting([]), max_errors=most)
    summary = run(model, [str(source)], tmp_path / "out", counting([]), max_errors=2)
    assert (summary.rows, summary.errors) == (3, 2)
    assert [(row["row_id"], row["text"]) for row in read_parts(tmp_path / "out")] == [(0, "a"), (2, "c"), (4, "e")]
    lines = [
        json.loads(line)
        for file in sorted((tmp_path / "out" / "_errors").iterdir())
        for line in file.read_text().splitlines()
    ]
    assert [(line["row_id"], line["row"], line["input"]) for line in lines] == [
        (1, 2, str(source)),
        (3, 4, str(source)),
    ]
    assert "holds no text" in lines[0]["reason"]


def test_a_column_that_predict_writes_is_refused(model, tmp_path):
    (tmp_path / "a.csv").write_text("text,prediction\na,b\n")
    with pytest.raises(DataError, match="has the column 'prediction', which `predict` writes"):
        run(model, [str(tmp_path / "a.csv")], tmp_path / "out")


def test_inputs_and_outputs_may_be_urls(model, tmp_path, small_chunks):
    for name in ("a", "b"):
        with fsspec.open(f"memory://predict/in/{name}.csv", "w") as file:
            file.write("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS)))
    expected = run(model, ["memory://predict/in/"], "memory://predict/out/")
    assert (expected.rows, expected.errors) == (20, 0)
    scored = []
    fsspec.filesystem("memory").rm("/predict/out/part-00001-000001.parquet")
    assert run(model, ["memory://predict/in/"], "memory://predict/out/", counting(scored)) == expected
    assert len(scored) == 7


def test_a_file_without_rows_gives_an_empty_part_with_its_columns(model, tmp_path):
    summary = run(model, [write_csv(tmp_path / "a.csv", [])], tmp_path / "out")
    assert summary.rows == 0
    table = pyarrow.parquet.read_table(tmp_path / "out" / "part-00000-000000.parquet")
    assert table.column_names == ["row_id", "id", "text", *ANSWERS]


def test_the_command_writes_a_folder(tiny, tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "in" / "a.csv", TEXTS)
    options = ("--model", tiny.model, "--exported", tiny.exported)
    code, out, err = say("predict", "torch-fp32", "in", "--output", "out/", *options)
    assert (code, out.strip()) == (0, "out/"), err
    assert "10 texts scored" in err
    assert len(read_parts(tmp_path / "out")) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out/"], "needs at least one FILE"),
        (["a.csv", "b.csv"], "need a folder as --output"),
        (["s3://bucket/a.csv", "--output", "a.csv"], "need a folder as --output"),
        (["a.csv", "--output", "s3://bucket/out"], "end it with /"),
        (["a.csv", "--max-errors", "1"], "--max-errors needs a folder"),
    ],
)
def test_options_that_exclude_each_other_are_refused(say, arguments, message):
    code, _, err = say("predict", "onnx-fp32", *arguments)
    assert code == 2
    assert message in err
