"""Tests of the decoder of JSON from elsewhere: bounds for sizes, depths, numbers and texts."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

import pytest
from typing_extensions import TypedDict

from toolchain.system import decoding
from toolchain.system.decoding import Amount, Count, Line, Name, Note, Plain, decode, decode_object, open_record, strict


@open_record
class Facts(TypedDict):
    name: Line
    size: NotRequired[Count]


@strict
@dataclass(frozen=True)
class Record:
    facts: Annotated[Facts, Plain]
    name: Name = "x"
    note: Note = ""
    amount: Amount = 0.0


def decode_record(**changes):
    return decode(Record, json.dumps({"facts": {"name": "n"}, **changes}))


def test_an_open_record_keeps_unknown_keys_and_their_order():
    facts = {"b": [1, {"c": None}], "size": 2, "name": "n", "a": 0.5}
    decoded = decode_record(facts=facts).facts
    assert decoded == facts
    assert list(decoded) == list(facts)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"size": -1}, "facts.size: the number is negative"),
        ({"size": 1 << 63}, "more than 64 bits"),
        ({"name": "a\x1b[2J"}, "control character"),
        ({"other": "a\u202eb"}, "control character"),
        ({"a\nb": 1}, "control character"),
        ({"other": "x" * 1001}, "more than 1000 characters"),
        ({"other": 1e19}, "more than 64 bits"),
        ({"other": [[[[[[[1]]]]]]]}, "more than 6 levels"),
        ({"other": [0] * 200_001}, "more than 200000 parts"),
    ],
)
def test_the_keys_of_an_open_record_have_bounds(facts, message):
    with pytest.raises(ValueError, match=message):
        decode_record(facts={"name": "n", **facts})


@pytest.mark.parametrize("text", ['"NaN"', "NaN", "Infinity", "1e999", "1e16", "1e-10", "-1"])
def test_an_amount_is_finite_and_has_finite_quotients(text):
    with pytest.raises(ValueError, match="amount"):
        decode(Record, f'{{"facts": {{"name": "n"}}, "amount": {text}}}')


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\x00", "x" * 201])
def test_a_name_cannot_lead_out_of_a_folder(name):
    with pytest.raises(ValueError, match="the name is empty"):
        decode_record(name=name)


def test_a_note_loses_its_control_characters_and_keeps_its_lines():
    assert decode_record(note="a\n\x1b[2Jb").note == "a\n\ufffd[2Jb"


@pytest.mark.parametrize("read", [decode_object, lambda text: decode(dict, text)], ids=["object", "type"])
def test_long_numbers_and_deep_lists_are_refused(read):
    for text in (f'{{"a": 1{"0" * 400}}}', f'{{"a": {"[" * 100_000}}}'):
        with pytest.raises(ValueError, match=r"digits|recursion"):
            read(text)
    digits = {"text": "1" * 400, "number": int("1" * 300)}
    assert read(json.dumps(digits)) == digits


@pytest.mark.parametrize("text", ["[]", "1", "null", '{"a": "\\ud800"}', "{", "\ufeff{}", b"\xff\xfe{\x00}\x00"])
def test_only_a_json_object_is_an_object(text):
    with pytest.raises(ValueError, match=r"."):
        decode_object(text)


def test_a_large_file_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_BYTES", 10)
    (tmp_path / "small").write_bytes(b"x" * 10)
    assert decoding.read_bytes(tmp_path / "small") == b"x" * 10
    with pytest.raises(ValueError, match="the file has more than"):
        decoding.read_bytes(Path("/dev/zero"))
    with pytest.raises(ValueError, match="the JSON text has more than"):
        decode_object(" " * 11)


def test_a_text_that_does_not_end_is_refused_in_linear_time():
    started = time.monotonic()
    with pytest.raises(ValueError, match="more than 300 digits"):
        decode_object(b"1" * 301 + b'"' + b'\\"' * 10**6)
    assert time.monotonic() - started < 5  # quadratic time would be hours
