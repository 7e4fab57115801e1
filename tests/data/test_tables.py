"""Tests of reading texts: a file with a hostile row is refused before the row is in memory."""

import csv
import datetime
import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.data import columnar, tables
from toolchain.data.files import Texts, group_texts
from toolchain.errors import DataError

LIMIT = 1000


def write_long_row(path, text):
    """Writes `text` into a file with columns; returns the path."""
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["short", text]}), path)
    elif path.suffix == ".jsonl":
        path.write_text(json.dumps({"text": text}) + "\n")
    elif path.suffix == ".txt":
        path.write_text(f"short\n{text}\n")
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text"], ["short"], [text]])
    return path


@pytest.mark.parametrize("kind", [".txt", ".csv", ".tsv", ".jsonl", ".jsonl.gz", ".parquet"])
def test_a_row_above_the_limit_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tables, "MAX_ROW_SIZE", LIMIT)
    file = write_long_row(tmp_path / f"in{kind}", "x" * (LIMIT - 50))
    assert len(list(Texts(str(file)).read())[-1]) == LIMIT - 50
    with pytest.raises(DataError, match=r"(row|line) .*: the row has more than"):
        list(Texts(str(write_long_row(file, "x" * (LIMIT + 1)))).read())


def test_the_lines_of_a_csv_row_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROW_SIZE", LIMIT)
    (tmp_path / "in.csv").write_text("text\n" + '"a\nb"\n' * LIMIT)
    assert list(Texts(str(tmp_path / "in.csv")).read()) == ["a\nb"] * LIMIT
    (tmp_path / "in.csv").write_text('text\n"' + "a\n" * LIMIT)  # a quote without an end
    with pytest.raises(DataError, match="look for a quote without an end"):
        list(Texts(str(tmp_path / "in.csv")).read())


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path):
    with gzip.open(tmp_path / "in.jsonl.gz", "wb") as file:
        for _ in range(64):
            file.write(b"a" * 2**20)
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1: the row has more than"):
        Texts(str(tmp_path / "in.jsonl.gz")).count()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * tables.MAX_ROW_SIZE


def read_damaged(path, start):
    """Writes a Parquet file, and reads it in a child process that runs the code `start` first."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path / "in.parquet")
    (path / "sitecustomize.py").write_text(start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(path))
        return list(Texts(str(path / "in.parquet")).read())


def test_a_parquet_file_that_crashes_its_library_is_refused(tmp_path):
    abort = "import os, pyarrow.parquet\npyarrow.parquet.ParquetFile = lambda *_, **__: os.abort()"
    with pytest.raises(DataError, match=r"in\.parquet cannot be read\. The process crashed with SIGABRT"):
        read_damaged(tmp_path, abort)


def test_a_parquet_file_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "ANSWER_S", 0.5)
    sleep = "import pyarrow.parquet, time\npyarrow.parquet.ParquetFile = lambda *_, **__: time.sleep(60)"
    with pytest.raises(DataError, match=r"in\.parquet cannot be read\. The process did not answer within"):
        read_damaged(tmp_path, sleep)


def test_a_parquet_file_with_a_huge_page_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "MEMORY_BYTES", 1 << 26)
    file = tmp_path / "in.parquet"
    texts = pyarrow.array(["a" * 2**20] * 200)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, use_dictionary=False, data_page_size=1 << 30)
    assert file.stat().st_size < 2**24
    with pytest.raises(DataError, match=r"in\.parquet needs more than 67 MB to read"):
        Texts(str(file)).count()


def test_values_of_parquet_are_plain(tmp_path):
    table = {"text": ["a"], "words": [["b", None]], "float": [0.1 + 0.2], "day": [datetime.date(2020, 1, 1)]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "in.parquet")
    (row,) = tables.Table(str(tmp_path / "in.parquet")).read(list)
    assert row == ("a", ["b", None], 0.1 + 0.2, {"value": "datetime.date(2020, 1, 1)"})


def test_half_of_a_surrogate_pair_gives_an_error(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a \\ud83c b"}\n')
    with pytest.raises(DataError, match="row 1: the text in the column 'text' has half of a surrogate pair"):
        Texts(str(tmp_path / "in.jsonl")).count()


def test_a_hint_with_a_command_quotes_the_name_of_the_file(tmp_path):
    (tmp_path / "a; b.csv").write_bytes("text\nschön\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"UTF-8 '.*a; b\.csv' > NEW"):
        Texts(str(tmp_path / "a; b.csv")).count()


@given(st.lists(st.text("ab", max_size=12) | st.tuples(st.text("a", max_size=6), st.text("b", max_size=6))))
def test_a_window_has_a_limited_number_of_texts_and_characters(texts):
    windows = list(group_texts(texts, 4, 10))
    assert [text for window in windows for text in window] == texts
    for window in windows:
        assert 1 <= len(window) <= 4
        assert len(window) == 1 or sum(len("".join(text)) for text in window) <= 10


def test_a_full_window_is_scored_before_the_next_text_is_read():
    texts = iter(["a", "b", "c"])
    assert next(group_texts(texts, 2, 10)) == ["a", "b"]
    assert next(texts) == "c"
