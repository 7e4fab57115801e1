"""Data files good and bad, and the arrays sentences become."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain import checkpoints, inputs
from toolchain.errors import DataError
from toolchain.inputs import Encoder, load, pad
from toolchain.labels import LabelSet
from toolchain.tables import Columns

LABELS = LabelSet(("NEGATIVE", "POSITIVE"))


@pytest.fixture
def table(tmp_path):
    def write(text, name="data.csv"):
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


def test_the_embedded_set_is_sst2():
    data = inputs.embedded()
    assert (len(data.texts), sum(data.labels)) == (872, 444)
    assert data.texts[0] == "it 's a charming and often affecting journey ."
    assert len(inputs.embedded("train").texts) == 67349


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'sentence,label\n"good, really",1\nbad,0\n'),
        ("a.csv", 'label,text\nPOSITIVE,"good, really"\nnegative,bad\n'),
        ("a.tsv", "sentence\tlabel\ngood, really\t1\nbad\t0\n"),
    ],
)
def test_csv_and_tsv_with_indices_or_names(table, name, text):
    data = load(table(text, name), LABELS)
    assert (data.texts, data.labels) == (("good, really", "bad"), (1, 0))


def test_gzip_is_read(tmp_path):
    file = tmp_path / "a.tsv.gz"
    file.write_bytes(gzip.compress(b"sentence\tlabel\ngood\t1\n"))
    assert load(str(file), LABELS).texts == ("good",)


def test_words_that_look_like_nothing_stay_words(table):
    data = load(table("sentence,label\nnull,1\nNA,0\nnan,1\n,0\n42,1\n"), LABELS)
    assert data.texts == ("null", "NA", "nan", "", "42")
    numbers = load(table("sentence,label\n007,1\n1.50,0\nTRUE,1\nwords,0\n"), LABELS)
    assert numbers.texts == ("007", "1.50", "TRUE", "words")


@pytest.mark.parametrize("name", ["reviews [1].csv", "rev*.csv", "a::b.csv", "DATA.CSV"])
def test_a_file_name_is_a_file_name(table, name):
    table("sentence,label\nanother,0\n", "reviews.csv")
    assert load(table("sentence,label\ngood,1\n", name), LABELS).texts == ("good",)


@pytest.mark.parametrize(
    ("labels", "column", "found"),
    [
        (("1", "2", "3"), "123", (0, 1, 2)),
        (("1", "2", "3"), "012", (0, 1, 2)),
        (("X", "x"), "xX", (1, 0)),
        (("No", "Yes"), ("yes", "NO"), (1, 0)),
        (("0", "1"), "01", (0, 1)),
    ],
)
def test_a_label_column_is_read_as_names_or_as_indices_never_both(table, labels, column, found):
    rows = "".join(f"text,{label}\n" for label in column)
    assert load(table("sentence,label\n" + rows), LabelSet(labels)).labels == found


def test_labels_that_could_be_either_are_not_guessed(table):
    with pytest.raises(DataError, match="names of the model's labels and indices as well"):
        load(table("sentence,label\na,1\nb,2\n"), LabelSet(("1", "2", "3")))


def test_a_stray_quote_swallows_no_rows(table):
    data = load(table('sentence\tlabel\n"unclosed\t1\nnext\t0\n', "a.tsv"), LABELS)
    assert data.texts == ('"unclosed', "next")


def test_columns_can_be_named(table):
    file = table("review,stars\ngood,1\n")
    assert load(file, LABELS, Columns("review", "stars")).labels == (1,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sentence,label\ngood,1\nbad,2\n", "row 2: the label '2' is not one of the model's"),
        ("sentence,label\ngood,1\nbad,meh\n", "row 2: the label 'meh'"),
        ("sentence,label\ngood,POSITIVE\nbad,0\n", "row 1: the label 'POSITIVE'.*all names, or all indices"),
        (
            "sentence,label\na film, really,0\nanother, really,1\n",
            "row 1: 3 fields instead of 2.*Quote texts that hold commas",
        ),
        ("sentence,label\ngood,1\nbad,\n", "row 2: the label ''"),
        ("sentence,label\ngood,-1\n", "labels are not public"),
        ("sentence,label\n", "has no rows"),
        ("", "no column 'sentence' or 'text'; it has none"),
        ("a,b\n1,2\n", "no column 'sentence' or 'text'; it has 'a', 'b'"),
        ("sentence,b\n1,2\n", "no column 'label'"),
        ("sentence,label\ngood,1\nbad,0,extra\n", "row 2: 3 fields instead of 2"),
        ("sentence,label\ncafé,1\n".encode("latin-1"), "not UTF-8.*iconv -f LATIN1"),
    ],
)
def test_bad_data_is_an_error_in_words(table, text, says):
    with pytest.raises(DataError, match=says) as error:
        load(table(text), LABELS)
    assert error.value.mend


def test_what_is_no_table_is_refused(table, tmp_path):
    with pytest.raises(DataError, match="is none of"):
        load(table("x", "a.txt"), LABELS)
    with pytest.raises(DataError, match="There is no file"):
        load(str(tmp_path / "nowhere.csv"), LABELS)


def test_a_named_column_that_is_not_there(table):
    with pytest.raises(DataError, match=r"no column 'review'.*--text-column"):
        load(table("sentence,label\ngood,1\n"), LABELS, Columns("review"))


def test_the_embedded_labels_are_not_guessed_onto_another_model():
    lower, generic = LabelSet(("negative", "positive")), LabelSet(("LABEL_0", "LABEL_1"))
    assert load(None, lower).labels == load(None, generic).labels
    for labels in (("POSITIVE", "NEGATIVE"), ("NO", "YES"), ("a", "b", "c")):
        with pytest.raises(DataError, match="--data FILE"):
            load(None, LabelSet(labels))


def test_the_digest_tells_data_apart(table):
    one = load(table("sentence,label\na,1\n"), LABELS)
    assert one.sha256 == load(table("text,label\na,POSITIVE\n"), LABELS).sha256
    assert one.sha256 != load(table("sentence,label\na,0\n"), LABELS).sha256


def test_tokens_are_those_of_transformers():
    from transformers import AutoTokenizer

    encoder = Encoder.open(checkpoints.REFERENCE, ("input_ids", "attention_mask"), 512)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.REFERENCE)
    texts = ["", "Hello, World!", "café naïve 🎬 \u200b", "word " * 1000, *inputs.embedded().texts[:50]]
    assert encoder.encode(texts) == tokenizer(texts, truncation=True, max_length=512)["input_ids"]


rows = st.lists(st.lists(st.integers(1, 30000), min_size=1, max_size=40), min_size=1, max_size=8)


@given(rows, st.booleans())
def test_padding_keeps_every_token_and_masks_the_rest(ids, left):
    batch = pad(ids, ("input_ids", "attention_mask", "token_type_ids"), 0, left)
    width = max(map(len, ids))
    for name in batch:
        assert batch[name].shape == (len(ids), width)
        assert batch[name].dtype == np.int64
    for row, tokens, mask in zip(ids, batch["input_ids"], batch["attention_mask"], strict=True):
        assert list(tokens[mask == 1]) == row
        assert not tokens[mask == 0].any()
        edge = mask if left else mask[::-1]
        assert list(edge) == sorted(edge)
    assert not batch["token_type_ids"].any()
