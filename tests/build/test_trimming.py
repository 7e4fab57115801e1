"""Tests of vocabularies trimmed to a corpus: which tokens stay, and how texts are tokenised.

The tests check that tokenizer, config and graph have the same vocabulary.
"""

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
from sample_results import measured_row, result
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
from toolchain.compare.report.notes import notes
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
def reference_encoder():
    return Encoder.open(checkpoints.REFERENCE, NAMES, 512)


@pytest.fixture(scope="session")
def trimmed(tmp_path_factory):
    """Trims the reference model's tokenizer and config to `CORPUS`; returns the encoder and the kept token ids."""
    folder = tmp_path_factory.mktemp("trimmed")
    for name in ("config.json", *checkpoints.TOKENIZER_FILES):
        if (checkpoints.REFERENCE / name).is_file():
            shutil.copyfile(checkpoints.REFERENCE / name, folder / name)
    kept_ids = vocabulary.tokens_to_keep(reference_encoder(), CORPUS)
    vocabulary.trim(folder, kept_ids)
    return Encoder.open(folder, NAMES, 512), kept_ids


def tokens_of(encoder, text):
    return encoder.tokenizer.encode(text).tokens


def test_trimming_keeps_the_corpus_tokens_the_characters_and_the_special_tokens(trimmed):
    encoder, kept_ids = trimmed
    full_tokenizer = reference_encoder().tokenizer
    vocabulary_kept = set(encoder.tokenizer.get_vocab())
    assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} <= vocabulary_kept
    characters = {t for t in full_tokenizer.get_vocab() if len(t) == 1 or (t.startswith("##") and len(t) == 3)}
    assert characters <= vocabulary_kept
    corpus_tokens = {token for text in CORPUS for token in tokens_of(reference_encoder(), text)}
    assert vocabulary_kept == characters | corpus_tokens | {"[PAD]", "[UNK]", "[MASK]"}
    assert len(kept_ids) == len(vocabulary_kept) < 2100
    for text in CORPUS:
        assert tokens_of(encoder, text) == tokens_of(reference_encoder(), text)
    assert tokens_of(encoder, "wonderful")[1:-1] != ["wonderful"]
    assert "[UNK]" not in tokens_of(encoder, "wonderful")


WORDS = sorted(t for t in reference_encoder().tokenizer.get_vocab() if not t.startswith("["))
LETTERS = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzéß'0123456789.,-#中文 "), max_size=30)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(WORDS) | LETTERS, max_size=8).map(" ".join), st.randoms(use_true_random=False))
def test_trimming_makes_no_text_unknown_and_splits_words_of_kept_tokens_alike(trimmed, text, random):
    """Draws texts from vocabulary words and random characters, and removes the spaces from some texts."""
    encoder, _ = trimmed
    text = text.replace(" ", "") if random.random() < 0.3 else text
    tokens_before, tokens_after = tokens_of(reference_encoder(), text), tokens_of(encoder, text)
    assert tokens_before.count("[UNK]") == tokens_after.count("[UNK]")
    kept_vocabulary = encoder.tokenizer.get_vocab()
    if all(token in kept_vocabulary for token in tokens_before):
        assert tokens_after == tokens_before
    old_encoding, new_encoding = reference_encoder().tokenizer.encode(text), encoder.tokenizer.encode(text)
    for word in set(old_encoding.word_ids) - {None}:
        pieces = [
            token for token, word_id in zip(old_encoding.tokens, old_encoding.word_ids, strict=True) if word_id == word
        ]
        if all(piece in kept_vocabulary for piece in pieces):
            assert pieces == [
                token
                for token, word_id in zip(new_encoding.tokens, new_encoding.word_ids, strict=True)
                if word_id == word
            ]


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_trimmed_vocabulary_can_spell_every_word(tmp_path_factory, data):
    """Checks small random vocabularies over three letters, with random corpora."""
    letters = ["a", "b", "c"]
    pieces = data.draw(st.sets(st.text("abc", min_size=2, max_size=4), max_size=12))
    continuations = data.draw(st.sets(st.text("abc", min_size=2, max_size=4).map("##{}".format), max_size=12))
    names = ["[UNK]", "#", "###", *letters, *(f"##{c}" for c in letters), *sorted(pieces), *sorted(continuations)]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("v")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"pad_token_id": null}')
    word = data.draw(st.text("abc", min_size=1, max_size=12))
    corpus = data.draw(st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=3))
    kept_ids = vocabulary.tokens_to_keep(Encoder.open(folder, NAMES, 512), corpus)
    vocabulary.trim(folder, kept_ids)
    trimmed_tokenizer = Encoder.open(folder, NAMES, 512).tokenizer
    tokens_before = tokenizer.encode(word).tokens
    assert "[UNK]" not in trimmed_tokenizer.encode(word).tokens
    if all(token in trimmed_tokenizer.get_vocab() for token in tokens_before):
        assert trimmed_tokenizer.encode(word).tokens == tokens_before


def test_trimming_keeps_a_token_that_its_characters_cannot_spell(tmp_path):
    names = ["[UNK]", "a", "##b", "ab", "az", "##ab", "##bb", "#", "###"]
    ids = {token: number for number, token in enumerate(names)}
    Tokenizer(models.WordPiece(ids, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    kept_ids = vocabulary.tokens_to_keep(Encoder.open(tmp_path, NAMES, 512), ["a"])
    assert [names[i] for i in kept_ids] == ["[UNK]", "a", "##b", "az", "##ab", "#", "###"]


def test_every_file_has_the_new_ids(trimmed):
    from transformers import AutoConfig, AutoTokenizer, BertTokenizer

    encoder, kept_ids = trimmed
    vocabulary = encoder.tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(kept_ids)))
    full_vocabulary = {i: token for token, i in reference_encoder().tokenizer.get_vocab().items()}
    assert all(vocabulary[full_vocabulary[old_id]] == new_id for new_id, old_id in enumerate(kept_ids))
    config = AutoConfig.from_pretrained(encoder.folder)
    assert config.vocab_size == len(kept_ids)
    assert config.pad_token_id == vocabulary["[PAD]"] == encoder.pad_id
    text = "a wonderful journey"
    for loaded_tokenizer in (
        AutoTokenizer.from_pretrained(encoder.folder),
        BertTokenizer.from_pretrained(encoder.folder),
    ):
        assert len(loaded_tokenizer) == len(kept_ids)
        assert loaded_tokenizer(text)["input_ids"] == encoder.encode([text])[0]
        assert loaded_tokenizer.mask_token_id == vocabulary["[MASK]"]
    assert (encoder.folder / "vocab.txt").read_text().split("\n")[:-1] == sorted(vocabulary, key=vocabulary.get)


def test_trimming_renumbers_post_processors_companion_files_and_added_tokens(tmp_path):
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
    kept_ids = vocabulary.tokens_to_keep(encoder, CORPUS)
    vocabulary.trim(tmp_path, kept_ids)
    trimmed_encoder = Encoder.open(tmp_path, NAMES, 512)
    assert tokens_of(trimmed_encoder, "a covfefe journey") == ["[CLS]", "a", "covfefe", "journey", "[SEP]"]
    ids_by_token = trimmed_encoder.tokenizer.get_vocab()
    ids = trimmed_encoder.encode(["a"])[0]
    assert ids == [ids_by_token["[CLS]"], ids_by_token["a"], ids_by_token["[SEP]"]]
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"covfefe": len(kept_ids) - 1}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == [ids_by_token["[SEP]"]]


@pytest.mark.parametrize(
    ("model", "name"), [(models.BPE({"a": 0}, []), "BPE"), (models.Unigram([("a", 0.0)], 0, False), "Unigram")]
)
def test_an_error_names_a_tokenizer_that_cannot_be_trimmed(tmp_path, model, name):
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"Only WordPiece .* the type of this tokenizer is {name}"):
        vocabulary.tokens_to_keep(Encoder.open(tmp_path, NAMES, 512), ["a"])


def test_files_that_contradict_each_other_are_refused(tmp_path, trimmed):
    encoder, _ = trimmed
    shutil.copytree(encoder.folder, tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["99999"] = {"content": "[X]"}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    kept_ids = vocabulary.tokens_to_keep(Encoder.open(tmp_path / "t", NAMES, 512), CORPUS)
    with pytest.raises(CheckpointError, match="contradict each other"):
        vocabulary.trim(tmp_path / "t", kept_ids)


@pytest.mark.parametrize("texts", [[], [""], [" ", "\t"], ["[CLS] [SEP]"]])
def test_a_corpus_without_words_is_refused(texts):
    with pytest.raises(DataError, match="no words"):
        vocabulary.tokens_to_keep(reference_encoder(), texts)


def test_a_corpus_without_a_file_or_a_text_column_is_refused(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        corpus_of(str(tmp_path / "none.csv"), None)
    with pytest.raises(DataError, match=r"has neither a \.parquet file nor"):
        list(corpus_of(str(tmp_path), None).read())
    (tmp_path / "t.csv").write_text("review,label\nfine,1\n")
    with pytest.raises(DataError, match="none of the columns 'sentence', 'text', 'tokens'"):
        list(corpus_of(str(tmp_path / "t.csv"), None).read())
    assert list(corpus_of(str(tmp_path / "t.csv"), "review").read()) == ["fine"]
    assert corpus_of("train", None) is None


def graph(rows, *nodes):
    table = numpy_helper.from_array(np.arange(rows * 2, dtype=np.float32).reshape(rows, 2), "table")
    inputs_ = [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["n", 2])]
    all_nodes = [helper.make_node("Gather", ["table", "input_ids"], ["out"]), *nodes]
    return helper.make_model(
        helper.make_graph(all_nodes, "g", inputs_, outputs, [table]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def test_the_table_keeps_the_rows_of_the_kept_tokens(tmp_path):
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
    ("rows", "nodes", "message"),
    [
        (10, [helper.make_node("Cast", ["input_ids"], ["x"], to=1)], "operators read the token ids: Cast, Gather"),
        (10, [helper.make_node("Neg", ["table"], ["x"])], "operators read the embedding table: Gather, Neg"),
        (5, [], "token 9, but the embedding table has only 5 rows"),
    ],
)
def test_a_graph_that_needs_the_old_ids_is_refused(tmp_path, rows, nodes, message):
    onnx.save(graph(rows, *nodes), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match=message):
        passes.rewrite(passes.read(tmp_path / "m.onnx"), ["trim-vocabulary"], Context(1, 2, tokens=(0, 3, 9)))


ROWS = 3000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The first rows of the package's SST-2 training data, which use a small part of the vocabulary."""
    data = inputs.load_embedded("train")
    file = tmp_path_factory.mktemp("train") / "train.tsv"
    lines = [f"{text}\t{label}\n" for text, label in zip(data.texts[:ROWS], data.labels[:ROWS], strict=True)]
    file.write_text("sentence\tlabel\n" + "".join(lines))
    return TrainingSource(str(file))


@pytest.fixture(scope="module")
def trimmed_workspace(source, tmp_path_factory):
    """A workspace with a trimmed variant of a model that prefers one label, and the messages of the build.

    Tests must not change this workspace.
    """
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "leaning", leaning=1.0)
    workspace = Workspace.open(str(checkpoint), tmp_path_factory.mktemp("exported"), train=source)
    events = []
    ensure(workspace, ["onnx-int8", *TRIMMED], TRIMMED, lambda event: events.append(str(event)))
    return workspace, events


def test_a_trimmed_variant_is_smaller_and_states_its_losses(trimmed_workspace):
    workspace, events = trimmed_workspace
    manifest = workspace.load("onnx-int8+trim").manifest
    facts = manifest.facts["vocabulary"]
    assert manifest.validation["passed"]
    assert facts["of"] == 30522
    assert 3_000 < facts["kept"] < 10_000
    assert facts["held_out"]["rows"] == ROWS // 10
    assert 0 < facts["out_of_domain"]["rows"] < facts["held_out"]["rows"]
    for part in ("held_out", "out_of_domain"):
        gain = facts[part]["right_after"] - facts[part]["right_before"]
        assert abs(gain) <= facts[part]["flips"] <= facts[part]["rows"]
    assert manifest.facts["rewrites"]["trim-vocabulary"] == 1
    assert any(f"onnx-int8+trim: {facts['kept']:,} of 30,522 tokens kept" in line for line in events)
    assert manifest.step.train == workspace.train.digest
    dropped_tokens = 30522 - facts["kept"]
    assert (
        manifest.facts["parameters"] == workspace.load("onnx-fp32").manifest.facts["parameters"] - 32 * dropped_tokens
    )
    full_manifest = workspace.load("onnx-int8").manifest
    bytes_saved = full_manifest.size_bytes - manifest.size_bytes
    # `bytes_saved` ignores the bytes of the graph file that store the shape of the embedding table
    assert abs(bytes_saved - facts["bytes_saved"]) < 500


def test_the_facts_count_the_answers_to_the_held_out_rows(trimmed_workspace, source):
    """Counts the flips and right answers of the trimmed variant and of its fp32 parent on the held-out rows.

    The test compares the numbers of flips and right answers with the facts in the manifest. The trimmed variant and its
    fp32 parent have different tokenizers.
    """
    workspace, _ = trimmed_workspace
    manifest = workspace.load("onnx-int8+trim").manifest
    data = source.load(LabelSet(manifest.labels))
    held_out_rows = inputs.hold_out(data)[1]
    predictions = []
    for name in ("onnx-fp32", "onnx-int8+trim"):
        encoder = Encoder.open(workspace.path(name), NAMES, 512)
        session = open_session(workspace.path(name), "onnx", Place("cpu", 1))
        rows = [encoder.encode([data.texts[row]]) for row in held_out_rows]
        predictions.append([int(session.run(pad(row, NAMES, 0)).argmax()) for row in rows])
    vocabulary = Encoder.open(workspace.path("onnx-int8+trim"), NAMES, 512).tokenizer.get_vocab()
    full_encoder = Encoder.open(workspace.path("onnx-fp32"), NAMES, 512)
    out_of_domain = [
        i
        for i, row in enumerate(held_out_rows)
        if not vocabulary.keys() >= set(tokens_of(full_encoder, data.texts[row]))
    ]
    labels = [data.labels[row] for row in held_out_rows]
    for part, indices in (("held_out", range(len(held_out_rows))), ("out_of_domain", out_of_domain)):
        assert manifest.facts["vocabulary"][part] == {
            "rows": len(indices),
            "right_before": sum(predictions[0][i] == labels[i] for i in indices),
            "right_after": sum(predictions[1][i] == labels[i] for i in indices),
            "flips": sum(predictions[0][i] != predictions[1][i] for i in indices),
        }


def test_a_trimmed_variant_gives_the_same_logits_where_all_tokens_are_kept(trimmed_workspace):
    workspace, _ = trimmed_workspace
    full_folder, trimmed_folder = (workspace.path(name) for name in ("onnx-int8", "onnx-int8+trim"))
    full_encoder, trimmed_encoder = Encoder.open(full_folder, NAMES, 512), Encoder.open(trimmed_folder, NAMES, 512)
    sessions = [open_session(folder, "onnx", Place("cpu", 1)) for folder in (full_folder, trimmed_folder)]
    same_count = 0
    for text in inputs.load_embedded().texts[:60]:
        rows = [encoder.encode([text]) for encoder in (full_encoder, trimmed_encoder)]
        if tokens_of(full_encoder, text) != tokens_of(trimmed_encoder, text):
            continue
        same_count += 1
        full_logits, trimmed_logits = (
            session.run(pad(row, NAMES, 0)) for session, row in zip(sessions, rows, strict=True)
        )
        assert (full_logits == trimmed_logits).all()
    assert same_count > 10


def test_the_same_corpus_gives_the_same_artifact(trimmed_workspace, tmp_path):
    workspace, _ = trimmed_workspace
    events = []
    id_before = ensure(workspace, TRIMMED, TRIMMED, lambda event: events.append(str(event)))[
        "onnx-int8+trim"
    ].manifest.id
    assert "onnx-int8+trim: fresh, skipped" in events
    copy = Workspace(tmp_path / "exported", workspace.model, workspace.source, workspace.train)
    shutil.copytree(workspace.exported, copy.exported)
    shutil.rmtree(copy.path("onnx-int8+trim"))
    assert ensure(copy, TRIMMED, TRIMMED, quiet)["onnx-int8+trim"].manifest.id == id_before


def test_validate_uses_each_tokenizer_and_the_held_out_rows_of_the_build(trimmed_workspace):
    workspace, _ = trimmed_workspace
    assert validate_variant(workspace, "onnx-int8+trim", quiet)["passed"]
    artifact = workspace.load("onnx-int8+trim")
    assert len(validation_data(workspace.train, artifact).texts) == ROWS // 10
    step = replace(artifact.manifest.step, train=TrainingSource().digest)
    other_artifact = replace(artifact, manifest=replace(artifact.manifest, step=step))
    assert validation_data(workspace.train, other_artifact) == inputs.load_embedded()
    other_workspace = Workspace(workspace.exported, workspace.model, workspace.source)
    with pytest.raises(DataError, match=r"needs held-out rows of train\.tsv, but this command uses sst2"):
        validate_variant(other_workspace, "onnx-int8+trim", quiet)


def test_a_rebuild_refuses_another_corpus_file(trimmed_workspace, tmp_path):
    workspace, _ = trimmed_workspace
    words = tmp_path / "words.txt"
    words.write_text("\n".join(inputs.load_embedded("train").texts[:ROWS]))
    corpus = Texts(str(words))
    steps = {"onnx-int8+words": Quantize(trim_vocab=corpus.digest)}
    copy = Workspace(tmp_path / "exported", workspace.model, workspace.source, workspace.train, corpus)
    shutil.copytree(workspace.exported, copy.exported)
    manifest = ensure(copy, steps, steps, quiet)["onnx-int8+words"].manifest
    assert manifest.step.trim_vocab == f"words.txt:{corpus.sha256}"
    words.write_text("something else")
    new_steps = {"onnx-int8+words": Quantize(trim_vocab=corpus.digest, embeddings="int4")}
    for other_corpus in (None, Texts(str(words))):
        changed_workspace = Workspace(copy.exported, copy.model, copy.source, copy.train, other_corpus)
        assert ensure(changed_workspace, ["onnx-int8+words"], {}, quiet)["onnx-int8+words"].manifest == manifest
        with pytest.raises(DataError, match=r"The corpus of \S+ is words\.txt"):
            ensure(changed_workspace, new_steps, new_steps, quiet)


def test_a_corpus_that_is_too_small_fails_validation_and_keeps_the_old_artifact(tiny, source, tmp_path):
    (tmp_path / "one.txt").write_text("film\n")
    corpus = Texts(str(tmp_path / "one.txt"))
    workspace = Workspace(tiny.exported, tiny.model, tiny.source, source, corpus)
    steps = {"onnx-int8": Quantize(trim_vocab=corpus.digest)}
    manifest_before = workspace.load("onnx-int8").manifest
    with pytest.raises(VerdictError, match="failed validation"):
        ensure(workspace, steps, steps, quiet)
    assert workspace.load("onnx-int8").manifest == manifest_before


def test_a_bundle_refuses_variants_with_different_tokenizers(trimmed_workspace, tmp_path):
    workspace, _ = trimmed_workspace
    with pytest.raises(ShippingError, match="have different tokenizers"):
        ship(workspace, Order(("onnx-fp32", "onnx-int8+trim"), "python"), tmp_path / "b", quiet, None)


def test_a_benchmark_tokenises_the_texts_with_the_tokenizer_of_each_cell(fake, trimmed, monkeypatch):
    """Uses a fake session that answers 1 for an even sum of token ids.

    With the fake session, the full and the trimmed vocabulary lead to different answers.
    """
    monkeypatch.setattr(bench_module, "SETTLE_S", 0.0)
    encoder, _ = trimmed
    data = inputs.load_embedded().select(range(30))
    cells = [
        Cell("fake", "whole", "fake", "cpu", fake("whole")),
        Cell("fake", "trimmed", "fake", "cpu", fake("trimmed"), encoder=encoder),
    ]
    protocol = Protocol(passes=1, min_s=0.1, pass_s=40, starts=1, threads=1, batch_size=8)
    kind = {"fake": Backend("fake_backend:FakeSession", ("json",))}
    rows, _ = bench(cells, data, reference_encoder(), protocol, lambda *_: None, kind)
    for row, cell_encoder in zip(rows, (reference_encoder(), encoder), strict=True):
        assert list(row.predictions) == [int(sum(ids) % 2 == 0) for ids in cell_encoder.encode(data.texts)]
    assert rows[0].predictions != rows[1].predictions


def test_a_comparison_has_a_note_on_each_trimmed_vocabulary():
    counts = {"rows": 40, "right_before": 36, "right_after": 35, "flips": 3}
    no_rows = {"rows": 0, "right_before": 0, "right_after": 0, "flips": 0}
    facts = {"kept": 5000, "of": 30522, "bytes_saved": 9_000_000, "held_out": counts, "out_of_domain": no_rows}
    rows = result(measured_row("onnx-int8", 1.0), measured_row("onnx-int8+small", 1.0, facts={"vocabulary": facts}))
    lines = [line for line in notes(compare([rows])) if "tokens kept" in line]
    assert lines == [
        "onnx-int8+small@cpu: 5,000 of 30,522 tokens kept, 9.0 MB saved; held-out rows, compared with the fp32 "
        "parent: 40 rows, accuracy 90.00% → 87.50%, 3 flips; held-out rows with a removed token: none"
    ]


def test_a_cell_has_an_encoder_of_its_own_only_after_trimming(trimmed_workspace):
    workspace, _ = trimmed_workspace
    root = workspace.load("torch-fp32").manifest
    for name, has_own_tokenizer in (("onnx-int8", False), ("onnx-int8+trim", True)):
        cell = Cell("m", name, "onnx", "cpu", workspace.load(name)).with_own_encoder(root)
        assert (cell.encoder is not None) == has_own_tokenizer
    assert cell.encoder.folder == workspace.path("onnx-int8+trim")
    assert cell.encoder.names == NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "torch", "--trim-vocab", "train"], "Leave out --embeddings, --keep-fp32"),
        (["--sensitivity", "--trim-vocab", "train"], "--sensitivity cannot be used with --trim-vocab"),
    ],
)
def test_options_that_exclude_each_other_give_a_usage_error(arguments, message, tmp_path, say):
    code, _, err = say("quantize", *arguments, "--exported", tmp_path)
    assert code == 2
    assert message in err
