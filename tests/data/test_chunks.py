"""Tests of input files in chunks: formats, compression, bounds, and errors that name the file."""

import bz2
import gzip
import json
import re

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from toolchain.data import sources, storage
from toolchain.data.chunks import open_reader
from toolchain.data.sources import find_input_files
from toolchain.errors import DataError

ROWS = [{"id": str(i), "text": f"film {i}"} for i in range(5)]
JSON = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"id,text\n" + b"".join(f"{row['id']},{row['text']}\n".encode() for row in ROWS)


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.fixture(scope="module")
def reader():
    with open_reader() as opened:
        yield opened


def read_chunks(reader, location, rows=2, skip=0, faults=0, first_columns=None):
    (file,) = find_input_files([str(location)])
    chunks = []
    reader.open(file, first_columns, "first.csv", None, None)
    reader.skip(skip)
    while not (chunks and chunks[-1].is_last):
        chunks.append(reader.read(rows, faults))
    return chunks


@pytest.mark.parametrize("ending", COMPRESSORS)
@pytest.mark.parametrize(("kind", "content"), [(".csv", CSV), (".jsonl", JSON)])
def test_compressed_files_give_the_same_rows(reader, tmp_path, kind, content, ending):
    file = tmp_path / f"in{kind}{ending}"
    file.write_bytes(COMPRESSORS[ending](content))
    chunks = read_chunks(reader, file)
    assert [len(chunk.texts) for chunk in chunks] == [2, 2, 1]
    assert [row for chunk in chunks for row in chunk.columns.to_pylist()] == ROWS
    assert [text for chunk in read_chunks(reader, file, skip=3) for text in chunk.texts] == ["film 3", "film 4"]


def test_a_url_is_read_through_a_copy(reader, tmp_path):
    with fsspec.open("memory://chunks/in.jsonl.gz", "wb") as file:
        file.write(gzip.compress(JSON))
    assert [text for chunk in read_chunks(reader, "memory://chunks/in.jsonl.gz") for text in chunk.texts][
        -1
    ] == "film 4"
    (tmp_path / "in.csv").write_bytes(CSV)
    assert len(read_chunks(reader, (tmp_path / "in.csv").as_uri())) == 3
    with fsspec.open("memory://chunks/bad.parquet", "wb") as file:
        file.write(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"memory://chunks/bad\.parquet cannot be read"):
        read_chunks(reader, "memory://chunks/bad.parquet")


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst"])
def test_a_compressed_file_that_is_cut_short_is_refused(reader, tmp_path, ending):
    file = tmp_path / f"in.csv{ending}"
    file.write_bytes(COMPRESSORS[ending](CSV)[:-6])
    with pytest.raises(DataError, match=r"in\.csv.* cannot be read"):
        read_chunks(reader, file)


def test_parquet_keeps_its_types_and_lists_its_faults(reader, tmp_path):
    table = pyarrow.table({"text": ["a", None, "c"], "stars": pyarrow.array([1, 2, 3], pyarrow.int8())})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    (chunk,) = read_chunks(reader, tmp_path / "in.parquet", rows=10, faults=1)
    assert chunk.columns.schema.field("stars").type == pyarrow.int8()
    assert chunk.faults == [(1, "the column 'text' holds no text")]
    assert chunk.texts == ["a", "", "c"]


def test_words_and_surrogates_of_json_lines(reader, tmp_path):
    lines = [{"tokens": ["a", "b"], "x": 5}, {"tokens": ["\ud800"], "x": None}, {"tokens": ["c"], "x": "\ud800"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (chunk,) = read_chunks(reader, tmp_path / "in.jsonl", rows=10, faults=5)
    assert chunk.texts[0] == "a b"
    assert [row for row, _ in chunk.faults] == [1, 2]
    assert chunk.columns.to_pylist()[0] == {"tokens": '["a", "b"]', "x": "5"}


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        (
            "in.jsonl",
            '{"text"\n{"text": "a"}\n[1]\n{"text": "b", "more": 1}\n\n{"text": "c"}\n',
            {0: "the line is not JSON", 2: "not a JSON object", 3: "the key 'more' is not in the first row"},
        ),
        ("in.csv", "id,text\n1,a\n2\n3,c\n", {1: "the number of fields is 1 instead of 2"}),
    ],
)
def test_rows_that_cannot_be_read_have_faults(reader, tmp_path, name, content, faults):
    (tmp_path / name).write_text(content)
    (chunk,) = read_chunks(reader, tmp_path / name, rows=10, faults=5)
    assert [row for row, _ in chunk.faults] == list(faults)
    for (_, reason), expected in zip(chunk.faults, faults.values(), strict=True):
        assert re.search(expected, reason)
    assert [text for text in chunk.texts if text] == ["a", "c"]


def test_rows_may_hold_pairs_of_texts(reader, tmp_path):
    (tmp_path / "in.tsv").write_text("more\ttext\nb\ta\n")
    (file,) = find_input_files([str(tmp_path / "in.tsv")])
    reader.open(file, None, file.name, "text", "more")
    chunk = reader.read(10, 0)
    assert (chunk.texts, chunk.columns.column_names) == ([("a", "b")], ["more", "text"])


def test_a_file_of_json_lines_without_a_line_has_the_columns_of_the_first_file(reader, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"")
    (chunk,) = read_chunks(reader, tmp_path / "in.jsonl", first_columns=[["id", "string"], ["text", "string"]])
    assert (chunk.columns.column_names, chunk.texts, chunk.is_last) == (["id", "text"], [], True)
    with pytest.raises(DataError, match="none of the columns"):
        read_chunks(reader, tmp_path / "in.jsonl")


def test_folders_and_patterns_give_their_files_in_order(tmp_path):
    for name in ("b.csv", "a/c.csv.gz", "_errors/d.csv", ".e.csv", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(CSV) if name.endswith(".gz") else CSV)
    assert [file.name for file in find_input_files([str(tmp_path)])] == [
        str(tmp_path / n) for n in ("a/c.csv.gz", "b.csv")
    ]
    assert [file.name for file in find_input_files([f"{tmp_path}/*.csv"])] == [str(tmp_path / "b.csv")]
    for inputs, message in [
        ([str(tmp_path / "b.csv")] * 2, "is named twice"),
        ([f"{tmp_path}/*.tsv"], "No file matches"),
        ([str(tmp_path / "none.csv")], "No such file"),
        (["memory://no-such-folder/x.csv"], "memory://no-such-folder/x.csv does not exist"),
        (["nowhere://a/b.csv"], "The kind of the URL nowhere://a/b.csv is unknown"),
        (["-"], "Standard input cannot be read again"),
    ]:
        with pytest.raises(DataError, match=message) as error:
            find_input_files(inputs)
        assert error.value.hint


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_INPUT_FILES", 1)
    for name in "ab":
        (tmp_path / f"{name}.csv").write_bytes(CSV)
    with pytest.raises(DataError, match="more than 1 "):
        find_input_files([str(tmp_path)])


def test_messages_show_no_secrets_of_a_url():
    assert storage.public_name("https://me:secret@host/a.csv?X-Signature=abc#x") == "https://host/a.csv"


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "s3://b/a does not exist"),
        (PermissionError("Forbidden"), r"Access to s3://b/a was refused \(Forbidden\)"),
        (ImportError("no s3fs"), "s3://b/a needs a package that is not installed.* no s3fs"),
        (RuntimeError("timeout"), r"s3://b/a cannot be read \(RuntimeError: timeout\)"),
    ],
)
def test_errors_of_a_storage_have_one_sentence_and_a_hint(raised, message):
    with pytest.raises(DataError, match=message), storage.convert_storage_errors("s3://key:secret@b/a"):
        raise raised


def test_a_file_behind_a_url_that_changed_its_size_is_refused(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/chunks/short.csv", CSV)
    for size, message in ((len(CSV) + 1, "ended after"), (len(CSV) - 1, "has more bytes")):
        with pytest.raises(DataError, match=message):
            storage.copy_to_local(memory, "/chunks/short.csv", "memory://chunks/short.csv", tmp_path / "copy", size)
