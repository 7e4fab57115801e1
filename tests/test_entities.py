"""Tests of token classification: labelled words become a fine-tuned, measured and shipped finder of entities."""

import csv
import functools
import json
import random
import re
import subprocess
import sys

import pytest
from conftest import make_checkpoint, needs_node, verify_in_node
from demo_page import ask_page, needs_chromium, use_npm_packages
from hypothesis import given
from hypothesis import strategies as st

from toolchain.build.steps import validate
from toolchain.cli import main
from toolchain.data import entities
from toolchain.data.encoding import Encoder
from toolchain.data.labels import TOKENS, Column, LabelSet, answers, label_set
from toolchain.errors import CheckpointError, DataError
from toolchain.models import checkpoints
from toolchain.results.scores import score_answers

NAMES = ("O", "B-CITY", "I-CITY", "B-DISH", "I-DISH")
CITIES = (["paris"], ["new", "york"], ["rome"])
DISHES = (["soup"], ["apple", "pie"], ["bread"])
LABELS = LabelSet(NAMES, TOKENS)


def tagged_sentence(rng):
    """Returns the words of a sentence and their labels."""
    words, tags = [], []
    for kind, phrases in rng.sample((("CITY", CITIES), ("DISH", DISHES)), 2):
        for word in rng.choices(("the", "film", "it", "is", "good"), k=rng.randint(1, 2)):
            words.append(word)
            tags.append("O")
        phrase = rng.choice(phrases)
        words += phrase
        tags += [f"B-{kind}", *[f"I-{kind}"] * (len(phrase) - 1)]
    return words, tags


@pytest.fixture(scope="module")
def finder(tmp_path_factory):
    """A fine-tuned token classifier; its folder lies beside its training data."""
    folder = tmp_path_factory.mktemp("finder")
    rng = random.Random(1)
    rows = [dict(zip(("tokens", "tags"), tagged_sentence(rng), strict=True)) for _ in range(120)]
    (folder / "orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = make_checkpoint(folder / "base", width=64)
    options = ["--train-data", str(folder / "orders.jsonl"), "--label-column", "tags", "--entities"]
    options += ["--epochs", "20", "--lr", "5e-3", "--batch-size", "8", "--output", str(folder / "orders")]
    assert main(["finetune", "--base", str(base), *options]) == 0
    return folder / "orders"


@pytest.fixture
def data(finder):
    return finder.parent / "orders.jsonl"


@pytest.fixture
def run(finder, say, monkeypatch):
    """Returns a function that runs a command on the model and returns its standard output.

    For many words, two labels of the tiny model have nearly equal logits. Therefore validation allows more flips than
    for a real model.
    """
    monkeypatch.setattr(validate, "MAX_FLIPS", 0.2)

    def invoke(command, *arguments, code=0):
        found, out, err = say(command, *arguments, "--model", finder, "--exported", finder.parent / "exported")
        assert found == code, err
        return out if code == 0 else err

    return invoke


def test_a_base_with_another_head_gets_a_head_for_tokens(finder):
    config, card = checkpoints.config_of(finder), json.loads((finder / "training.json").read_text())
    assert config["architectures"] == ["DistilBertForTokenClassification"]
    labels = checkpoints.label_set(finder, config)
    assert (sorted(labels.names), labels.task) == (sorted(NAMES), TOKENS)
    assert (card["task"], card["training"]["score"]) == (TOKENS, "entity F1")
    assert card["judged"]["entity_f1"] > 0.4
    assert card["judged"]["entity_f1"] == pytest.approx(max(card["training"]["held_out_accuracy"]), abs=1e-4)


@pytest.mark.usefixtures("short_bench")
def test_the_whole_chain_of_a_token_classifier(finder, run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("quantize")
    manifest = json.loads((finder.parent / "exported" / "orders" / "onnx-int8" / "manifest.json").read_text())
    assert manifest["facts"]["task"] == TOKENS
    assert manifest["outputs"][0]["shape"] == ["batch_size", "sequence_length", 5]
    assert manifest["validation"]["words"] > 1000
    options = ["--data", data, "--label-column", "tags", "--variant", "torch-fp32", "--variant", "onnx-int8"]
    rows = {row["cell"]: row for row in json.loads(run("bench", *options, "--quick", "--json"))}
    card = json.loads((finder / "training.json").read_text())
    assert rows["torch-fp32@cpu"]["entities"]["value"] == pytest.approx(card["judged"]["entity_f1"], abs=1e-3)
    score, quality = rows["onnx-int8@cpu"]["entities"], rows["onnx-int8@cpu"]["quality"]
    assert quality["low"] <= score["value"] <= quality["high"]
    assert quality["precision"] == pytest.approx(score["found"] / score["predicted"], abs=1e-6)
    assert quality["test"] == "McNemar"
    # `predict` and the runner in the bundle find the same entities.
    labelled = [json.loads(line) for line in data.read_text().splitlines()][:20]
    texts = [*(" ".join(row["tokens"]) for row in labelled), "It is good (New York), the apple pie!"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("out.jsonl", "out.csv"):
        run("predict", "onnx-int8", tmp_path / "in.jsonl", "--output", tmp_path / name)
    predictions = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in predictions] == texts
    found = [[(entity["label"], entity["text"]) for entity in row["entities"]] for row in predictions]
    expected = [
        [(kind, " ".join(row["tokens"][start:end])) for kind, start, end in entities.find_entities(row["tags"])]
        for row in labelled
    ]
    assert sum(found_row == row for found_row, row in zip(found, expected, strict=False)) >= 4
    rows = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8")))
    assert [json.loads(row["entities"]) for row in rows] == [row["entities"] for row in predictions]
    run("ship", "onnx-int8", "--target", "python", "--output", tmp_path / "bundle")
    command = [sys.executable, "classify.py", *texts]
    lines = subprocess.run(command, cwd=tmp_path / "bundle", capture_output=True, text=True, check=True).stdout
    shown = ["{label}\t{start}\t{end}\t{text}".format(**entity) for row in predictions for entity in row["entities"]]
    fields = [line.split("\t") for line in lines.splitlines() if line]
    assert ["\t".join((label, *rest)) for label, _, *rest in fields] == shown
    for row in predictions:
        for entity in row["entities"]:
            assert row["text"][entity["start"] : entity["end"]] == entity["text"]


def test_entities_have_their_place_in_the_text(finder):
    import numpy as np

    encoder = Encoder.open(finder, ("input_ids", "attention_mask"), 32)
    text = "It is good (New York), unbelievable!"
    (row,) = encoder.encode([text])
    words = [text[start:end] for _, start, end in row.spans]
    assert words == ["It", "is", "good", "(", "New", "York", ")", ",", "unbelievable", "!"]
    probabilities = np.full((len(row), 5), 0.1)
    for word, label, share in ((4, 1, 0.6), (5, 2, 0.5), (8, 4, 0.9)):
        probabilities[row.spans[word][0], label] = share
    probabilities[:, 0] += 0.2
    assert entities.describe_entities(text, row.spans, probabilities, NAMES) == [
        {"label": "CITY", "text": "New York", "start": 12, "end": 20, "score": 0.5},
        {"label": "DISH", "text": "unbelievable", "start": 23, "end": 35, "score": 0.9},
    ]


@pytest.mark.parametrize("target", ["web", "other", "mobile"])
def test_bundles_of_a_token_classifier_are_verified_on_tokens_without_padding(run, tmp_path, target):
    variant = "onnx-std" if target == "other" else "onnx-int8"
    options = ["--no-demo"] if target == "web" else []
    run("ship", variant, "--target", target, "--output", tmp_path / target, *options)
    golden = json.loads((tmp_path / target / "golden.json").read_text())
    (logits,) = golden["logits"].values()
    for row, sentence in zip(logits, golden["sentences"], strict=True):
        assert len(row) == 5 * len(sentence["input_ids"])
    assert "text classifier" not in (tmp_path / target / "README.md").read_text()


@needs_node
@pytest.mark.slow
def test_node_gives_the_recorded_logits_of_each_token(run, tmp_path):
    run("ship", "onnx-int8", "onnx-fp32", "--target", "web", "--no-demo", "--output", tmp_path / "web")
    assert len(verify_in_node(tmp_path / "web")) == 2


@needs_chromium
@pytest.mark.web
@pytest.mark.slow
def test_the_demo_page_shows_the_tokens_of_entities(run, finder, tmp_path):
    use_npm_packages(finder.parent / "exported")
    run("ship", "onnx-int8", "--target", "web", "--output", tmp_path / "web")
    answer, summary = ask_page(tmp_path / "web", tmp_path, "the film new york is apple pie")
    assert re.search(r"^york: [BI]-\w+\s+\d+\.\d %$", answer, re.MULTILINE), answer
    assert "match the recorded logits" in summary


@pytest.mark.parametrize("options", [["--target", "server"], ["--target", "python", "--with-tokenizer"]])
def test_a_token_classifier_is_not_shipped_with_its_tokenizer_in_the_graph(run, tmp_path, options):
    err = run("ship", "onnx-int8", *options, "--output", tmp_path / "bundle", code=1)
    assert "does not return the positions of the tokens" in err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("target", ["mlflow", "ray-serve"])
def test_a_token_classifier_is_not_shipped_to_a_target_without_lists(run, tmp_path, target):
    err = run("ship", "onnx-int8", "--target", target, "--output", tmp_path / "bundle", code=1)
    assert f"A bundle for {target} cannot have a token classifier" in err
    assert "Ship for python" in err
    assert not (tmp_path / "bundle").exists()


def test_pruning_and_recovery_of_a_token_classifier(run, finder, data):
    out = run("prune", "--ratio", "0.3", "--recover", "1", "--train-data", data, "--label-column", "tags")
    assert "torch-pruned30-r1" in out
    manifest = json.loads((finder.parent / "exported" / "orders" / "torch-pruned30-r1" / "manifest.json").read_text())
    assert manifest["facts"]["recovery"]["score"] == "entity F1"


def test_the_sensitivity_of_a_token_classifier_counts_sentences_with_another_label(run, data):
    layers = json.loads(run("quantize", "--sensitivity", "--train-data", data, "--label-column", "tags", "--json"))
    assert all(layer["divergence"] >= 0 and layer["flips"] >= 0 for layer in layers["onnx-fp32"])


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["O", "B-A", "I-A", "O"], [("A", 1, 3)]),
        (["B-A", "B-A"], [("A", 0, 1), ("A", 1, 2)]),
        (["I-A", "I-A", "I-B"], [("A", 0, 2), ("B", 2, 3)]),
        (["B-A", "O", "I-A"], [("A", 0, 1), ("A", 2, 3)]),
        ([], []),
    ],
)
def test_entities_of_labels(tags, expected):
    assert entities.find_entities(tags) == expected


@given(st.lists(st.integers(0, 4), max_size=12))
def test_entities_do_not_overlap_and_cover_all_marked_words(indices):
    found = entities.find_entities([NAMES[index] for index in indices])
    covered = [word for _, start, end in found for word in range(start, end)]
    assert covered == [word for word, index in enumerate(indices) if index]


def test_an_entity_counts_only_if_all_its_words_are_right():
    labels = ((0, 1, 2), (3, 0))
    assert score_answers(labels, labels, LABELS).value == 1
    score = score_answers(((0, 1, 0), (3, 0)), labels, LABELS)
    assert (score.found, score.predicted, score.labelled, score.value) == (1, 2, 2, 0.5)
    assert score_answers(((0,),), ((0,),), LABELS).value == 1


def test_the_label_of_a_word_is_the_label_of_its_first_token(finder):
    import numpy as np

    encoder = Encoder.open(finder, ("input_ids", "attention_mask"), 8)
    text = "unbelievable  york, " + "far " * 10
    (row,) = encoder.encode([text])
    pieces = [encoder.tokenizer.id_to_token(token) for token in row]
    assert [pieces[position] for position in row.words[:1]] == ["unbelievable"] or pieces[row.words[0]].startswith("un")
    assert pieces[row.words[1]] == "york"
    assert row.words[-1] is None  # truncation removed the last word
    logits = np.zeros((1, len(row), 5))
    logits[0, row.words[1], 2] = 1
    (answer,) = answers(logits, TOKENS, [row])
    assert answer[1] == 2
    assert len(answer) == len(text.split())
    assert answer[-1] == encoder.outside


def column(*values):
    return Column(values, "a.jsonl")


def test_labels_of_words_are_names_or_indices():
    assert LABELS.answers(column(("O", "B-CITY"), ("I-DISH",))) == ((0, 1), (4,))
    assert LABELS.answers(column("O B-CITY", "")) == ((0, 1), ())
    assert LABELS.answers(column(("0", "1"), ("4",))) == ((0, 1), (4,))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 1: the row has 2 words, but 1 labels"),
        ({"tokens": ["a b"], "tags": ["O"]}, "row 1: the word 'a b' in the column 'tokens' is empty or has a space"),
        ({"tokens": ["a"], "tags": ["B-NOWHERE"]}, "row 1: the label 'B-NOWHERE' is not one of the model's labels"),
    ],
)
def test_bad_rows_of_words_give_an_error(tmp_path, row, message):
    from toolchain.data.datasets import Columns
    from toolchain.data.inputs import load

    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "a.jsonl"), LABELS, Columns(label="tags"))


def test_labels_that_mark_no_entities_are_refused(tmp_path):
    with pytest.raises(DataError, match="none begins with B- or I-"):
        label_set(column(("NOUN", "VERB")), (), TOKENS)
    config = {"architectures": ["BertForTokenClassification"], "id2label": {"0": "NOUN", "1": "VERB"}}
    with pytest.raises(CheckpointError, match="none begins with B- or I-"):
        checkpoints.label_set(tmp_path, config)


def made_tokenizer(kind):
    """Returns a small tokenizer with tokens for the space before a word, as RoBERTa or XLM-RoBERTa have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    texts = ["it is in New York", "the film in Rome is good", "unbelievable"] * 5
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        special = ["<s>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "metaspace without split":  # then all tokens have the same word id
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", ids)
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "metaspace without split"])
@pytest.mark.parametrize("text", ["東京 in 東京 New York", "in 東 in", "  it is  in New York", "Ж é 🙂 x", ""])
def test_training_and_prediction_read_the_same_token_of_a_word(kind, text):
    from toolchain.data.encoding import _find_spans, _find_words
    from toolchain.ship.bundle_files.classify_tokens import find_words

    encoding = made_tokenizer(kind).encode(text)
    spans = _find_spans(text, encoding)
    words = [text[start:end] for _, start, end in spans]
    assert "".join(words) == "".join(text.split())
    assert all(word and word == word.strip() and len(word.split()) == 1 for word in words)
    first_spans = {start: position for position, start, _ in spans}
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    assert _find_words(text, spans) == [first_spans[start] for start in starts]
    assert find_words(text, encoding) == spans


@given(st.lists(st.integers(0, 4), max_size=8))
def test_the_runner_of_a_bundle_finds_the_same_entities(indices):
    import numpy as np

    from toolchain.ship.bundle_files.classify_tokens import Classifier

    text = " ".join("abcdefgh"[: len(indices)])
    encoding = made_words_tokenizer().encode(text)
    runner = object.__new__(Classifier)
    runner.labels = list(NAMES)
    probabilities = np.full((len(indices), 5), 0.1)
    for word, index in enumerate(indices):
        probabilities[word, index] = 0.5 + word / 100
    spans = [(word, 2 * word, 2 * word + 1) for word in range(len(indices))]
    assert runner._find_entities(text, encoding, probabilities) == entities.describe_entities(
        text, spans, probabilities, NAMES
    )


@functools.cache
def made_words_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate("abcdefgh?")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (("O", "B-X", "L-X", "U-X"), "L-X belongs to another scheme"),
        (("B-X", "I-X"), "none is for words outside"),
        (("NOUN", "VERB"), "none begins with"),
        (("O", "B-X"), ""),
    ],
)
def test_label_names_must_fit_the_bio_scheme(names, fault):
    assert fault in entities.check_names(names)
    assert bool(fault) == bool(entities.check_names(names))


def test_a_token_classifier_as_base_gets_a_new_head_for_texts(finder, tmp_path):
    rows = "".join(f"{word} film,{label}\n" for word, label in (("good", "yes"), ("bad", "no")) * 15)
    (tmp_path / "a.csv").write_text("text,label\n" + rows)
    options = ["--train-data", str(tmp_path / "a.csv"), "--epochs", "1", "--output", str(tmp_path / "out")]
    assert main(["finetune", "--base", str(finder), *options]) == 0
    assert checkpoints.config_of(tmp_path / "out")["architectures"] == ["DistilBertForSequenceClassification"]


def test_labels_of_words_without_the_option_give_an_error_that_names_it(data, tmp_path, say):
    base = make_checkpoint(tmp_path / "base")
    options = ["--train-data", data, "--label-column", "tags", "--output", tmp_path / "out"]
    code, _, err = say("finetune", "--base", base, *options)
    assert code == 1
    assert "Add --entities" in err


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["torch-int8", "torch-bf16"])
def test_pytorch_variants_of_a_token_classifier(run, tmp_path, variant):
    (tmp_path / "in.csv").write_text("text\nthe film is new york\n")
    run("predict", variant, tmp_path / "in.csv", "--output", tmp_path / "out.parquet")
    import pyarrow.parquet

    (row,) = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert isinstance(json.loads(row["entities"]), list)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "deberta-v2", "modernbert"])
def test_token_heads_of_other_architectures_are_exported(tmp_path, say, kind):
    import transformers
    from tiny_architectures import make

    folder = tmp_path / kind
    make(folder, kind)
    names = dict(enumerate(("O", "B-X", "I-X")))
    config = transformers.AutoConfig.from_pretrained(
        folder, id2label=names, label2id={name: index for index, name in names.items()}
    )
    transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
    code, _, err = say("export", "--model", folder, "--exported", tmp_path / "exported")
    assert code == 0, err
    manifest = json.loads((tmp_path / "exported" / kind / "onnx-fp32" / "manifest.json").read_text())
    assert manifest["validation"]["words"] > 1000


def test_a_batch_with_padding_does_not_change_the_entities(run, finder):
    from toolchain.backends import Place, open_session
    from toolchain.data.encoding import pad

    run("quantize")
    folder = finder.parent / "exported" / "orders" / "onnx-int8"
    names = ("input_ids", "attention_mask")
    (row,) = Encoder.open(folder, names, 64).encode(["the film is new york"])
    session = open_session(folder, "onnx", Place("cpu", 1))
    narrow, wide = (session.run(pad([row], names, 0, width=width))[0, : len(row)] for width in (len(row), 40))
    assert abs(narrow - wide).max() < 1e-5


def test_pairs_of_texts_are_refused(run, tmp_path):
    (tmp_path / "in.csv").write_text("text,other\na,b\n")
    err = run("predict", "onnx-fp32", tmp_path / "in.csv", "--text-pair-column", "other", code=1)
    assert "not in pairs" in err
