"""A vocabulary cut down to a corpus: what stays, how it tokenises, and that every file agrees."""

import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from sample_results import measured, result
from tokenizers import Tokenizer, models, pre_tokenizers

from toolchain import passes
from toolchain.artifacts.steps import Quantize
from toolchain.backends import Backend, Place, open_session
from toolchain.bench import runner as bench_module
from toolchain.bench.cells import Cell
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import Protocol
from toolchain.build.pipeline import ensure, validate_variant
from toolchain.build.trimming import corpus_of, validation_data
from toolchain.build.workspace import Workspace
from toolchain.compare.report.columns import notes
from toolchain.compare.rows import compare
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.data.files import Texts
from toolchain.data.inputs import TrainingSource
from toolchain.data.labels import LabelSet
from toolchain.errors import CheckpointError, DataError, GraphError, ShippingError, VerdictError
from toolchain.models import checkpoints, vocabulary
from toolchain.passes import Context
from toolchain.ship.shipping import Order, ship

TRIMMED = {"onnx-int8+trim": Quantize(trim_vocab="train")}
NAMES = ("input_ids", "attention_mask")
CORPUS = ["a charming and often affecting journey", "unflinchingly bleak and desperate", "it's slow – very, very slow."]


def quiet(line):
    pass


@functools.cache
def reference():
    return Encoder.open(checkpoints.REFERENCE, NAMES, 512)


@pytest.fixture(scope="session")
def trimmed(tmp_path_factory):
    """The reference's tokenizer and config, trimmed to `CORPUS`, and the ids that stayed."""
    folder = tmp_path_factory.mktemp("trimmed")
    for name in ("config.json", *checkpoints.TOKENIZER_FILES):
        if (checkpoints.REFERENCE / name).is_file():
            shutil.copyfile(checkpoints.REFERENCE / name, folder / name)
    kept = vocabulary.tokens_to_keep(reference(), CORPUS)
    vocabulary.trim(folder, kept)
    return Encoder.open(folder, NAMES, 512), kept


def tokens(encoder, text):
    return encoder.tokenizer.encode(text).tokens


def test_what_the_corpus_needs_stays_and_what_is_needed_to_spell(trimmed):
    encoder, kept = trimmed
    whole = reference().tokenizer
    have = set(encoder.tokenizer.get_vocab())
    assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} <= have
    single = {t for t in whole.get_vocab() if len(t) == 1 or (t.startswith("##") and len(t) == 3)}
    assert single <= have
    used = {token for text in CORPUS for token in tokens(reference(), text)}
    assert have == single | used | {"[PAD]", "[UNK]", "[MASK]"}
    assert len(kept) == len(have) < 2100
    for text in CORPUS:
        assert tokens(encoder, text) == tokens(reference(), text)
    assert tokens(encoder, "wonderful")[1:-1] != ["wonderful"]
    assert "[UNK]" not in tokens(encoder, "wonderful")


WORDS = sorted(t for t in reference().tokenizer.get_vocab() if not t.startswith("["))
LETTERS = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzéß'0123456789.,-#中文 "), max_size=30)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(WORDS) | LETTERS, max_size=8).map(" ".join), st.randoms(use_true_random=False))
def test_nothing_becomes_unknown_and_what_was_kept_is_split_alike(trimmed, text, random):
    """Of any text of words, and of words run into each other."""
    encoder, _ = trimmed
    text = text.replace(" ", "") if random.random() < 0.3 else text
    before, after = tokens(reference(), text), tokens(encoder, text)
    assert before.count("[UNK]") == after.count("[UNK]")
    have = encoder.tokenizer.get_vocab()
    if all(token in have for token in before):
        assert after == before
    old, new = reference().tokenizer.encode(text), encoder.tokenizer.encode(text)
    for word in set(old.word_ids) - {None}:
        pieces = [token for token, of in zip(old.tokens, old.word_ids, strict=True) if of == word]
        if all(piece in have for piece in pieces):
            assert pieces == [token for token, of in zip(new.tokens, new.word_ids, strict=True) if of == word]


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_vocabulary_loses_a_word_it_could_spell(tmp_path_factory, data):
    """Small random vocabularies over three letters, whatever is kept."""
    letters = ["a", "b", "c"]
    pieces = data.draw(st.sets(st.text("abc", min_size=2, max_size=4), max_size=12))
    more = data.draw(st.sets(st.text("abc", min_size=2, max_size=4).map("##{}".format), max_size=12))
    names = ["[UNK]", "#", "###", *letters, *(f"##{c}" for c in letters), *sorted(pieces), *sorted(more)]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("v")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"pad_token_id": null}')
    word = data.draw(st.text("abc", min_size=1, max_size=12))
    corpus = data.draw(st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=3))
    kept = vocabulary.tokens_to_keep(Encoder.open(folder, NAMES, 512), corpus)
    vocabulary.trim(folder, kept)
    after = Encoder.open(folder, NAMES, 512).tokenizer
    before = tokenizer.encode(word).tokens
    assert "[UNK]" not in after.encode(word).tokens
    if all(token in after.get_vocab() for token in before):
        assert after.encode(word).tokens == before


def test_a_token_that_its_letters_cannot_spell_stays(tmp_path):
    names = ["[UNK]", "a", "##b", "ab", "az", "##ab", "##bb", "#", "###"]
    ids = {token: number for number, token in enumerate(names)}
    Tokenizer(models.WordPiece(ids, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    kept = vocabulary.tokens_to_keep(Encoder.open(tmp_path, NAMES, 512), ["a"])
    assert [names[i] for i in kept] == ["[UNK]", "a", "##b", "az", "##ab", "#", "###"]


def test_every_file_states_the_new_ids(trimmed):
    from transformers import AutoConfig, AutoTokenizer, BertTokenizer

    encoder, kept = trimmed
    vocabulary = encoder.tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(kept)))
    whole = {i: token for token, i in reference().tokenizer.get_vocab().items()}
    assert all(vocabulary[whole[old]] == new for new, old in enumerate(kept))
    config = AutoConfig.from_pretrained(encoder.folder)
    assert config.vocab_size == len(kept)
    assert config.pad_token_id == vocabulary["[PAD]"] == encoder.pad_id
    text = "a wonderful journey"
    for loaded in (AutoTokenizer.from_pretrained(encoder.folder), BertTokenizer.from_pretrained(encoder.folder)):
        assert len(loaded) == len(kept)
        assert loaded(text)["input_ids"] == encoder.encode([text])[0]
        assert loaded.mask_token_id == vocabulary["[MASK]"]
    assert (encoder.folder / "vocab.txt").read_text().split("\n")[:-1] == sorted(vocabulary, key=vocabulary.get)


def test_other_post_processors_companions_and_added_tokens_are_renumbered(tmp_path):
    tokenizer = Tokenizer.from_file(str(checkpoints.REFERENCE / "tokenizer.json"))
    tokenizer.add_tokens(["covfefe"])
    tokenizer.enable_padding(pad_id=0)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    body = json.loads((tmp_path / "tokenizer.json").read_text())
    inner = {"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]}
    body["post_processor"] = {"type": "Sequence", "processors": [inner]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    (tmp_path / "added_tokens.json").write_text('{"covfefe": 30522}')
    (tmp_path / "config.json").write_text('{"pad_token_id": 0, "eos_token_id": [102], "bos_token_id": null}')
    encoder = Encoder.open(tmp_path, NAMES, 512)
    kept = vocabulary.tokens_to_keep(encoder, CORPUS)
    vocabulary.trim(tmp_path, kept)
    after = Encoder.open(tmp_path, NAMES, 512)
    assert tokens(after, "a covfefe journey") == ["[CLS]", "a", "covfefe", "journey", "[SEP]"]
    words = after.tokenizer.get_vocab()
    ids = after.encode(["a"])[0]
    assert ids == [words["[CLS]"], words["a"], words["[SEP]"]]
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"covfefe": len(kept) - 1}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == [words["[SEP]"]]


@pytest.mark.parametrize(
    ("model", "said"), [(models.BPE({"a": 0}, []), "BPE"), (models.Unigram([("a", 0.0)], 0, False), "Unigram")]
)
def test_other_tokenizers_are_refused_by_name(tmp_path, model, said):
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"Only WordPiece .* the type of this tokenizer is {said}"):
        vocabulary.tokens_to_keep(Encoder.open(tmp_path, NAMES, 512), ["a"])


def test_files_that_contradict_each_other_are_refused(tmp_path, trimmed):
    encoder, _ = trimmed
    shutil.copytree(encoder.folder, tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["99999"] = {"content": "[X]"}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    kept = vocabulary.tokens_to_keep(Encoder.open(tmp_path / "t", NAMES, 512), CORPUS)
    with pytest.raises(CheckpointError, match="contradict each other"):
        vocabulary.trim(tmp_path / "t", kept)


@pytest.mark.parametrize("texts", [[], [""], [" ", "\t"], ["[CLS] [SEP]"]])
def test_a_corpus_without_words_is_refused(texts):
    with pytest.raises(DataError, match="no words"):
        vocabulary.tokens_to_keep(reference(), texts)


def test_a_corpus_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        corpus_of(str(tmp_path / "none.csv"), None)
    with pytest.raises(DataError, match="There is no file"):
        corpus_of(str(tmp_path), None)
    (tmp_path / "t.csv").write_text("review,label\nfine,1\n")
    with pytest.raises(DataError, match="no column 'sentence' or 'text'"):
        list(corpus_of(str(tmp_path / "t.csv"), None).read())
    assert list(corpus_of(str(tmp_path / "t.csv"), "review").read()) == ["fine"]
    assert corpus_of("train", None) is None


def graph(rows, *nodes):
    table = numpy_helper.from_array(np.arange(rows * 2, dtype=np.float32).reshape(rows, 2), "table")
    inputs_ = [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["n", 2])]
    made = [helper.make_node("Gather", ["table", "input_ids"], ["out"]), *nodes]
    return helper.make_model(
        helper.make_graph(made, "g", inputs_, outputs, [table]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def test_the_table_keeps_the_rows_of_the_tokens(tmp_path):
    onnx.save(graph(10), tmp_path / "m.onnx")
    model, counts = passes.rewrite(
        passes.read(tmp_path / "m.onnx"), ["trim-vocabulary"], Context(1, 2, tokens=(0, 3, 9))
    )
    assert counts == {"trim-vocabulary": 1}
    passes.write(model, tmp_path / "t.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "t.onnx"), full_check=True)
    (table,) = onnx.load(tmp_path / "t.onnx").graph.initializer
    assert numpy_helper.to_array(table).tolist() == [[0, 1], [6, 7], [18, 19]]


@pytest.mark.parametrize(
    ("rows", "nodes", "said"),
    [
        (10, [helper.make_node("Cast", ["input_ids"], ["x"], to=1)], "these operators read them: Cast, Gather"),
        (5, [], "token 9, but the embedding table has only 5 rows"),
    ],
)
def test_a_graph_that_needs_the_old_ids_is_refused(tmp_path, rows, nodes, said):
    onnx.save(graph(rows, *nodes), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match=said):
        passes.rewrite(passes.read(tmp_path / "m.onnx"), ["trim-vocabulary"], Context(1, 2, tokens=(0, 3, 9)))


ROWS = 3000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The first rows of the embedded training data: what trims a vocabulary far."""
    data = inputs.load_embedded("train")
    file = tmp_path_factory.mktemp("train") / "train.tsv"
    lines = [f"{text}\t{label}\n" for text, label in zip(data.texts[:ROWS], data.labels[:ROWS], strict=True)]
    file.write_text("sentence\tlabel\n" + "".join(lines))
    return TrainingSource(str(file))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """A model that leans to one answer, with a variant trimmed to the training data; not to be changed."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "leaning", leaning=1.0)
    workspace = Workspace.open(str(checkpoint), tmp_path_factory.mktemp("exported"), train=source)
    said = []
    ensure(workspace, ["onnx-int8", *TRIMMED], TRIMMED, lambda event: said.append(str(event)))
    return workspace, said


def test_a_trimmed_variant_is_smaller_and_says_what_it_lost(built):
    workspace, said = built
    manifest = workspace.load("onnx-int8+trim").manifest
    facts = manifest.facts["vocabulary"]
    assert manifest.validation["passed"]
    assert facts["of"] == 30522
    assert 3_000 < facts["kept"] < 10_000
    assert facts["held_out"]["rows"] == ROWS // 10
    assert 0 < facts["out_of_domain"]["rows"] < facts["held_out"]["rows"]
    for part in ("held_out", "out_of_domain"):
        gained = facts[part]["right_after"] - facts[part]["right_before"]
        assert abs(gained) <= facts[part]["flips"] <= facts[part]["rows"]
    assert manifest.facts["rewrites"]["trim-vocabulary"] == 1
    assert any(f"onnx-int8+trim: {facts['kept']:,} of 30,522 tokens kept" in line for line in said)
    assert manifest.step.train == workspace.train.digest
    gone = 30522 - facts["kept"]
    assert manifest.facts["parameters"] == workspace.load("onnx-fp32").manifest.facts["parameters"] - 32 * gone
    whole = workspace.load("onnx-int8").manifest
    saved = whole.size_bytes - manifest.size_bytes
    assert abs(saved - facts["bytes_saved"]) < 500  # the sizes of the table in the graph's own file are not counted


def test_the_facts_are_what_the_rows_are_answered(built, source):
    """Counted anew, each by its own tokenizer."""
    workspace, _ = built
    manifest = workspace.load("onnx-int8+trim").manifest
    data = source.load(LabelSet(manifest.labels))
    held = inputs.hold_out(data)[1]
    found = []
    for name in ("onnx-fp32", "onnx-int8+trim"):
        encoder = Encoder.open(workspace.path(name), NAMES, 512)
        session = open_session(workspace.path(name), "onnx", Place("cpu", 1))
        rows = [encoder.encode([data.texts[row]]) for row in held]
        found.append([int(session.run(pad(row, NAMES, 0)).argmax()) for row in rows])
    vocabulary = Encoder.open(workspace.path("onnx-int8+trim"), NAMES, 512).tokenizer.get_vocab()
    whole = Encoder.open(workspace.path("onnx-fp32"), NAMES, 512)
    beyond = [i for i, row in enumerate(held) if not vocabulary.keys() >= set(tokens(whole, data.texts[row]))]
    labels = [data.labels[row] for row in held]
    for part, chosen in (("held_out", range(len(held))), ("out_of_domain", beyond)):
        assert manifest.facts["vocabulary"][part] == {
            "rows": len(chosen),
            "right_before": sum(found[0][i] == labels[i] for i in chosen),
            "right_after": sum(found[1][i] == labels[i] for i in chosen),
            "flips": sum(found[0][i] != found[1][i] for i in chosen),
        }


def test_it_answers_as_the_untrimmed_one_where_all_tokens_stayed(built):
    workspace, _ = built
    whole, small = (workspace.path(name) for name in ("onnx-int8", "onnx-int8+trim"))
    first, second = Encoder.open(whole, NAMES, 512), Encoder.open(small, NAMES, 512)
    sessions = [open_session(folder, "onnx", Place("cpu", 1)) for folder in (whole, small)]
    same = 0
    for text in inputs.load_embedded().texts[:60]:
        rows = [encoder.encode([text]) for encoder in (first, second)]
        if tokens(first, text) != tokens(second, text):
            continue
        same += 1
        one, two = (session.run(pad(row, NAMES, 0)) for session, row in zip(sessions, rows, strict=True))
        assert (one == two).all()
    assert same > 10


def test_the_same_corpus_is_fresh_and_gives_the_same_bytes(built, tmp_path):
    workspace, _ = built
    said = []
    before = ensure(workspace, TRIMMED, TRIMMED, lambda event: said.append(str(event)))["onnx-int8+trim"].manifest.id
    assert "onnx-int8+trim: fresh, skipped" in said
    copy = Workspace(tmp_path / "exported", workspace.model, workspace.source, workspace.train)
    shutil.copytree(workspace.exported, copy.exported)
    shutil.rmtree(copy.path("onnx-int8+trim"))
    assert ensure(copy, TRIMMED, TRIMMED, quiet)["onnx-int8+trim"].manifest.id == before


def test_validate_asks_each_by_its_own_tokens_and_knows_its_rows(built):
    workspace, _ = built
    assert validate_variant(workspace, "onnx-int8+trim", quiet)["passed"]
    artifact = workspace.load("onnx-int8+trim")
    assert len(validation_data(workspace.train, artifact).texts) == ROWS // 10
    step = replace(artifact.manifest.step, train=TrainingSource().digest)
    unseen = replace(artifact, manifest=replace(artifact.manifest, step=step))
    assert validation_data(workspace.train, unseen) == inputs.load_embedded()
    other = Workspace(workspace.exported, workspace.model, workspace.source)
    with pytest.raises(DataError, match=r"needs held-out rows of train\.tsv, but this command has sst2"):
        validate_variant(other, "onnx-int8+trim", quiet)


def test_a_file_is_a_corpus_and_another_is_not_taken_for_it(built, tmp_path):
    workspace, _ = built
    words = tmp_path / "words.txt"
    words.write_text("\n".join(inputs.load_embedded("train").texts[:ROWS]))
    corpus = Texts(str(words))
    asked = {"onnx-int8+words": Quantize(trim_vocab=corpus.digest)}
    copy = Workspace(tmp_path / "exported", workspace.model, workspace.source, workspace.train, corpus)
    shutil.copytree(workspace.exported, copy.exported)
    manifest = ensure(copy, asked, asked, quiet)["onnx-int8+words"].manifest
    assert manifest.step.trim_vocab == f"words.txt:{corpus.sha256}"
    words.write_text("something else")
    forced = {"onnx-int8+words": Quantize(trim_vocab=corpus.digest, embeddings="int4")}
    for other in (None, Texts(str(words))):
        changed = Workspace(copy.exported, copy.model, copy.source, copy.train, other)
        assert ensure(changed, ["onnx-int8+words"], {}, quiet)["onnx-int8+words"].manifest == manifest
        with pytest.raises(DataError, match=r"Its corpus is words\.txt"):
            ensure(changed, forced, forced, quiet)


def test_too_small_a_corpus_is_refused_and_nothing_is_published(tiny, source, tmp_path):
    (tmp_path / "one.txt").write_text("film\n")
    corpus = Texts(str(tmp_path / "one.txt"))
    workspace = Workspace(tiny.exported, tiny.model, tiny.source, source, corpus)
    asked = {"onnx-int8": Quantize(trim_vocab=corpus.digest)}
    before = workspace.load("onnx-int8").manifest
    with pytest.raises(VerdictError, match="failed validation"):
        ensure(workspace, asked, asked, quiet)
    assert workspace.load("onnx-int8").manifest == before


def test_a_bundle_has_one_tokenizer(built, tmp_path):
    workspace, _ = built
    with pytest.raises(ShippingError, match="tokenizers of their own"):
        ship(workspace, Order(("onnx-fp32", "onnx-int8+trim"), "python"), tmp_path / "b", quiet, None)


def test_every_cell_is_asked_the_same_texts_by_its_own_tokens(fake, trimmed, monkeypatch):
    """The fake session answers 1 for an even sum of ids, which tells one vocabulary's from another's."""
    monkeypatch.setattr(bench_module, "SETTLE_S", 0.0)
    encoder, _ = trimmed
    data = inputs.load_embedded().select(range(30))
    cells = [
        Cell("fake", "whole", "fake", "cpu", fake("whole")),
        Cell("fake", "trimmed", "fake", "cpu", fake("trimmed"), encoder=encoder),
    ]
    protocol = Protocol(passes=1, min_s=0.1, pass_s=40, starts=1, threads=1, batch_size=8)
    kind = {"fake": Backend("fake_backend:FakeSession", ("json",))}
    rows, _ = bench(cells, data, reference(), protocol, lambda *_: None, kind)
    for row, own in zip(rows, (reference(), encoder), strict=True):
        assert list(row.predictions) == [int(sum(ids) % 2 == 0) for ids in own.encode(data.texts)]
    assert rows[0].predictions != rows[1].predictions


def test_a_comparison_says_which_vocabulary_is_not_whole():
    counts = {"rows": 40, "right_before": 36, "right_after": 35, "flips": 3}
    none = {"rows": 0, "right_before": 0, "right_after": 0, "flips": 0}
    facts = {"kept": 5000, "of": 30522, "bytes_saved": 9_000_000, "held_out": counts, "out_of_domain": none}
    rows = result(measured("onnx-int8", 1.0), measured("onnx-int8+small", 1.0, facts={"vocabulary": facts}))
    lines = [line for line in notes(compare([rows])) if "tokens kept" in line]
    assert lines == [
        "onnx-int8+small@cpu: 5,000 of 30,522 tokens kept, 9.0 MB saved; against the fp32 parent, held-out rows: 40, "
        "accuracy 90.00% → 87.50%, 3 flips; of these, rows with a dropped token: none"
    ]


def test_a_cell_knows_whether_its_tokenizer_is_its_own(built):
    workspace, _ = built
    root = workspace.load("torch-fp32").manifest
    for name, own in (("onnx-int8", False), ("onnx-int8+trim", True)):
        cell = Cell("m", name, "onnx", "cpu", workspace.load(name)).reading_as(root)
        assert (cell.encoder is not None) == own
    assert cell.encoder.folder == workspace.path("onnx-int8+trim")
    assert cell.encoder.names == NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "torch", "--trim-vocab", "train"], "Leave out --embeddings, --keep-fp32"),
        (["--sensitivity", "--trim-vocab", "train"], "--trim-vocab changes none"),
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(arguments, message, tmp_path, say):
    code, _, err = say("quantize", *arguments, "--exported", tmp_path)
    assert code == 2
    assert message in err
