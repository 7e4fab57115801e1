"""Tests of `predict`, which scores the texts of a file: formats, row order, unusual texts, errors and resumed runs."""

import csv
import dataclasses
import functools
import io
import itertools
import json
import random
import re
import sys
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain import predict as predicting
from toolchain.backends import Place, open_session
from toolchain.data import encoding, inputs
from toolchain.data.encoding import CHARACTERS_PER_TOKEN, Encoder, pad
from toolchain.data.files import Texts
from toolchain.data.writing import open_writer
from toolchain.errors import ArtifactError, DataError, UnknownVariantError, VerdictError
from toolchain.predict import PART_TEXTS, load_bundle_model, load_variant_model, predict
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.shipping import Order

HOSTILE = [
    "",
    " ",
    'a "quoted", text; with\ttab',
    "NUL \0 inside",
    "line\u2028separator and \x85 next line",
    "Ünïcödé 🎬 文字",
    "=1+1",
    "null",
    "007",
]
COLUMNS = ["text", "prediction", "score_NEGATIVE", "score_POSITIVE"]


def quiet(line):
    pass


@pytest.fixture(scope="module")
def model(built_tiny):
    return load_variant_model(built_tiny, "onnx-fp32", quiet, no_bar)


def write_texts(path, texts, column="text"):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts}), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["id", column], *enumerate(texts)])
    else:
        path.write_text("".join(f"{text}\n" for text in texts))
    return path


def read_scores(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def expected_scores(model, texts):
    """Yields the expected output row of each text; the model's tokenizer and session process one text at a time."""
    session = open_session(model.path, "onnx", Place("cpu", 1))
    for text in texts:
        row = model.encoder.tokenizer.encode(text).ids
        logits = session.run(pad([row], model.encoder.names, model.encoder.pad_id))[0].astype(float)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        yield text, model.labels[int(probabilities.argmax())], *probabilities


@pytest.mark.parametrize("output_kind", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("input_kind", [".csv", ".jsonl", ".parquet"])
def test_every_text_is_scored_in_order(model, tmp_path, input_kind, output_kind):
    texts = [*HOSTILE, *inputs.load_embedded().sample(40, 3)]
    source, target = write_texts(tmp_path / f"in{input_kind}", texts), tmp_path / f"out{output_kind}"
    assert predict(model, Texts(str(source)), target, quiet, no_bar) == len(texts)
    rows = read_scores(target)
    assert list(rows[0]) == COLUMNS
    for row, (text, label, *probabilities) in zip(rows, expected_scores(model, texts), strict=True):
        assert (row["text"], row["prediction"]) == (text, label)
        assert [float(row[name]) for name in COLUMNS[2:]] == pytest.approx(probabilities, abs=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, target.name])


def test_plain_lines_and_standard_input_are_texts(model, tmp_path, monkeypatch, capsys):
    texts = ["a film", "", "  spaces stay  ", "no, end"]
    (tmp_path / "in.txt").write_text("\n".join(texts))  # the last line has no line break
    assert list(Texts(str(tmp_path / "in.txt")).read()) == texts
    stream = io.TextIOWrapper(io.BytesIO("a film\r\nein schöner Film\n".encode()), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", stream)
    assert predict(model, Texts("-"), None, quiet, no_bar) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["a film", "ein schöner Film"]
    assert not stream.closed


def test_an_option_can_name_the_column(model, tmp_path):
    source = write_texts(tmp_path / "in.csv", ["good", "bad"], column="review")
    with pytest.raises(
        DataError, match=r"none of the columns 'sentence', 'text', 'tokens'. Its columns: 'id', 'review'"
    ):
        list(Texts(str(source)).read())
    assert list(Texts(str(source), "review").read()) == ["good", "bad"]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_written_texts_can_be_read_back(tmp_path, texts):
    for kind in (".jsonl", ".csv", ".parquet"):
        path = tmp_path / f"out{kind}"
        with open_writer(path, ["text", "score_A"]) as write:
            write([{"text": text, "score_A": 0.5} for text in texts])
        assert list(Texts(str(path)).read()) == texts, kind


def write_unreadable(folder, case):
    """Writes a file that cannot be read; returns the file and the expected message."""
    file = folder / {"parquet": "a.parquet", "jsonl": "a.jsonl"}.get(case.split()[0], "a.csv")
    if case == "parquet column":
        pyarrow.parquet.write_table(pyarrow.table({"review": ["a"]}), file)
        return file, r"none of the columns 'sentence', 'text', 'tokens'. Its columns: 'review'"
    if case == "parquet numbers":
        pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), file)
        return file, "row 1: the column 'text' holds no text"
    if case == "parquet null":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), file)
        return file, "row 2: the column 'text' holds no text"
    content, message = {
        "parquet not one": (b"PAR1 nothing", "cannot be read"),
        "jsonl array": (b"[1]\n", "row 1: the line is not a JSON object"),
        "jsonl broken": (b'{"text": "a"}\n{"text": \n', r"row 2: the line is not JSON"),
        "jsonl number": (b'{"text": 5}\n', "row 1: the column 'text' holds no text"),
        "csv fields": (b"text,label\ngood,1\nbad\n", "row 2: the number of fields is 1 instead of 2"),
        "csv quote": (b'text,label\n"good,1\n', "line 2"),
        "csv empty": (b"", "Its columns: none"),
        "csv latin-1": ("text\nschön\n".encode("latin-1"), "is not UTF-8"),
        "csv missing": (None, "No such file"),
    }[case]
    if content is not None:
        file.write_bytes(content)
    return file, message


UNREADABLE = ["parquet column", "parquet numbers", "parquet null", "parquet not one", "jsonl array", "jsonl broken"]
UNREADABLE += ["jsonl number", "csv fields", "csv quote", "csv empty", "csv latin-1", "csv missing"]


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_file_gives_an_error_with_its_row(model, tmp_path, case):
    file, message = write_unreadable(tmp_path, case)
    with pytest.raises(DataError, match=message):
        predict(model, Texts(str(file)), tmp_path / "out.csv", quiet, no_bar)
    assert not (tmp_path / "out.csv").exists()


def test_plain_lines_have_no_columns(model, tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    with pytest.raises(DataError, match="Leave out the options"):
        list(Texts(str(tmp_path / "in.txt"), "text").read())


def test_an_output_that_exists_or_has_no_format_is_refused(model, tmp_path):
    source = write_texts(tmp_path / "in.csv", ["good"])
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(ArtifactError, match=r"out\.csv exists"):
        predict(model, Texts(str(source)), tmp_path / "out.csv", quiet, no_bar)
    assert (tmp_path / "out.csv").read_text() == "mine"
    with pytest.raises(DataError, match="is none of"):
        predict(model, Texts(str(source)), tmp_path / "out.xlsx", quiet, no_bar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_an_output_that_appears_during_the_run_is_not_replaced(model, tmp_path):
    source, output = write_texts(tmp_path / "in.csv", ["good"]), tmp_path / "out.csv"

    def engine(*arguments):
        yield from predicting.score_locally(*arguments)
        output.write_text("mine")

    with pytest.raises(ArtifactError, match=r"out\.csv exists"):
        predict(model, Texts(str(source)), output, quiet, no_bar, engine)
    assert output.read_text() == "mine"
    output.unlink()
    lines = []
    assert predict(model, Texts(str(source)), output, lines.append, no_bar) == 1
    assert "1 texts are already scored" in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "out.csv"]


class InterruptedSession:
    """A session that raises KeyboardInterrupt after a number of batches and counts the scored sentences."""

    def __init__(self, session, batches):
        self.session, self.left, self.answered = session, batches, 0

    def run(self, batch):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.answered += len(batch["input_ids"])
        return self.session.run(batch)

    def close(self):
        self.session.close()


def test_a_broken_row_gives_an_error_before_scoring(model, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' * (PART_TEXTS + 1) + "broken\n")
    monkeypatch.setattr(predicting, "open_session", lambda *a: pytest.fail("it was opened"))
    for output in (tmp_path / "out.csv", None):
        with pytest.raises(DataError, match=f"row {PART_TEXTS + 2}"):
            predict(model, Texts(str(tmp_path / "in.jsonl")), output, quiet, no_bar)


def test_the_same_command_resumes_an_interrupted_run(model, tmp_path, monkeypatch):
    texts = [f"film {i}" for i in range(2 * PART_TEXTS + 100)]
    source = write_texts(tmp_path / "in.csv", texts)
    sessions = []

    def open_with_limit(batches):
        def open_one(*arguments):
            sessions.append(InterruptedSession(open_session(*arguments), batches))
            return sessions[-1]

        monkeypatch.setattr(predicting, "open_session", open_one)

    open_with_limit(-(-PART_TEXTS // 32) + 3)
    with pytest.raises(KeyboardInterrupt):
        predict(model, Texts(str(source)), tmp_path / "out.csv", quiet, no_bar)
    assert not (tmp_path / "out.csv").exists()
    open_with_limit(-1)
    lines = []
    assert predict(model, Texts(str(source)), tmp_path / "out.csv", lines.append, no_bar) == len(texts)
    assert lines == [f"{tmp_path / 'out.csv'}: {PART_TEXTS} texts are already scored"]
    assert sessions[-1].answered == len(texts) - PART_TEXTS
    assert [row["text"] for row in read_scores(tmp_path / "out.csv")] == texts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "out.csv"]


@pytest.mark.parametrize("change", ["texts", "model", "column"])
def test_a_run_with_other_inputs_is_not_resumed(built_tiny, model, tmp_path, monkeypatch, change):
    texts = [f"film {i}" for i in range(PART_TEXTS + 10)]
    source = write_texts(tmp_path / "in.csv", texts)
    monkeypatch.setattr(
        predicting, "open_session", lambda *a: InterruptedSession(open_session(*a), -(-PART_TEXTS // 32))
    )
    with pytest.raises(KeyboardInterrupt):
        predict(model, Texts(str(source)), tmp_path / "out.csv", quiet, no_bar)
    monkeypatch.undo()
    if change == "texts":
        write_texts(source, texts[::-1])
    chosen_model = load_variant_model(built_tiny, "onnx-int8", quiet, no_bar) if change == "model" else model
    lines = []
    chosen_texts = Texts(str(source), "text" if change == "column" else None)
    assert predict(chosen_model, chosen_texts, tmp_path / "out.csv", lines.append, no_bar) == len(texts)
    assert lines == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(model, tmp_path):
    peaks = []
    for count in (2 * PART_TEXTS, 8 * PART_TEXTS):
        source = write_texts(tmp_path / f"in{count}.csv", [f"a film of some {i} words" for i in range(count)])
        tracemalloc.start()
        predict(model, Texts(str(source)), tmp_path / f"out{count}.parquet", quiet, no_bar)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize("kind", [".txt", ".csv", ".jsonl"])
def test_predict_scores_a_text_of_ten_megabytes(model, tmp_path, kind):
    text = "a long and winding film " * 437_000
    source = write_texts(tmp_path / f"in{kind}", ["short", text, "short"])
    assert predict(model, Texts(str(source)), tmp_path / "out.jsonl", quiet, no_bar) == 3
    rows = read_scores(tmp_path / "out.jsonl")
    assert [len(row["text"]) for row in rows] == [5, len(text), 5]
    expected_row = next(expected_scores(model, [text[:20_000]]))
    assert rows[1]["score_POSITIVE"] == pytest.approx(expected_row[3], abs=1e-4)


def test_a_run_with_other_windows_resumes(model, tmp_path, monkeypatch):
    texts = [f"film {'long ' * (i % 7)}{i}" for i in range(120)]
    source = write_texts(tmp_path / "in.csv", texts)
    monkeypatch.setattr(predicting, "WINDOW_CHARACTERS", 300)

    def stop_after_two_windows(*arguments):
        yield from itertools.islice(predicting.score_locally(*arguments), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, Texts(str(source)), tmp_path / "out.csv", quiet, no_bar, stop_after_two_windows)
    monkeypatch.setattr(predicting, "WINDOW_CHARACTERS", 1000)
    lines = []
    assert predict(model, Texts(str(source)), tmp_path / "out.csv", lines.append, no_bar) == len(texts)
    scored = int(re.search(r"(\d+) texts are already scored", lines[0])[1])
    assert 20 < scored < 60
    assert [row["text"] for row in read_scores(tmp_path / "out.csv")] == texts


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_an_option_protects_spreadsheets_against_formulas(model, tmp_path, kind):
    texts = ["=1+1", "+a", "-a", "@a", "\ta", "\ra", "a=1"]
    source = write_texts(tmp_path / "in.jsonl", texts)
    formulas_stay = functools.partial(predict, dataclasses.replace(model, labels=("=bad()", "@good")))
    plain, escaped = tmp_path / f"plain{kind}", tmp_path / f"escaped{kind}"
    formulas_stay(Texts(str(source)), plain, quiet, no_bar)
    formulas_stay(Texts(str(source)), escaped, quiet, no_bar, escape_formulas=True)
    assert [row["text"] for row in read_scores(plain)] == texts
    assert [row["text"] for row in read_scores(escaped)] == [f"'{text}" for text in texts[:-1]] + ["a=1"]
    assert {row["prediction"] for row in read_scores(escaped)} <= {"'=bad()", "'@good"}
    for before, after in zip(read_scores(plain), read_scores(escaped), strict=True):
        assert [before[name] for name in before if "score" in name] == [
            after[name] for name in after if "score" in name
        ]


@pytest.mark.parametrize("output", [(), ("--output", "out.jsonl"), ("--output", "out.parquet")])
def test_only_a_spreadsheet_format_takes_the_option_for_formulas(say, output):
    code, _, err = say("predict", "onnx-fp32", "in.csv", "--escape-formulas", *output)
    assert code == 2
    assert "--escape-formulas needs --output with a .csv or .tsv file" in err


def test_json_on_standard_output_has_escapes_for_control_characters(model, tmp_path, capsys):
    texts = ["\x1b[2J\x9b31m\u202e", "naïve 🎬"]
    predict(model, Texts(str(write_texts(tmp_path / "in.jsonl", texts))), None, quiet, no_bar)
    output = capsys.readouterr().out
    assert [json.loads(line)["text"] for line in output.splitlines()] == texts
    assert not set("\x1b\x9b\u202e") & set(output)
    assert "naïve 🎬" in output


PIECES = ["word ", "x" * 150 + " ", "\n", "文字", "naïve ", "...", "\t", "y" * 40]


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_start_of_a_long_text_gives_the_same_first_tokens(model, seed):
    """Compares the tokens of a text that `Encoder` cuts with the first tokens of the whole text."""
    rng = random.Random(seed)
    encoder = Encoder(model.encoder.folder, model.encoder.tokenizer, model.encoder.names, 0, 16)
    encoder.tokenizer.enable_truncation(16)
    try:
        weights = [rng.random() for _ in PIECES]
        text = "".join(rng.choices(PIECES, weights, k=rng.choice([10, 300, 3000])))
        assert encoder.encode([text]) == [encoder.tokenizer.encode(text).ids]
        assert len(text) < CHARACTERS_PER_TOKEN * 16 or len(encoder._cut_text(text)) <= len(text)
    finally:
        encoder.tokenizer.enable_truncation(model.encoder.max_length)


class CountingTokenizer:
    """A tokenizer that records the number of characters of each batch."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, []

    def encode_batch_fast(self, texts):
        self.characters.append(sum(len("".join(text)) for text in texts))
        return self.tokenizer.encode_batch_fast(texts)


def test_the_encoder_tokenises_few_characters_at_a_time_and_gives_the_same_tokens(model, monkeypatch):
    texts = [f"a film of {i} words" for i in range(40)] + [("a pair", "of texts")] * 3
    expected = model.encoder.encode(texts)
    tokenizer = CountingTokenizer(model.encoder.tokenizer)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    assert dataclasses.replace(model.encoder, tokenizer=tokenizer).encode(texts) == expected
    assert max(tokenizer.characters) <= 100
    assert len(tokenizer.characters) > 5


def test_a_bundle_gives_the_predictions_of_its_variant(built_tiny, tmp_path):
    lines = []
    shipping.ship(built_tiny, Order(("onnx-fp32", "onnx-int8"), "web", demo=False), tmp_path / "b", quiet, no_bar)
    bundle = load_bundle_model(tmp_path / "b", lines.append)
    assert lines == [f"{tmp_path / 'b'}: using onnx-fp32, the first of 2 models"]
    source = write_texts(tmp_path / "in.csv", ["good", "bad"])
    predict(bundle, Texts(str(source)), tmp_path / "a.jsonl", quiet, no_bar)
    predict(
        load_variant_model(built_tiny, "onnx-fp32", quiet, no_bar),
        Texts(str(source)),
        tmp_path / "b.jsonl",
        quiet,
        no_bar,
    )
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b" / "config.json").write_text("{}")
    with pytest.raises(VerdictError):
        load_bundle_model(tmp_path / "b", quiet)


def test_an_unknown_variant_gives_an_error(built_tiny):
    with pytest.raises(UnknownVariantError):
        load_variant_model(built_tiny, "nowhere", quiet, no_bar)


def test_the_command_writes_scores_to_a_file_or_standard_output(tiny, tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "in.csv", ["good", "bad"], column="review")
    model_options = ("--model", tiny.model, "--exported", tiny.exported)
    arguments = ("predict", "torch-fp32", "in.csv", "--text-column", "review", *model_options)
    code, out, err = say(*arguments, "--output", "out.parquet")
    assert (code, out.strip()) == (0, "out.parquet"), err
    assert "2 texts scored" in err
    assert [row["text"] for row in read_scores(tmp_path / "out.parquet")] == ["good", "bad"]
    assert say(*arguments, "--output", "out.parquet")[0] == 1
    assert [json.loads(line)["text"] for line in say(*arguments)[1].splitlines()] == ["good", "bad"]


def test_a_model_with_another_number_of_labels_than_its_manifest_is_refused(tiny, tmp_path):
    (tmp_path / "t.txt").write_text("good\n")
    model = load_variant_model(tiny, "onnx-int8", lambda event: None, no_bar)
    changed = dataclasses.replace(model, labels=("A", "B", "C"))
    with pytest.raises(ArtifactError, match="gives 2 logits, but its manifest has 3 labels"):
        list(predicting.score_locally(changed, Texts(str(tmp_path / "t.txt")), 0, 10))
