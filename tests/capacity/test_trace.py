"""Tests of traces: files that another program may have written."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.capacity import trace
from toolchain.capacity.load import Load
from toolchain.capacity.trace import read_trace
from toolchain.errors import DataError

TIMES = [0.25 * number for number in range(300)]


def lines(values):
    return "".join(f"{value}\n" for value in values)


def write(folder, text, name="trace.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("trace.txt", lines(TIMES), None),
        ("trace", "\ufeff" + lines(TIMES).replace("\n", "\r\n\r\n"), None),
        ("trace.csv", "time\n" + lines(TIMES), None),
        ("trace.csv", "user,time\n" + lines(f"u{time},{time}" for time in TIMES), None),
        ("trace.csv", "started,ended\n" + lines(f"{time},0" for time in TIMES), "started"),
        ("trace.tsv", "only\n" + lines(TIMES), None),
        ("trace.jsonl", lines(json.dumps({"timestamp": time, "path": "/"}) for time in TIMES), None),
        ("trace.jsonl", lines(json.dumps({"at": str(time)}) for time in TIMES), "at"),
        ("trace.txt.gz", gzip.compress(lines(TIMES).encode()), None),
    ],
)
def test_a_trace_has_lines_or_a_column(tmp_path, name, text, column):
    assert read_trace(write(tmp_path, text, name), column).tolist() == TIMES


def test_a_trace_begins_at_its_first_arrival(tmp_path):
    start = 1_790_000_000
    arrivals = read_trace(write(tmp_path, lines(start + time for time in TIMES)))
    assert arrivals == pytest.approx(TIMES, abs=1e-6)


REST = lines(TIMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 arrivals"),
        (lines(TIMES[:150]), "has 150 arrivals, but the p99 of a trace needs at least 200"),
        (REST + "nan\n", "arrival 301: 'nan' is not a time in seconds"),
        (REST + "inf\n", "arrival 301: 'inf' is not a time in seconds"),
        (REST + "1e999\n", "arrival 301: '1e999' is not a time in seconds"),
        (REST + "1e12\n", "arrival 301: '1e12' is not a time in seconds"),
        ("-1\n" + REST, "arrival 1: '-1' is not a time in seconds"),
        (REST + "3\n", "arrival 301: 3 is earlier than the arrival before it"),
        ("noon\n" + REST, "arrival 1: 'noon' is not a time in seconds"),
        ("2026-01-01T00:00:00\n" + REST, "is not a time in seconds"),
        ("5\n" * 300, "have the same time"),
        (b"\x00\x01\x02\n" + REST.encode(), "is not a time in seconds"),
        (b"\x89PNG\xff\xfe\n" + REST.encode(), "is not UTF-8"),
        ("1" * 5000 + "\n" + REST, "is not a time in seconds"),
    ],
)
def test_a_wrong_trace_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("t.csv", "a,b\n1,2\n", None, "The column of the arrivals .* is unclear"),
        ("t.csv", "time,arrival\n1,2\n", None, "The column of the arrivals .* is unclear"),
        ("t.csv", "a,b\n1,2\n", "c", "has no column 'c'"),
        ("t.csv", "time,time\n1,2\n", "time", "2 columns with the name 'time'"),
        ("t.csv", "time\n1,2\n", None, "number of fields is 2"),
        ("t.csv", "", None, "is unclear"),
        ("t.jsonl", '{"time": [1]}\n', None, "is not a time"),
        ("t.jsonl", '{"time": true}\n', None, "is not a time"),
        ("t.jsonl", '{"time": null}\n', None, "is not a time"),
        ("t.jsonl", f'{{"time": {"9" * 400}}}\n', None, "is not a time"),
        ("t.jsonl", f'{{"time": {"9" * 5000}}}\n', None, "is not JSON"),
        ("t.jsonl", "[1]\n", None, "not a JSON object"),
        ("t.parquet", "no parquet", None, "cannot be read"),
        ("t.txt", REST, "time", "has plain lines, and so no column 'time'"),
    ],
)
def test_a_wrong_column_is_refused(tmp_path, name, text, column, message):
    with pytest.raises(DataError, match=message):
        read_trace(write(tmp_path, text, name), column)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(str(tmp_path / "missing.txt"))


def test_a_huge_trace_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "MOST_ARRIVALS", 250)
    with pytest.raises(DataError, match="more than 250 arrivals"):
        read_trace(write(tmp_path, REST + "no time, but nobody reads this far\n"))


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("toolchain.data.tables.MAX_ROW_SIZE", 1000)
    with pytest.raises(DataError, match="more than"):
        read_trace(write(tmp_path, "1" * 2000))


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=300), ending=st.sampled_from([".txt", ".csv", ".jsonl", ".tsv", ".txt.gz"]))
def test_any_bytes_are_a_trace_or_an_error(tmp_path_factory, content, ending):
    folder = tmp_path_factory.getbasetemp()
    with pytest.raises(DataError):  # at most 300 bytes are less than 200 arrivals
        read_trace(write(folder, content, f"any{ending}"))


@settings(deadline=None)
@given(seed=st.integers(0, 99), replicas=st.integers(1, 50))
def test_each_arrival_of_a_trace_goes_to_one_replica(seed, replicas):
    load = Load.of_trace(np.array(TIMES))
    parts = load.of_replicas(replicas, 10, np.random.default_rng(seed))
    assert sorted(time for part in parts for time in part) == TIMES
    assert all((np.diff(part) >= 0).all() for part in parts)
    assert len(parts) <= replicas


@settings(deadline=None)
@given(qps=st.floats(0.01, 1e6))
def test_a_rate_stretches_the_trace(qps):
    load = Load.of_trace(np.array(TIMES), qps)
    assert load.qps == qps
    assert (len(TIMES) - 1) / load.trace_s[-1] == pytest.approx(qps)
    assert Load.of_trace(np.array(TIMES)).qps == pytest.approx(4)


@settings(deadline=None)
@given(qps=st.floats(0.1, 1e5), replicas=st.integers(1, 100))
def test_a_random_part_of_random_arrivals_has_its_share_of_the_rate(qps, replicas):
    (part,) = Load(qps).of_replicas(replicas, 4000, np.random.default_rng(3))
    assert len(part) == 4000
    assert part[-1] * qps / replicas == pytest.approx(4000, rel=0.1)
