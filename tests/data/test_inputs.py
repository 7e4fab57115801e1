"""Tests of valid and invalid data files, and of the encoding of texts as token ids."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.data import inputs
from toolchain.data.datasets import Columns
from toolchain.data.encoding import Encoder, pad
from toolchain.data.inputs import TrainingSource, load
from toolchain.data.labels import LabelSet
from toolchain.errors import DataError
from toolchain.models import checkpoints

LABELS = LabelSet(("NEGATIVE", "POSITIVE"))


@pytest.fixture
def table(tmp_path):
    def write(text, name="data.csv"):
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


def test_the_embedded_set_is_sst2():
    data = inputs.load_embedded()
    assert (len(data.texts), sum(data.labels)) == (872, 444)
    assert data.texts[0] == "it 's a charming and often affecting journey ."
    assert len(inputs.load_embedded("train").texts) == 67349


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'sentence,label\n"good, really",1\nbad,0\n'),
        ("a.csv", 'label,text\nPOSITIVE,"good, really"\nnegative,bad\n'),
        ("a.tsv", "sentence\tlabel\ngood, really\t1\nbad\t0\n"),
    ],
)
def test_load_reads_csv_and_tsv_with_label_indices_or_names(table, name, text):
    data = load(table(text, name), LABELS)
    assert (data.texts, data.labels) == (("good, really", "bad"), (1, 0))


def test_load_reads_gzip(tmp_path):
    file = tmp_path / "a.tsv.gz"
    file.write_bytes(gzip.compress(b"sentence\tlabel\ngood\t1\n"))
    assert load(str(file), LABELS).texts == ("good",)


def test_texts_that_look_like_null_or_numbers_stay_texts(table):
    data = load(table("sentence,label\nnull,1\nNA,0\nnan,1\n,0\n42,1\n"), LABELS)
    assert data.texts == ("null", "NA", "nan", "", "42")
    numbers = load(table("sentence,label\n007,1\n1.50,0\nTRUE,1\nwords,0\n"), LABELS)
    assert numbers.texts == ("007", "1.50", "TRUE", "words")


@pytest.mark.parametrize("name", ["reviews [1].csv", "rev*.csv", "a::b.csv", "DATA.CSV"])
def test_a_file_name_is_not_read_as_a_pattern(table, name):
    table("sentence,label\nanother,0\n", "reviews.csv")
    assert load(table("sentence,label\ngood,1\n", name), LABELS).texts == ("good",)


@pytest.mark.parametrize(
    ("labels", "column", "indices"),
    [
        (("1", "2", "3"), "123", (0, 1, 2)),
        (("1", "2", "3"), "012", (0, 1, 2)),
        (("X", "x"), "xX", (1, 0)),
        (("No", "Yes"), ("yes", "NO"), (1, 0)),
        (("0", "1"), "01", (0, 1)),
    ],
)
def test_a_label_column_holds_either_names_or_indices(table, labels, column, indices):
    rows = "".join(f"text,{label}\n" for label in column)
    assert load(table("sentence,label\n" + rows), LabelSet(labels)).labels == indices


def test_labels_that_can_be_names_or_indices_are_refused(table):
    with pytest.raises(DataError, match="both names and indices of the model's labels"):
        load(table("sentence,label\na,1\nb,2\n"), LabelSet(("1", "2", "3")))


def test_an_unclosed_quote_ends_with_its_row(table):
    data = load(table('sentence\tlabel\n"unclosed\t1\nnext\t0\n', "a.tsv"), LABELS)
    assert data.texts == ('"unclosed', "next")


def test_options_can_name_the_columns(table):
    file = table("review,stars\ngood,1\n")
    assert load(file, LABELS, Columns("review", "stars")).labels == (1,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence,label\ngood,1\nbad,2\n", "row 2: the label '2' is not one of the model's"),
        ("sentence,label\ngood,1\nbad,meh\n", "row 2: the label 'meh'"),
        ("sentence,label\ngood,POSITIVE\nbad,0\n", "row 1: the label 'POSITIVE'.*Use only names, or only indices"),
        (
            "sentence,label\na film, really,0\nanother, really,1\n",
            "row 1: the number of fields is 3 instead of 2.*Quote texts that contain commas",
        ),
        ("sentence,label\ngood,1\nbad,\n", "row 2: the label ''"),
        ("sentence,label\ngood,-1\n", "labels are not public"),
        ("sentence,label\n", "has no rows"),
        ("", "none of the columns 'sentence', 'text', 'tokens'. Its columns: none"),
        ("a,b\n1,2\n", "none of the columns 'sentence', 'text', 'tokens'. Its columns: 'a', 'b'"),
        ("sentence,b\n1,2\n", "no column 'label'"),
        ("sentence,label\ngood,1\nbad,0,extra\n", "row 2: the number of fields is 3 instead of 2"),
        ("sentence,label\ncafé,1\n".encode("latin-1"), "not UTF-8.*iconv -f LATIN1"),
    ],
)
def test_bad_data_gives_an_error_with_a_hint(table, text, message):
    with pytest.raises(DataError, match=message) as error:
        load(table(text), LABELS)
    assert error.value.hint


def test_a_missing_file_or_unknown_format_is_refused(table, tmp_path):
    with pytest.raises(DataError, match="is none of"):
        load(table("x", "a.txt"), LABELS)
    with pytest.raises(DataError, match="There is no file"):
        load(str(tmp_path / "nowhere.csv"), LABELS)


def test_a_missing_column_gives_an_error(table):
    with pytest.raises(DataError, match=r"no column 'review'.*--text-column"):
        load(table("sentence,label\ngood,1\n"), LABELS, Columns("review"))


def test_a_model_of_other_labels_needs_its_own_data():
    lower_case, generic_names = LabelSet(("negative", "positive")), LabelSet(("LABEL_0", "LABEL_1"))
    assert load(None, lower_case).labels == load(None, generic_names).labels
    for labels in (("POSITIVE", "NEGATIVE"), ("NO", "YES"), ("a", "b", "c")):
        with pytest.raises(DataError, match="--data FILE"):
            load(None, LabelSet(labels))


def test_the_digest_depends_on_texts_and_labels_alone(table):
    data = load(table("sentence,label\na,1\n"), LABELS)
    assert data.sha256 == load(table("text,label\na,POSITIVE\n"), LABELS).sha256
    assert data.sha256 != load(table("sentence,label\na,0\n"), LABELS).sha256


def test_the_encoder_gives_the_tokens_of_transformers():
    from transformers import AutoTokenizer

    encoder = Encoder.open(checkpoints.REFERENCE, ("input_ids", "attention_mask"), 512)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.REFERENCE)
    texts = ["", "Hello, World!", "café naïve 🎬 \u200b", "word " * 1000, *inputs.load_embedded().texts[:50]]
    assert encoder.encode(texts) == tokenizer(texts, truncation=True, max_length=512)["input_ids"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_jsonl_and_parquet_give_the_same_rows(tmp_path, kind):
    import json

    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "good, really", "label": 1, "x": 0}, {"text": "bad", "label": 0, "x": 0}]
    file = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    data = load(str(file), LABELS)
    assert (data.texts, data.labels) == (("good, really", "bad"), (1, 0))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "POSITIVE"}\n', "row 2: the label is text, but"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": true}\n', "row 2: the label is true or false"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "row 2: the label is nothing"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', "row 1: the label '0.5' is not one of"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "row 1: the label is nan"),
        ("a.jsonl", '{"text": "a", "label": [[1]]}\n', r"row 1: the label is \[\[1\]\]"),
        ("a.jsonl", '{"text": null, "label": 1}\n', "row 1: the column 'text' holds no text"),
        ("a.jsonl", "[1]\n", "row 1: the line is not a JSON object"),
        ("a.csv", "text,label,text\na,1,b\n", "2 columns with the name 'text'.*Rename or remove one"),
        ("a.csv", "text,label,label\na,1,0\n", "2 columns with the name 'label'"),
        ("a.parquet", "PAR1", "cannot be read"),
        ("a.csv.gz", "no gzip", "cannot be read"),
    ],
)
def test_bad_rows_of_any_format_give_an_error_with_a_hint(table, name, text, message):
    with pytest.raises(DataError, match=message) as error:
        load(table(text, name), LABELS)
    assert error.value.hint


def test_a_duplicate_column_that_is_not_used_is_ignored(table):
    assert load(table("text,label,x,x\na,1,,\n"), LABELS).labels == (1,)


def test_pairs_are_read_and_tokenised_as_transformers_does(table):
    from transformers import AutoTokenizer

    data = load(table("a,b,label\nis it?,it is,1\nhe ran,he sat,0\n"), LABELS, Columns("a", "label", "b"))
    assert data.texts == (("is it?", "it is"), ("he ran", "he sat"))
    assert data.has_pairs
    names = ("input_ids", "attention_mask", "token_type_ids")
    encoder = Encoder.open(checkpoints.REFERENCE, names, 16)
    pairs = [*data.texts, ("a long text " * 20, "short"), ("short", "a long text " * 20), ("", "")]
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.REFERENCE, model_input_names=list(names))
    expected = tokenizer([first for first, _ in pairs], [second for _, second in pairs], truncation=True, max_length=16)
    rows = encoder.encode(pairs)
    assert rows == expected["input_ids"]
    for left in (False, True):
        batch = pad(rows, names, 0, left)
        for row, mask, types in zip(
            batch["token_type_ids"], batch["attention_mask"], expected["token_type_ids"], strict=True
        ):
            assert list(row[mask == 1]) == types
            assert not row[mask == 0].any()
    with pytest.raises(DataError, match=r"no column 'c'.*--text-pair-column"):
        load(table("a,b,label\nx,y,1\n"), LABELS, Columns("a", "label", "c"))


def test_the_split_held_out_has_the_rows_that_training_leaves_out(table):
    file = table("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(40)))
    held_out = load(file, LABELS, split="held-out")
    training_rows, held_out_rows = inputs.hold_out(load(file, LABELS))
    assert len(held_out.texts) == len(held_out_rows) == 4
    assert not set(held_out.texts) & {f"text {i}" for i in training_rows}
    with pytest.raises(DataError, match="is a file, which has no split 'test'"):
        load(file, LABELS, split="test")
    with pytest.raises(DataError, match="The embedded SST-2 has no split 'test'"):
        load(None, LABELS, split="test")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working folder with a local imitation of `nyu-mll/glue`, which `datasets` reads like the hub dataset."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "nyu-mll" / "glue"
    for split, rows in {"train": 30, "validation": 4}.items():
        features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
        body = {"sentence": [f"{split} {i}" for i in range(rows)], "label": [i % 2 for i in range(rows)]}
        data = datasets.Dataset.from_dict(body, features=datasets.Features(features))
        (folder / "sst2").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / "sst2" / f"{split}-00000-of-00001.parquet")
    split_list = "".join(f"  - split: {split}\n    path: sst2/{split}-*\n" for split in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{split_list}---\n")
    monkeypatch.chdir(tmp_path)
    return folder


def test_load_reads_data_sets_of_the_hub(hub):
    assert load("glue/sst2", LABELS).texts == tuple(f"validation {i}" for i in range(4))
    assert load("nyu-mll/glue:sst2", LABELS, split="train").labels[:3] == (0, 1, 0)
    # the data set has the same label names as the model, in another order
    assert load("glue/sst2", LabelSet(("POSITIVE", "NEGATIVE"))).labels == (1, 0, 1, 0)
    source = TrainingSource("glue/sst2")
    assert len(source.load(LABELS).texts) == 30
    assert source.digest == TrainingSource("glue/sst2").digest != TrainingSource("glue/sst2", split="validation").digest
    with pytest.raises(DataError, match=r"has the labels negative, positive; the model has a, b, c"):
        load("glue/sst2", LabelSet(("a", "b", "c")))
    with pytest.raises(DataError, match=r"split test, cannot be loaded.*--split"):
        load("glue/sst2", LABELS, split="test")
    with pytest.raises(DataError, match=r"no column 'text'.*--text-column"):
        load("glue/sst2", LABELS, Columns("text"))


def test_a_missing_data_set_gives_an_error_with_an_alternative(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Without a network, use a cached dataset or pass a file"):
        load("somebody/no-such-data", LABELS)


rows = st.lists(st.lists(st.integers(1, 30000), min_size=1, max_size=40), min_size=1, max_size=8)


@given(rows, st.booleans())
def test_pad_keeps_every_token_and_masks_padding(ids, left):
    batch = pad(ids, ("input_ids", "attention_mask", "token_type_ids"), 0, left)
    width = max(map(len, ids))
    for name in batch:
        assert batch[name].shape == (len(ids), width)
        assert batch[name].dtype == np.int64
    for row, tokens, mask in zip(ids, batch["input_ids"], batch["attention_mask"], strict=True):
        assert list(tokens[mask == 1]) == row
        assert not tokens[mask == 0].any()
        sorted_mask = mask if left else mask[::-1]
        assert list(sorted_mask) == sorted(sorted_mask)
    assert not batch["token_type_ids"].any()


def test_rows_inside_held_out_texts_are_excluded(tmp_path):
    file = tmp_path / "rows.csv"
    texts = ["a good film", "good", "good  film", "a bad film", "bad", "film", "a good", "goo", "is a good film", "x"]
    file.write_text("".join(["sentence,label\n", *(f"{text},{index % 2}\n" for index, text in enumerate(texts))]))
    labels = LabelSet(("NEGATIVE", "POSITIVE"), "single_label_classification")
    data = TrainingSource(str(file)).load(labels)
    apart = inputs.exclude_overlaps(data, range(1, len(texts)), [0])
    assert [data.texts[row] for row in apart] == ["a bad film", "bad", "is a good film", "x"]
