"""Tokenizers in graphs give the tokens of the checkpoint's own tokenizer, or are refused."""

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
from toolchain.errors import GraphError, ProviderError, ShippingError
from toolchain.models import checkpoints
from toolchain.ship import tokenizer_graph
from toolchain.ship.tokenizer_graph import characters, comparison, difficult_texts, wordpiece
from toolchain.ship.tokenizer_graph.session import TextSession

WORDS = [str(text) for text in inputs.load_embedded().texts]
NAMES = ("input_ids", "attention_mask")


def cased(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    return tokenizer


def robertas(words):
    """With a mask that takes the space before it."""
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
    """The reference's tokenizer as a session."""
    file = tmp_path_factory.mktemp("graph") / "tokenizer.onnx"
    passes.write(tokenizer_graph.token_model(reference_encoder), file)
    return TextSession(file, 1)


def split(session, texts):
    arrays = session.run(texts)
    return [ids[mask == 1].tolist() for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny.wordpiece, cased, tiny.byte_level, robertas])
def test_every_hard_text_is_split_alike(build, tmp_path):
    encoder = encoder_of(build(WORDS), tmp_path / "tokenizer", pad_id=1)
    assert comparison.compare(encoder, WORDS[:100], tmp_path / "tokenizer.onnx") == len(difficult_texts.texts()) + 100


@pytest.mark.slow
def test_every_hard_text_is_split_as_by_the_references_tokenizer(reference_encoder, tmp_path):
    compared = comparison.compare(reference_encoder, WORDS, tmp_path / "tokenizer.onnx")
    assert compared == len(difficult_texts.texts()) + 872


def test_hard_texts_have_what_tokenizers_disagree_on():
    texts = difficult_texts.texts()
    assert len(texts) > 3000
    assert len(set("".join(texts))) > 140_000  # of Unicode's characters
    assert {"", "café naïve", "a" * 101, "[SEP][SEP]", "中" * 600, "a\x07b \x07 c"} <= set(texts)


texts_with_anything = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from("aA é\u0301 \x00\x01\x02\x03\t\n[]#C👍🏽\u200d中한İß"),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts_with_anything, min_size=1, max_size=4))
def test_any_texts_are_split_alike_in_any_batch(graph, reference_encoder, texts):
    assert split(graph, texts) == [list(row) for row in reference_encoder.encode(texts)]


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "a\x00\x00b\x00", "[C\x00LS]", "\x00[CLS]\x00", "x\x01y\x02z\x03"])
def test_nul_and_what_stands_for_something_in_the_graph(graph, reference_encoder, text):
    assert split(graph, [text, "behind"]) == [list(row) for row in reference_encoder.encode([text, "behind"])]


@pytest.mark.slow
def test_arrays_are_those_a_model_takes(tmp_path):
    encoder = encoder_of(tiny.wordpiece(WORDS), tmp_path / "t", 32, (*NAMES, "token_type_ids"), 0)
    passes.write(tokenizer_graph.token_model(encoder, 8), tmp_path / "t.onnx")
    arrays = TextSession(tmp_path / "t.onnx", 1).run(["a film", "a much longer text than the other one is", ""])
    assert set(arrays) == {*NAMES, "token_type_ids"}
    wanted = encoding.pad(encoder.encode(["a film", "a much longer text than the other one is", ""]), encoder.names, 0)
    width = wanted["input_ids"].shape[1]
    for name, array in arrays.items():
        assert array.dtype == np.int64
        assert array.shape[1] % 8 == 0
        assert np.array_equal(array[:, :width], wanted[name])
        assert not array[:, width:].any()
    # A text that is cut off keeps what closes it, and no array is wider than the model's longest.
    arrays = TextSession(tmp_path / "t.onnx", 1).run(["word " * 50])
    assert arrays["input_ids"].tolist() == [list(encoder.encode(["word " * 50])[0])]


@pytest.mark.slow
def test_the_same_tokenizer_is_the_same_file(reference_encoder, tmp_path):
    for name in ("one", "two"):
        passes.write(tokenizer_graph.token_model(reference_encoder), tmp_path / name)
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")


def _marked(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.add_tokens([f"[{i}]" for i in range(40)])
    return tokenizer


def _uncleaned(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False)
    return tokenizer


def _inside_words(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.add_tokens([AddedToken("the", normalized=True)])
    return tokenizer


def _prepending(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.normalizer = normalizers.Prepend("_")
    return tokenizer


def _whole_texts(words):
    tokenizer = tiny.wordpiece(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("ZZZ", "isolated")
    return tokenizer


def _metaspace(words):
    tokenizer = tiny.byte_level(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def _spaced(words):
    tokenizer = tiny.byte_level(words)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _by_words(words):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (tiny.unigram, "no tokenizer of type Unigram"),
        (_by_words, "no tokenizer of type WordLevel"),
        (_marked, "added tok"),
        (_uncleaned, "keeps control characters"),
        (_inside_words, "its added token 'the'"),
        (_prepending, "does not treat each character independently"),
        (_whole_texts, "does not treat each character independently"),
        (_metaspace, "kind of BPE"),
        (_spaced, "a space added"),
    ],
)
def test_a_tokenizer_the_graph_cannot_express_is_refused(build, said, tmp_path):
    encoder = encoder_of(build(WORDS), tmp_path / "t")
    with pytest.raises(ShippingError, match="Ship without --with-tokenizer") as refusal:
        comparison.compare(encoder, (), tmp_path / "t.onnx")
    assert said in str(refusal.value)


@pytest.mark.slow
def test_a_graph_that_splits_otherwise_is_refused_with_the_texts(reference_encoder, tmp_path, monkeypatch):
    real = characters.changes
    monkeypatch.setattr(wordpiece, "changes", lambda spec: {c: b for c, b in real(spec).items() if c != "é"})
    with pytest.raises(ShippingError) as refusal:
        comparison.compare(reference_encoder, (), tmp_path / "t.onnx")
    assert "splits" in str(refusal.value)
    assert "'café naïve', '[CLS] cafe" in str(refusal.value)


def test_pieces_before_an_unknown_one_are_dropped(graph, reference_encoder):
    # onnxruntime-extensions' own operator keeps them.
    assert split(graph, ["emoji🏳 emoji"]) == [list(reference_encoder.encode(["emoji🏳 emoji"])[0])]
    assert reference_encoder.tokenizer.encode("emoji🏳").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_runs_of_characters():
    assert characters.runs("acbz") == [(ord("a"), ord("c")), (ord("z"), ord("z"))]
    assert characters.runs("") == []
    changed = {"\x00": "", "\u00a0": " ", "!": " ! ", "É": "e"}
    assert characters.group_by_kind(changed) == {"deleted": ["\x00"], "space": ["\u00a0"], "words": ["!"]}


def test_marks_are_the_longest_tokens_first(reference_encoder):
    changed = characters.changes(reference_encoder.tokenizer.to_str())
    marks = wordpiece._choose_marks(reference_encoder.tokenizer, changed)
    assert next(iter(marks)) == "[MASK]"
    assert len(set(marks.values())) == len(marks) == 5


@pytest.mark.parametrize("multi", [False, True])
def test_text_in_probabilities_out(reference, tmp_path, multi):
    from toolchain.backends import Place, open_session
    from toolchain.data.labels import label_probabilities

    artifact = reference.load("onnx-int8")
    encoder = Encoder.open(artifact.path, NAMES, artifact.manifest.max_length)
    object.__setattr__(encoder, "multi_label", multi)
    passes.write(tokenizer_graph.with_tokenizer(passes.read(artifact.onnx_path), encoder), tmp_path / "text.onnx")
    session = open_session(artifact.path, "onnx", Place("cpu", 1))
    logits = session.run(encoding.pad(encoder.encode(WORDS[:20]), NAMES, 0))
    found = TextSession(tmp_path / "text.onnx", 1).run(WORDS[:20])
    assert list(found) == ["logits", "probabilities"]
    assert np.abs(found["logits"] - logits).max() < 1e-5
    assert np.allclose(found["probabilities"], label_probabilities(found["logits"], multi), atol=1e-6)


def test_without_the_library_it_is_named(reference_encoder, tmp_path, monkeypatch):
    passes.write(tokenizer_graph.token_model(reference_encoder), tmp_path / "t.onnx")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "onnxruntime_extensions":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ProviderError, match=r"toolchain\[text\]"):
        TextSession(tmp_path / "t.onnx", 1)


def test_a_file_that_is_no_model_is_told(tmp_path):
    (tmp_path / "t.onnx").write_bytes(b"no model")
    with pytest.raises(GraphError, match="ONNX Runtime cannot load the model"):
        TextSession(tmp_path / "t.onnx", 1)
