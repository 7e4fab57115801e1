"""Tests of folders as data: Parquet files, and data sets that `save_to_disk` wrote."""

import json
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from toolchain.data import columnar, folders, tables
from toolchain.data.files import Texts
from toolchain.data.inputs import TrainingSource, load
from toolchain.data.labels import LabelSet
from toolchain.errors import DataError

LABELS = LabelSet(("POSITIVE", "NEGATIVE"))  # the data set has the same names in the other order
FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
)


def make_data(name, rows=6):
    body = {"text": [f"{name} {i}" for i in range(rows)], "label": [i % 2 for i in range(rows)]}
    return datasets.Dataset.from_dict(body, features=FEATURES)


@pytest.fixture
def saved(tmp_path):
    """The folder of a data set in two Arrow files."""
    make_data("row").save_to_disk(tmp_path / "saved", num_shards=2)
    return tmp_path / "saved"


def test_a_saved_data_set_is_data_with_class_names(saved):
    data = load(str(saved), LABELS)
    assert data.name == "saved"
    assert data.texts == tuple(f"row {i}" for i in range(6))
    assert data.labels == (1, 0, 1, 0, 1, 0)
    assert list(Texts(str(saved)).read()) == list(data.texts)
    assert TrainingSource(str(saved)).read().column.classes == ("negative", "positive")
    with pytest.raises(DataError, match="has the labels negative, positive; the model has a, b"):
        load(str(saved), LabelSet(("a", "b")))


@pytest.mark.parametrize("feature", [[FEATURES["label"]], datasets.Sequence(FEATURES["label"])], ids=str)
def test_class_names_of_lists_are_known(tmp_path, feature):
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    datasets.Dataset.from_dict({"text": ["a b"], "label": [[1, 0]]}, features=features).save_to_disk(tmp_path / "saved")
    assert load(str(tmp_path / "saved"), LabelSet(LABELS.names, "multi_label_classification")).labels == (3,)


def test_parquet_files_are_read_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("b", "a"):
        make_data(name, 2).to_parquet(folder / f"{name}.parquet")
    (folder / "README.md").write_text("not data")
    data = load(str(folder), LABELS)
    assert data.texts == ("a 0", "a 1", "b 0", "b 1")
    assert data.labels == (1, 0, 1, 0) == load(str(folder / "a.parquet"), LABELS).labels * 2


def test_a_split_is_chosen_as_for_hub_datasets(tmp_path):
    folder = tmp_path / "reviews"
    datasets.DatasetDict(train=make_data("train", 30), test=make_data("test")).save_to_disk(folder)
    source = TrainingSource(str(folder))
    assert source.read().texts[0] == "train 0"
    assert source.read().name == "reviews"
    assert source.digest != TrainingSource(str(folder), split="test").digest
    assert load(str(folder), LABELS, split="test").texts[0] == "test 0"
    assert len(load(str(folder), LABELS, split="held-out").texts) == 3
    assert next(iter(Texts(str(folder / "test")).read())) == "test 0"
    with pytest.raises(DataError, match=r"has no split 'validation'. Its splits: train, test. Choose .* --split"):
        load(str(folder), LABELS)
    with pytest.raises(DataError, match=r"has the splits train, test. Name the folder of one split: .*reviews/train"):
        Texts(str(folder)).count()


def test_the_digest_covers_every_file(saved):
    digest = Texts(str(saved)).digest
    part = saved / "data-00001-of-00002.arrow"
    part.write_bytes(part.read_bytes().replace(b"row 5", b"row x"))
    assert Texts(str(saved)).digest != digest


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def mix_columns(folder):
    empty(folder)
    write_parquet(folder / "a.parquet", text=["a"], label=[1])
    write_parquet(folder / "b.parquet", text=["a"], stars=[1])


def mix_types(folder):
    empty(folder)
    write_parquet(folder / "a.parquet", text=["a"], label=[1])
    write_parquet(folder / "b.parquet", text=["a"], label=["POSITIVE"])


def mix_classes(folder):
    other = make_data("row").cast_column("label", datasets.ClassLabel(names=["positive", "negative"]))
    other.save_to_disk(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "data-00000-of-00001.arrow", folder / "data-00001-of-00002.arrow")


def shorten_arrow(folder):
    part = folder / "data-00001-of-00002.arrow"
    part.write_bytes(part.read_bytes()[:-100])


def remove_end_marker(folder):
    part = folder / "data-00001-of-00002.arrow"
    part.write_bytes(part.read_bytes().removesuffix(b"\xff\xff\xff\xff\0\0\0\0"))


def shorten_parquet(folder):
    empty(folder)
    write_parquet(folder / "a.parquet", text=["a"], label=[1])
    (folder / "b.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-20])


def link_outside(folder):
    part = folder / "data-00001-of-00002.arrow"
    part.rename(folder.parent / "outside.arrow")
    part.symlink_to(folder.parent / "outside.arrow")


def set_files(*names):
    def change(folder):
        state = json.loads((folder / "state.json").read_text())
        state["_data_files"] = [{"filename": name} for name in names]
        (folder / "state.json").write_text(json.dumps(state))

    return change


def set_state(**values):
    def change(folder):
        (folder / "state.json").write_text(json.dumps(json.loads((folder / "state.json").read_text()) | values))

    return change


def set_splits(splits):
    def change(folder):
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))

    return change


def break_classes(folder):
    part = folder / "data-00000-of-00002.arrow"
    part.write_bytes(part.read_bytes().replace(b'{"info": {"features"', b'{"info": {"features'.ljust(20)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty, "has neither a .parquet file nor state.json or dataset_dict.json"),
        (mix_columns, r"b\.parquet has the columns 'stars', 'text', but .*a\.parquet has 'label', 'text'"),
        (mix_types, r"The column 'label' of .*b\.parquet has another type than in .*a\.parquet"),
        (mix_classes, r"The column 'label' of .*00001.* has other class names than in .*00000"),
        (shorten_arrow, "00001-of-00002.arrow is no Arrow stream, or its end is missing"),
        (remove_end_marker, "00001-of-00002.arrow is no Arrow stream, or its end is missing"),
        (shorten_parquet, r"b\.parquet cannot be read"),
        (link_outside, "00001-of-00002.arrow is a link that leads out of the folder"),
        (set_files("../outside.arrow"), "state.json cannot be read: _data_files.0.filename"),
        (set_files(".."), "state.json cannot be read: _data_files.0.filename"),
        (set_files("none.arrow"), "none.arrow does not exist"),
        (set_files("rows.parquet"), "names rows.parquet, which is no Arrow stream"),
        (set_files(), "state.json cannot be read: _data_files: the list is empty"),
        (set_state(_indices_data_files=[{"filename": "a.arrow"}]), "_indices_data_files: the data set is a selection"),
        (set_splits(["../.."]), "dataset_dict.json cannot be read: splits.0"),
        (set_splits(["test"]), "has no split 'validation'. Its splits: test"),
        (set_splits(["validation"]), "validation does not exist"),
        (break_classes, "The class names in the metadata of .*00000-of-00002.arrow cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_folder_gives_an_error_with_a_hint(saved, change, message):
    change(saved)
    with pytest.raises(DataError, match=message) as error:
        load(str(saved), LABELS)
    assert error.value.hint
    assert "\n" not in error.value.cause


def test_a_folder_without_splits_has_no_split(saved):
    with pytest.raises(DataError, match="is a folder without splits, so it has no split 'test'"):
        load(str(saved), LABELS, split="test")


def test_the_number_of_files_is_bounded(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(folders, "MAX_FILES", 1)
    with pytest.raises(DataError, match="the list is empty, or has more than 1 items"):
        load(str(saved), LABELS)
    (tmp_path / "parts").mkdir()
    for name in "ab":
        (tmp_path / "parts" / f"{name}.parquet").touch()
    with pytest.raises(DataError, match="has more than 1 files"):
        load(str(tmp_path / "parts"), LABELS)


def write_stream(folder, table):
    folder.mkdir()
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    return str(folder)


def test_a_long_row_of_an_arrow_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROW_SIZE", 1000)
    with pytest.raises(DataError, match=r"a\.arrow, row 3: the row has more than 1,000 bytes"):
        Texts(write_stream(tmp_path / "long", pyarrow.table({"text": ["a", "b", "x" * 1001]}))).count()
    # Both rows share their bytes, so their decoded values are longer than the file.
    words = pyarrow.array(["x" * 100] * 6)
    shared = pyarrow.ListViewArray.from_arrays([0, 0], [6, 6], words)
    folder = write_stream(tmp_path / "shared", pyarrow.table({"tokens": shared}))
    monkeypatch.setattr(tables, "MAX_ROW_SIZE", 500)
    with pytest.raises(DataError, match=r"a\.arrow, row 1: the row has more than 500 bytes"):
        Texts(folder).count()


def test_an_arrow_file_above_the_memory_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "MEMORY_BYTES", 1 << 26)
    table = pyarrow.table({"text": ["a" * 2**20] * 200})
    folder = tmp_path / "saved"
    folder.mkdir()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema, options=options) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    with pytest.raises(DataError, match=r"a\.arrow (needs more than 67 MB to read|cannot be read)"):
        Texts(str(folder)).count()
