"""Tests of tokenizer graphs: they give the tokens of the checkpoint's tokenizer, or are refused."""

import builtins
import json

import numpy as np
import pytest
import tiny_architectures as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from toolchain import passes
from toolchain.artifacts.store import sha256
from toolchain.data import encoding, inputs
from toolchain.data.encoding import Encoder
from toolchain.data.labels import MULTI, SINGLE
from toolchain.errors import GraphError, ProviderError, ShippingError
from toolchain.models import checkpoints
from toolchain.ship import tokenizer_graph
from toolchain.ship.tokenizer_graph import characters, comparison, difficult_texts, wordpiece
from toolchain.ship.tokenizer_graph.session import TextSession

WORDS = [str(text) for text in inputs.load_embedded().texts]
NAMES = ("input_ids", "attention_mask")


def make_cased(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    return tokenizer


def make_roberta(words):
    """Returns RoBERTa's kind of tokenizer, whose mask token includes the space before it."""
    tokenizer = tiny.byte_level(words)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    return tokenizer


def encoder_of(tokenizer, folder, max_length=128, names=NAMES, pad_id=0, **config):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"pad_token_id": pad_id, **config}))
    return Encoder.open(folder, names, max_length)


@pytest.fixture(scope="module")
def reference_encoder():
    return Encoder.open(checkpoints.REFERENCE, NAMES, 512)


@pytest.fixture(scope="module")
def graph(reference_encoder, tmp_path_factory):
    """A session that runs the tokenizer graph of the reference model."""
    file = tmp_path_factory.mktemp("graph") / "tokenizer.onnx"
    passes.write(tokenizer_graph.token_model(reference_encoder), file)
    return TextSession(file, 1)


def tokens_of(session, texts):
    arrays = session.run(texts)
    return [ids[mask == 1].tolist() for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny.wordpiece, make_cased, tiny.byte_level, make_roberta])
def test_a_graph_gives_the_same_tokens_for_every_difficult_text(build, tmp_path):
    encoder = encoder_of(build(WORDS), tmp_path / "tokenizer", pad_id=1)
    assert comparison.compare(encoder, WORDS[:100], tmp_path / "tokenizer.onnx") == len(difficult_texts.texts()) + 100


@pytest.mark.slow
def test_the_reference_graph_gives_the_same_tokens_for_every_difficult_text(reference_encoder, tmp_path):
    count = comparison.compare(reference_encoder, WORDS, tmp_path / "tokenizer.onnx")
    assert count == len(difficult_texts.texts()) + 872


def test_difficult_texts_cover_unicode_and_special_cases():
    texts = difficult_texts.texts()
    assert len(texts) > 3000
    assert len(set("".join(texts))) > 140_000  # the texts together contain many different characters
    assert {"", "café naïve", "a" * 101, "[SEP][SEP]", "中" * 600, "a\x07b \x07 c"} <= set(texts)


any_texts = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from("aA é\u0301 \x00\x01\x02\x03\t\n[]#C👍🏽\u200d中한İß"),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(any_texts, min_size=1, max_size=4))
def test_a_graph_gives_the_same_tokens_for_random_batches(graph, reference_encoder, texts):
    assert tokens_of(graph, texts) == [list(row) for row in reference_encoder.encode(texts)]


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "a\x00\x00b\x00", "[C\x00LS]", "\x00[CLS]\x00", "x\x01y\x02z\x03"])
def test_a_graph_gives_the_same_tokens_for_nul_and_marker_characters(graph, reference_encoder, text):
    assert tokens_of(graph, [text, "behind"]) == [list(row) for row in reference_encoder.encode([text, "behind"])]


@pytest.mark.slow
def test_a_graph_gives_the_arrays_of_the_encoder(tmp_path):
    encoder = encoder_of(tiny.wordpiece(WORDS), tmp_path / "t", 32, (*NAMES, "token_type_ids"), 0)
    passes.write(tokenizer_graph.token_model(encoder, 8), tmp_path / "t.onnx")
    arrays = TextSession(tmp_path / "t.onnx", 1).run(["a film", "a much longer text about a dull film", ""])
    assert set(arrays) == {*NAMES, "token_type_ids"}
    expected = encoding.pad(encoder.encode(["a film", "a much longer text about a dull film", ""]), encoder.names, 0)
    width = expected["input_ids"].shape[1]
    for name, array in arrays.items():
        assert array.dtype == np.int64
        assert array.shape[1] % 8 == 0
        assert np.array_equal(array[:, :width], expected[name])
        assert not array[:, width:].any()
    # A truncated text keeps its final [SEP], and no array is longer than the maximum length.
    arrays = TextSession(tmp_path / "t.onnx", 1).run(["word " * 50])
    assert arrays["input_ids"].tolist() == [list(encoder.encode(["word " * 50])[0])]


@pytest.mark.slow
def test_the_same_tokenizer_gives_the_same_file(reference_encoder, tmp_path):
    for name in ("one", "two"):
        passes.write(tokenizer_graph.token_model(reference_encoder), tmp_path / name)
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")


def _with_many_added_tokens(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.add_tokens([f"[{i}]" for i in range(40)])
    return tokenizer


def _with_control_characters(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False)
    return tokenizer


def _with_normalized_token(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.add_tokens([AddedToken("the", normalized=True)])
    return tokenizer


def _with_prefix(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.normalizer = normalizers.Prepend("_")
    return tokenizer


def _with_rare_separator(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("ZZZ", "isolated")
    return tokenizer


def _with_metaspace(words):
    tokenizer = tiny.byte_level(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def _with_prefix_space(words):
    tokenizer = tiny.byte_level(words)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _of_word_level(words):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny.unigram, "but no tokenizer of type Unigram"),
        (_of_word_level, "but no tokenizer of type WordLevel"),
        (_with_many_added_tokens, "added tok"),
        (_with_control_characters, "keeps control characters"),
        (_with_normalized_token, "its added token 'the'"),
        (_with_prefix, "so it does not treat each character independently"),
        (_with_rare_separator, "so it does not treat each character independently"),
        (_with_metaspace, "kind of BPE"),
        (_with_prefix_space, "adds a space"),
    ],
)
def test_a_tokenizer_without_a_graph_is_refused(build, message, tmp_path):
    encoder = encoder_of(build(WORDS), tmp_path / "t")
    with pytest.raises(ShippingError, match="Ship without --with-tokenizer") as refusal:
        comparison.compare(encoder, (), tmp_path / "t.onnx")
    assert message in str(refusal.value)


@pytest.mark.slow
def test_a_graph_with_other_tokens_is_refused_with_an_example(reference_encoder, tmp_path, monkeypatch):
    original = characters.changes
    monkeypatch.setattr(wordpiece, "changes", lambda spec: {c: b for c, b in original(spec).items() if c != "é"})
    with pytest.raises(ShippingError) as refusal:
        comparison.compare(reference_encoder, (), tmp_path / "t.onnx")
    assert "splits" in str(refusal.value)
    assert "'café naïve', split into '[CLS] cafe" in str(refusal.value)


def test_a_word_with_an_unknown_piece_becomes_one_unknown_token(graph, reference_encoder):
    # The WordPiece operator of onnxruntime-extensions alone would keep the known pieces of an unknown word.
    assert tokens_of(graph, ["emoji🏳 emoji"]) == [list(reference_encoder.encode(["emoji🏳 emoji"])[0])]
    assert reference_encoder.tokenizer.encode("emoji🏳").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_characters_are_grouped_into_runs_and_kinds():
    assert characters.runs("acbz") == [(ord("a"), ord("c")), (ord("z"), ord("z"))]
    assert characters.runs("") == []
    changes = {"\x00": "", "\u00a0": " ", "!": " ! ", "É": "e"}
    assert characters.group_by_kind(changes) == {"deleted": ["\x00"], "space": ["\u00a0"], "words": ["!"]}


def test_marks_start_with_the_longest_token(reference_encoder):
    changes = characters.changes(reference_encoder.tokenizer.to_str())
    marks = wordpiece._choose_marks(reference_encoder.tokenizer, changes)
    assert next(iter(marks)) == "[MASK]"
    assert len(set(marks.values())) == len(marks) == 5


@pytest.mark.parametrize("task", [SINGLE, MULTI])
def test_a_graph_with_its_tokenizer_gives_probabilities_of_texts(reference, tmp_path, task):
    from toolchain.backends import Place, open_session
    from toolchain.data.labels import label_probabilities

    artifact = reference.load("onnx-int8")
    encoder = Encoder.open(artifact.path, NAMES, artifact.manifest.max_length)
    object.__setattr__(encoder, "task", task)
    passes.write(tokenizer_graph.with_tokenizer(passes.read(artifact.onnx_path), encoder), tmp_path / "text.onnx")
    session = open_session(artifact.path, "onnx", Place("cpu", 1))
    logits = session.run(encoding.pad(encoder.encode(WORDS[:20]), NAMES, 0))
    results = TextSession(tmp_path / "text.onnx", 1).run(WORDS[:20])
    assert list(results) == ["logits", "probabilities"]
    assert np.abs(results["logits"] - logits).max() < 1e-5
    assert np.allclose(results["probabilities"], label_probabilities(results["logits"], task), atol=1e-6)


def test_without_onnxruntime_extensions_an_error_names_the_extra(reference_encoder, tmp_path, monkeypatch):
    passes.write(tokenizer_graph.token_model(reference_encoder), tmp_path / "t.onnx")
    original_import = builtins.__import__

    def failing_import(name, *arguments, **keywords):
        if name == "onnxruntime_extensions":
            raise ImportError(name)
        return original_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", failing_import)
    with pytest.raises(ProviderError, match="pip install 'onnxruntime-extensions"):
        TextSession(tmp_path / "t.onnx", 1)


def test_a_file_without_a_model_raises_a_graph_error(tmp_path):
    (tmp_path / "t.onnx").write_bytes(b"no model")
    with pytest.raises(GraphError, match="ONNX Runtime cannot load the model"):
        TextSession(tmp_path / "t.onnx", 1)
