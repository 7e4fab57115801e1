"""Tests of tokenizers that a checkpoint stores without tokenizer.json, and of the errors about unusable tokenizers."""

import importlib.metadata
import io
import json
import shutil

import pytest
import transformers
from conftest import import_job
from tiny_architectures import make
from transformers import AutoTokenizer

from toolchain.build.pipeline import ensure
from toolchain.build.steps.importing import import_checkpoint
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.errors import CheckpointError
from toolchain.models import checkpoints
from toolchain.ship.tokenizer_graph import difficult_texts

IS_VERSION_5 = transformers.__version__.startswith("5.")
# For each architecture: the file name of its SentencePiece model, and the special tokens that the authors of the
# architecture chose when they trained the SentencePiece model.
SENTENCEPIECE = {
    "deberta-v2": (
        "spm.model",
        {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
        | {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"},
    ),
    "xlm-roberta": ("sentencepiece.bpe.model", {}),
    "albert": (
        "spiece.model",
        {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}
        | {"control_symbols": ["[CLS]", "[SEP]"], "user_defined_symbols": ["[MASK]"]},
    ),
}
PAIR = ("A naïve  film", "漢字 😀, isn't it?")


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


@pytest.fixture
def spm_checkpoint(tmp_path):
    """Returns a function: kind of model → checkpoint whose only tokenizer file is a new SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")

    def build(kind):
        name, special_tokens = SENTENCEPIECE[kind]
        folder = make(tmp_path / kind, kind)
        remove_tokenizer(folder)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(inputs.load_embedded().texts),
            model_writer=model,
            vocab_size=300,
            minloglevel=2,
            **special_tokens,
        )
        (folder / name).write_bytes(model.getvalue())
        return folder

    return build


def remove_tokenizer(folder):
    for name in checkpoints.TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def import_into(folder, checkpoint):
    folder.mkdir()
    return import_checkpoint(import_job(checkpoint, folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_sentencepiece_model_becomes_a_tokenizer_json_with_the_same_ids(spm_checkpoint, tmp_path, kind):
    folder = spm_checkpoint(kind)
    expected = AutoTokenizer.from_pretrained(folder)
    artifact = ensure(Workspace.open(str(folder), tmp_path / "out"), ["torch-fp32"], {}, lambda *_: None)["torch-fp32"]
    max_length = artifact.manifest.max_length
    encoder = Encoder.open(artifact.path, [spec.name for spec in artifact.manifest.inputs], max_length)
    reloaded = AutoTokenizer.from_pretrained(artifact.path)

    texts = [*inputs.load_embedded().texts, *difficult_texts.texts()]
    ids = expected(texts, truncation=True, max_length=max_length)["input_ids"]
    assert len({token for row in ids for token in row}) > 200  # most of the 300 tokens
    assert encoder.encode(texts) == ids
    assert reloaded(texts, truncation=True, max_length=max_length)["input_ids"] == ids
    assert encoder.encode([PAIR]) == [expected(*PAIR)["input_ids"]]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a film…", "a\u00a0film", "ｆｉｌｍ"])
def test_only_transformers_4_replaces_unusual_characters_for_deberta(spm_checkpoint, tmp_path, text):
    """docs/reference/models-and-data.md states this difference between the releases of transformers."""
    import_into(tmp_path / "out", spm_checkpoint("deberta-v2"))
    encoder = Encoder.open(tmp_path / "out", ["input_ids"], 128)
    unknown = encoder.tokenizer.token_to_id("[UNK]")
    assert (unknown in encoder.encode([text])[0]) == IS_VERSION_5


def test_a_sentencepiece_model_without_the_package_is_refused(checkpoint, tmp_path, monkeypatch):
    remove_tokenizer(checkpoint)
    (checkpoint / "spm.model").write_bytes(b"")
    requires = importlib.metadata.requires

    def refuse(package):
        if package == "sentencepiece":
            raise importlib.metadata.PackageNotFoundError(package)
        return requires(package)

    monkeypatch.setattr(importlib.metadata, "requires", refuse)
    message = r"is a SentencePiece model \(spm.model\), and sentencepiece is not installed"
    with pytest.raises(CheckpointError, match=message) as error:
        import_into(tmp_path / "out", checkpoint)
    assert "pip install 'sentencepiece" in error.value.hint


def test_a_damaged_sentencepiece_model_is_refused(checkpoint, tmp_path):
    pytest.importorskip("sentencepiece")
    remove_tokenizer(checkpoint)
    (checkpoint / "spm.model").write_text("version https://git-lfs.github.com/spec/v1\n")  # not downloaded by git
    with pytest.raises(CheckpointError, match=r"spm.model is not a SentencePiece model") as error:
        import_into(tmp_path / "out", checkpoint)
    assert error.value.hint == "Download the checkpoint again."


@pytest.mark.slow
def test_a_checkpoint_without_the_vocabulary_file_of_its_class_is_refused(spm_checkpoint, tmp_path):
    """transformers 5 loads such a tokenizer without an error, with a vocabulary of special tokens only."""
    folder = spm_checkpoint("deberta-v2")
    (folder / "spm.model").rename(folder / "spiece.model")
    message = "no spm.model, which Deberta" if IS_VERSION_5 else "transformers cannot convert its other tokenizer files"
    with pytest.raises(CheckpointError, match=f"has no tokenizer.json, and {message}") as error:
        import_into(tmp_path / "out", folder)
    assert error.value.hint == "Save the tokenizer beside the model again."


def set_class(folder, name):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": name}))


@pytest.mark.parametrize(
    ("name", "has_json"),
    [
        ("TokenizerOfNextYear", False),
        (5, True),
        pytest.param(
            "TokenizerOfNextYear",
            True,
            marks=pytest.mark.skipif(IS_VERSION_5, reason="transformers 5 reads tokenizer.json with a generic class"),
        ),
    ],
)
def test_an_unknown_tokenizer_class_is_refused_with_a_hint_that_works(checkpoint, tmp_path, name, has_json):
    tokenizer_json = checkpoint / "tokenizer.json"
    stored = tokenizer_json.read_bytes()
    if not has_json:
        tokenizer_json.unlink()
    set_class(checkpoint, name)
    with pytest.raises(CheckpointError, match=f"has the class {name!r}, which transformers .* does not know") as error:
        import_into(tmp_path / "refused", checkpoint)
    assert error.value.hint.startswith("Save the tokenizer as tokenizer.json, and set tokenizer_class")
    tokenizer_json.write_bytes(stored)
    set_class(checkpoint, error.value.hint.rstrip(".").split()[-1])
    import_into(tmp_path / "imported", checkpoint)
    assert encode(tmp_path / "imported") == encode(checkpoint)


def test_a_damaged_tokenizer_json_is_not_blamed_on_the_generic_class(checkpoint, tmp_path):
    """transformers 4 does not know the class `TokenizersBackend`, but the import reads it as another class."""
    set_class(checkpoint, "TokenizersBackend")
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"The tokenizer in .* cannot be loaded: .*\. Save the tokenizer"):
        import_into(tmp_path / "out", checkpoint)


@pytest.mark.skipif(not IS_VERSION_5, reason="transformers 4 refuses a class that it does not know")
def test_transformers_5_reads_tokenizer_json_whatever_class_is_stated(checkpoint, tmp_path):
    set_class(checkpoint, "TokenizerOfNextYear")
    import_into(tmp_path / "out", checkpoint)
    assert encode(tmp_path / "out") == encode(checkpoint)
    saved_config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved_config["tokenizer_class"] == "PreTrainedTokenizerFast"


def encode(folder):
    return Encoder.open(folder, ["input_ids"], 128).encode([*PAIR, PAIR])
