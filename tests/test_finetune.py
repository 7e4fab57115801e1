"""Tests of `finetune`: labelled texts become a checkpoint for the other commands, and errors are clear."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import make_checkpoint
from safetensors.torch import load_file, save_file

from toolchain.artifacts import publishing
from toolchain.artifacts.store import sha256
from toolchain.backends.pytorch import load_model
from toolchain.data.labels import MULTI
from toolchain.models import checkpoints
from toolchain.training import loop

WORDS = {
    "billing": "I was charged twice on the invoice and want a refund of the payment",
    "delivery": "the parcel did not arrive and the courier lost my order",
    "technical": "the app crashes with an error when I log in",
}


def sentences(count, words=WORDS, seed=1):
    """Returns (text, label) rows; the words of a text reveal its label."""
    import random

    rng = random.Random(seed)
    names = list(words)
    return [
        (" ".join(rng.sample(words[name].split(), 6)), name) for i in range(count) for name in [names[i % len(names)]]
    ]


def write(file, rows, header="text,label"):
    file.write_text(f"{header}\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return file


@pytest.fixture
def tickets(tmp_path):
    return write(tmp_path / "tickets.csv", sentences(120))


@pytest.fixture
def headless(tiny_checkpoint, tmp_path):
    """The tiny checkpoint without its classification head, like a pretrained base model on the hub."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["DistilBertModel"]}))
    tensors = load_file(folder / "model.safetensors")
    encoder_weights = {
        name.removeprefix("distilbert."): t for name, t in tensors.items() if name.startswith("distilbert.")
    }
    save_file(encoder_weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def make(say, tmp_path):
    """Returns a function that runs `finetune` on a base model and a file of training data.

    The function returns the exit code, the output folder, the JSON output and standard error.
    """

    def run(base, data, *options, output="out"):
        folder = tmp_path / output
        code, out, err = say(
            "finetune",
            "--base",
            base,
            "--train-data",
            data,
            "--output",
            folder,
            "--json",
            "--lr",
            "2e-3",
            "--batch-size",
            "8",
            *options,
        )
        return code, folder, json.loads(out) if code == 0 else {}, err

    return run


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("short_bench")
def test_a_base_without_a_head_learns_the_labels_of_the_data(make, headless, tickets, say, tmp_path, monkeypatch):
    code, folder, card, err = make(headless, tickets, "--epochs", "8")
    assert code == 0, err
    assert card["labels"] == ["billing", "delivery", "technical"]
    assert "120 rows with one label per text: 0 billing (40), 1 delivery (40), 2 technical (40); the model gets" in err
    history = card["training"]
    assert (history["rows"], history["held_out_rows"]) == (108, 12)
    assert history["held_out_accuracy"][history["best_epoch"]] == max(history["held_out_accuracy"]) > 0.8
    assert card["judged"]["rows"] == 12
    assert card["judged"]["accuracy"] == pytest.approx(max(history["held_out_accuracy"]), abs=1e-4)
    assert {"balanced_accuracy", "macro_f1"} < set(card["judged"])
    # The file training.json must not contain local paths.
    assert str(tmp_path) not in (folder / "training.json").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "billing", "1": "delivery", "2": "technical"}
    # `export` and `bench` accept the new checkpoint, and `bench` measures it only on the held-out rows.
    exported = tmp_path / "exported"
    code, _, err = say("export", "--model", folder, "--exported", exported)
    assert code == 0, err
    options = ["--data", tickets, "--variant", "onnx-fp32", "--quick", "--model", folder, "--exported", exported]
    monkeypatch.chdir(tmp_path)
    code, out, err = say("bench", *options, "--json")
    assert code == 0, err
    assert "only its held-out rows are measured" in err
    assert json.loads(out)[0]["accuracy"]["count"] == 12
    assert json.loads(out)[0]["accuracy"]["value"] == pytest.approx(card["judged"]["accuracy"], abs=1e-4)


def test_the_same_command_changes_nothing_and_another_does_not_overwrite(make, tiny_checkpoint, tickets, tmp_path):
    code, folder, card, _ = make(tiny_checkpoint, tickets, "--epochs", "1")
    assert code == 0
    time_before = (folder / "model.safetensors").stat().st_mtime_ns
    state = publishing.work_folder(folder) / "training"
    state.mkdir(parents=True)  # a run that was killed at its end leaves its state
    code, _, second_card, err = make(tiny_checkpoint, tickets, "--epochs", "1")
    assert (code, second_card) == (0, card)
    assert "unchanged" in err
    assert (folder / "model.safetensors").stat().st_mtime_ns == time_before
    code, _, _, err = make(tiny_checkpoint, tickets, "--epochs", "2")
    assert code == 1
    assert "was trained with other settings" in err
    (tmp_path / "mine").mkdir()
    code, _, _, err = make(tiny_checkpoint, tickets, output="mine")
    assert code == 1
    assert "`toolchain finetune` did not write it" in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.slow
def test_the_same_training_gives_the_same_bytes(make, headless, tickets):
    _, first, _, _ = make(headless, tickets, "--epochs", "1", output="one")
    _, second, _, _ = make(headless, tickets, "--epochs", "1", output="two")
    _, other_seed, _, _ = make(headless, tickets, "--epochs", "1", "--seed", "21", output="three")
    assert sha256(first / "model.safetensors") == sha256(second / "model.safetensors")
    assert sha256(first / "model.safetensors") != sha256(other_seed / "model.safetensors")


def test_dropout_is_on_in_training_and_off_in_scoring(make, headless, tickets, monkeypatch):
    modes = []
    learn, score = loop._Run.learn, loop.score

    def record_score(model, rows):
        modes.append(("judged", model.training))
        return score(model, rows)

    def record_learning(run, part):
        handle = run._model.register_forward_pre_hook(lambda module, _: modes.append(("learns", module.training)))
        try:
            return learn(run, part)
        finally:
            handle.remove()

    monkeypatch.setattr(loop, "score", record_score)
    monkeypatch.setattr(loop._Run, "learn", record_learning)
    assert make(headless, tickets, "--epochs", "1")[0] == 0
    assert set(modes) == {("judged", False), ("learns", True)}


def test_a_classifier_of_the_same_labels_keeps_its_head(make, tiny_checkpoint, tmp_path):
    rows = [
        (f"{'good fine nice' if i % 2 else 'bad dull poor'} film {i}", ("negative", "Positive")[i % 2])
        for i in range(40)
    ]
    code, _, card, err = make(tiny_checkpoint, write(tmp_path / "a.csv", rows), "--epochs", "1")
    assert code == 0, err
    assert "training continues with the base's head" in err
    assert card["labels"] == ["NEGATIVE", "POSITIVE"]
    assert card["training"]["held_out_accuracy"]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["positive", "posititve"], [], "has the labels NEGATIVE, POSITIVE, but .* has posititve, positive.*--labels"),
        (["0", "1", "2"], [], "has LABEL_0, LABEL_1, LABEL_2.*--labels"),
        (["a", "b"], ["--labels", "a,c"], "row 2: the label 'b' is not one of the model's labels"),
        (["a", "a"], [], "only one label"),
    ],
)
def test_labels_that_do_not_match_are_refused(make, tiny_checkpoint, tmp_path, labels, options, message):
    import re

    file = write(tmp_path / "a.csv", [(f"text {i}", labels[i % len(labels)]) for i in range(40)])
    code, folder, _, err = make(tiny_checkpoint, file, *options)
    assert code == 1
    assert re.search(message, err), err
    assert not folder.exists()


def test_named_labels_give_a_new_head_in_their_order(make, tiny_checkpoint, tmp_path):
    file = write(tmp_path / "a.csv", [(f"text {i}", i % 2) for i in range(40)])
    code, folder, card, _ = make(tiny_checkpoint, file, "--labels", "no, yes, maybe", "--epochs", "1")
    assert code == 0
    assert card["labels"] == ["no", "yes", "maybe"]
    assert checkpoints.label_set(folder, checkpoints.config_of(folder)).names == ("no", "yes", "maybe")


@pytest.mark.slow
@pytest.mark.usefixtures("short_bench")
def test_multi_label_data_gives_predictions_of_several_labels(make, headless, tmp_path, say, monkeypatch):
    words = {**WORDS, "billing|technical": f"{WORDS['billing']} {WORDS['technical']}"}
    rows = sentences(160, words)
    file = write(
        tmp_path / "a.csv", [(t if i else "hello you there", label if i else "") for i, (t, label) in enumerate(rows)]
    )
    code, folder, card, err = make(headless, file, "--multi-label", "--epochs", "24")
    assert code == 0, err
    assert "any number of labels per text: 0 billing (" in err
    assert card["task"] == MULTI
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert card["training"]["held_out_accuracy"][card["training"]["best_epoch"]] > 0.6
    exported = tmp_path / "exported"
    code, _, err = say("quantize", "--model", folder, "--exported", exported)
    assert code == 0, err
    (tmp_path / "in.csv").write_text("text\n" + "\n".join(text for text, _ in rows) + "\n")
    options = ["--model", folder, "--exported", exported, "--output", tmp_path / "out.jsonl"]
    code, _, err = say("predict", "onnx-int8", tmp_path / "in.csv", *options)
    assert code == 0, err
    predictions = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in predictions} >= {"billing", "delivery", "billing|technical"}
    for row in predictions:
        probabilities = {name: row[f"score_{name}"] for name in WORDS}
        assert row["prediction"] == "|".join(name for name in WORDS if probabilities[name] > 0.5)
    monkeypatch.chdir(tmp_path)
    options = ["--data", file, "--variant", "torch-fp32", "--quick"]
    code, out, err = say("bench", *options, "--model", folder, "--exported", exported, "--json")
    assert code == 0, err
    row = json.loads(out)[0]
    assert row["accuracy"]["value"] == pytest.approx(card["judged"]["accuracy"], abs=1e-4)
    for name in ("macro_f1", "balanced_accuracy"):
        assert row["quality"][name] == pytest.approx(card["judged"][name], abs=1e-4)
    # The runner in the bundle gives the same labels as `predict`.
    code, _, err = say("ship", "onnx-int8", "--target", "python", "--model", folder, "--exported", exported)
    assert code == 0, err
    bundle = exported / "out" / "bundle-python"
    run = subprocess.run(
        [sys.executable, "classify.py", predictions[3]["text"]],
        cwd=bundle,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split("\t")[0] == predictions[3]["prediction"]


@pytest.mark.slow
def test_finetune_learns_pairs_of_texts(make, headless, tmp_path, say):
    """The label says whether the two texts of a pair are equal, so the model must read both texts."""
    rows = [
        {
            "a": ("bad", "good")[i % 2],
            "b": ("bad", "good")[i // 2 % 2],
            "label": "same" if i % 2 == i // 2 % 2 else "other",
        }
        for i in range(200)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--text-column", "a", "--text-pair-column", "b"]
    code, folder, card, err = make(headless, file, *options, "--epochs", "20")
    assert code == 0, err
    assert max(card["training"]["held_out_accuracy"]) > 0.9
    exported = tmp_path / "exported"
    model_options = ["--model", folder, "--exported", exported]
    code, _, err = say("predict", "onnx-int8", file, *options, *model_options, "--output", tmp_path / "out.csv")
    assert code == 0, err
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "text,text_pair,prediction,score_other,score_same"
    correct = sum(line.split(",")[2] == row["label"] for line, row in zip(lines[1:], rows, strict=True))
    assert correct > 0.9 * len(rows)
    code, _, err = say("prune", "--ratio", "0.3", "--recover", "1", "--train-data", file, *options, *model_options)
    assert code == 0, err
    manifest = json.loads((exported / "out" / "torch-pruned30-r1" / "manifest.json").read_text())
    assert manifest["facts"]["recovery"]["pairs"] == 0


@pytest.mark.slow
def test_a_student_with_a_teacher_is_closer_to_it(make, headless, tickets, tmp_path):
    code, teacher, _, _ = make(headless, tickets, "--epochs", "8", output="teacher")
    assert code == 0
    code, student, student_card, err = make(
        headless, tickets, "--epochs", "2", "--teacher", teacher, "--seed", "3", output="student"
    )
    assert code == 0, err
    assert student_card["teacher"].startswith("sha256:")
    code, untaught_student, _, _ = make(headless, tickets, "--epochs", "2", "--seed", "3", output="alone")
    assert code == 0
    assert weights_of(student).keys() == weights_of(untaught_student).keys()
    ids = torch.arange(1000, 1400).reshape(50, 8)

    def probabilities_of(folder):
        with torch.inference_mode():
            return load_model(folder)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(1)

    taught_distance, untaught_distance = (
        (probabilities_of(folder) - probabilities_of(teacher)).abs().mean() for folder in (student, untaught_student)
    )
    assert taught_distance < untaught_distance


def test_a_teacher_of_other_labels_or_tokens_is_refused(make, headless, tickets, tmp_path, tiny_checkpoint):
    code, _, _, err = make(headless, tickets, "--teacher", tiny_checkpoint)
    assert code == 1
    assert "has the labels NEGATIVE, POSITIVE, but the model has billing, delivery, technical" in err
    teacher = make_checkpoint(tmp_path / "other", labels=tuple(WORDS))
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    first_token, second_token = "##ing", "##ed"
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first_token], vocabulary[second_token] = vocabulary[second_token], vocabulary[first_token]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, folder, _, err = make(headless, tickets, "--teacher", teacher)
    assert code == 1
    assert "has another vocabulary than the base" in err
    assert not folder.exists()


@pytest.mark.slow
def test_a_teacher_of_another_architecture_gets_its_own_inputs(make, headless, tickets, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    names = dict(enumerate(WORDS))
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    teacher = tmp_path / "bert"
    BertForSequenceClassification(config).save_pretrained(teacher)
    for name in checkpoints.TOKENIZER_FILES:
        if (headless / name).is_file():
            shutil.copyfile(headless / name, teacher / name)
    assert make(headless, tickets, "--teacher", teacher, "--epochs", "1")[0] == 0
    # A student that takes token types can learn from a teacher that takes none.
    distilbert_folder = make(headless, tickets, "--epochs", "1", output="distilbert")[1]
    tokenizer = json.loads((teacher / "tokenizer_config.json").read_text())
    tokenizer["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (teacher / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    code, _, _, err = make(teacher, tickets, "--teacher", distilbert_folder, "--epochs", "1", output="student")
    assert code == 0, err


@pytest.mark.slow
def test_a_loss_of_nan_ends_training_and_keeps_the_last_good_state(make, headless, tickets, monkeypatch, tmp_path):
    from toolchain.training import losses

    # Training steps are numbered from 0. Step -1 stands for the loss on the held-out rows before the first step.
    count = iter(range(-1, 100))
    original_loss = losses.task_loss
    monkeypatch.setattr(losses, "task_loss", lambda *a: original_loss(*a) * (float("nan") if next(count) == 6 else 1.0))
    code, folder, _, err = make(headless, tickets, "--epochs", "3")
    assert code == 1
    assert "the loss is nan at step 6" in err
    assert "lower learning rate" in err
    assert not folder.exists()
    state_folder = publishing.work_folder(tmp_path / "out") / "training"
    assert str(state_folder) in err
    state = json.loads((state_folder / "state.json").read_text())
    assert (state["step"], len(state["held_out"])) == (6, 1)
    stored_tensors = load_file(state_folder / "6.weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in stored_tensors.values())
    # If the loss is finite again, the same command continues the training.
    code, _, card, _ = make(headless, tickets, "--epochs", "3")
    assert code == 0
    assert card["training"]["steps"] == 42
    assert not state_folder.exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("", "a"), *[(f"text {i}", "ab"[i % 2]) for i in range(40)]],
            "1 rows have an empty text; the first is row 1",
        ),
        ([(f"text {i}", "ab"[i % 2]) for i in range(10)], "10 rows, which are too few"),
    ],
)
def test_empty_texts_or_too_few_rows_are_refused(make, tiny_checkpoint, tmp_path, rows, message):
    code, folder, _, err = make(tiny_checkpoint, write(tmp_path / "a.csv", rows))
    assert code == 1
    assert message in err
    assert not folder.exists()


def test_max_length_truncates_a_text_of_a_hundred_thousand_words(make, headless, tmp_path):
    rows = [(f"{'good ' * 100_000 if i == 7 else 'bad film'} {i}", "ab"[i % 2]) for i in range(40)]
    code, _, card, err = make(headless, write(tmp_path / "a.csv", rows), "--epochs", "1", "--max-length", "32")
    assert code == 0, err
    assert card["max_length"] == 32


def test_a_base_that_does_not_fit_is_refused(make, headless, tickets, tmp_path):
    def error_of(base, *options):
        code, folder, _, err = make(base, tickets, *options)
        assert code == 1
        assert not folder.exists()
        return err

    assert "has no tokenizer" in error_of(_copy_without(headless, tmp_path / "1", *checkpoints.TOKENIZER_FILES))
    assert "takes at most 512 tokens, not 513" in error_of(headless, "--max-length", "513")
    folder = shutil.copytree(headless, tmp_path / "2")
    tensors = weights_of(folder)
    save_file({k: v for k, v in tensors.items() if "layer.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    assert "has no weights of the right shape for distilbert.transformer.layer.1" in error_of(folder)
    folder = shutil.copytree(headless, tmp_path / "3")
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:1000].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "embeddings.word_embeddings.weight" in error_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    assert "The tokenizer has 30522 tokens, but the embedding table has 1000 rows" in error_of(folder)


def _copy_without(folder, copy, *names):
    shutil.copytree(folder, copy)
    for name in names:
        (copy / name).unlink(missing_ok=True)
    return copy


@pytest.mark.slow
def test_a_killed_training_continues_and_ends_with_the_same_bytes(headless, tickets, tmp_path, make):
    _, complete_folder, card, _ = make(headless, tickets, "--epochs", "3", output="whole")
    arguments = ["finetune", "--base", headless, "--train-data", tickets, "--epochs", "3", "--lr", "2e-3"]
    arguments += ["--output", tmp_path / "out"]
    code = (
        "import sys, time, toolchain.training.loop as t; from toolchain.cli import main; "
        "t.SAVE_EVERY_S = 0; learn = t._Run.learn; "
        "t._Run.learn = lambda run, part: (time.sleep(0.3), learn(run, part))[1]; sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if "epoch 2" in line:
            break
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    assert (publishing.work_folder(tmp_path / "out") / "training" / "state.json").is_file()
    result, folder, resumed_card, _ = make(headless, tickets, "--epochs", "3")
    assert result == 0
    assert resumed_card["training"]["held_out_accuracy"] == card["training"]["held_out_accuracy"]
    assert sha256(folder / "model.safetensors") == sha256(complete_folder / "model.safetensors")
    assert not publishing.work_folder(tmp_path / "out").exists()


@pytest.mark.slow
def test_float16_training_reaches_its_accuracy(make, headless, tickets, monkeypatch):
    monkeypatch.setattr(loop.mixed_precision, "precision", lambda device: torch.float16)
    code, _, card, err = make(headless, tickets, "--epochs", "8")
    assert code == 0, err
    assert card["training"]["precision"] == "float16"
    assert max(card["training"]["held_out_accuracy"]) > 0.8


@pytest.mark.parametrize(
    "options", [["--labels", "a,a"], ["--labels", "a,,b"], ["--epochs", "0"], ["--lr", "0"], ["--batch-size", "0"]]
)
def test_a_wrong_option_gives_a_usage_error(say, options, tmp_path):
    assert say("finetune", "--base", "reference", "--output", tmp_path / "x", *options)[0] == 2


def test_a_bert_read_as_distilbert_gives_the_same_states(tmp_path):
    from transformers import BertConfig, BertModel

    from toolchain.reference.rebuild import load_distilbert

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertModel(BertConfig(**shape, vocab_size=500, initializer_range=0.3)).eval()
    bert.save_pretrained(tmp_path)
    rebuilt = load_distilbert(tmp_path)
    ids = torch.arange(5, 65).reshape(4, 15)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.inference_mode():
        bert_states, distilbert_states = (
            model(input_ids=ids, attention_mask=mask).last_hidden_state for model in (bert, rebuilt)
        )
    assert torch.allclose(bert_states[mask.bool()], distilbert_states[mask.bool()], atol=1e-5)
