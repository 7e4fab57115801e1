"""A checkpoint of one's own: labelled texts to a folder the other commands take, and what can go wrong on the way."""

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
from toolchain.models import checkpoints
from toolchain.training import loop

WORDS = {
    "billing": "I was charged twice on the invoice and want a refund of the payment",
    "delivery": "the parcel did not arrive and the courier lost my order",
    "technical": "the app crashes with an error when I log in",
}


def sentences(count, words=WORDS, seed=1):
    """(text, label) rows whose label can be told by their words."""
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
    """The encoder of the tiny checkpoint alone, as a base from the hub has it."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["DistilBertModel"]}))
    weights = load_file(folder / "model.safetensors")
    inner = {name.removeprefix("distilbert."): t for name, t in weights.items() if name.startswith("distilbert.")}
    save_file(inner, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def make(say, tmp_path):
    """Runs `finetune` on a base and a file: exit code, the folder, the card, standard error."""

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


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.usefixtures("short_bench")
def test_a_base_without_a_head_learns_the_labels_of_the_data(make, headless, tickets, say, tmp_path, monkeypatch):
    code, folder, card, err = make(headless, tickets, "--epochs", "8")
    assert code == 0, err
    assert card["labels"] == ["billing", "delivery", "technical"]
    assert "120 rows, one label per text: 0 billing (40), 1 delivery (40), 2 technical (40); a new head" in err
    history = card["training"]
    assert (history["rows"], history["held_out_rows"]) == (108, 12)
    assert history["held_out_accuracy"][history["best_epoch"]] == max(history["held_out_accuracy"]) > 0.8
    assert card["judged"]["rows"] == 12
    assert card["judged"]["accuracy"] == pytest.approx(max(history["held_out_accuracy"]), abs=1e-4)
    assert {"balanced_accuracy", "macro_f1"} < set(card["judged"])
    assert str(tmp_path) not in (folder / "training.json").read_text()  # a local base is named, not its place
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "billing", "1": "delivery", "2": "technical"}
    # Every other command takes it, and what it learnt is not what it is judged by.
    exported = tmp_path / "exported"
    code, _, err = say("export", "--model", folder, "--exported", exported)
    assert code == 0, err
    options = ["--data", tickets, "--variant", "onnx-fp32", "--quick", "--model", folder, "--exported", exported]
    monkeypatch.chdir(tmp_path)
    code, out, err = say("bench", *options, "--json")
    assert code == 0, err
    assert "only the rows held out then are asked" in err
    assert json.loads(out)[0]["accuracy"]["count"] == 12
    assert json.loads(out)[0]["accuracy"]["value"] == pytest.approx(card["judged"]["accuracy"], abs=1e-4)


def test_the_same_again_does_nothing_and_something_else_is_not_written_over(make, tiny_checkpoint, tickets, tmp_path):
    code, folder, card, _ = make(tiny_checkpoint, tickets, "--epochs", "1")
    assert code == 0
    before = (folder / "model.safetensors").stat().st_mtime_ns
    code, _, again, err = make(tiny_checkpoint, tickets, "--epochs", "1")
    assert (code, again) == (0, card)
    assert "unchanged" in err
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    code, _, _, err = make(tiny_checkpoint, tickets, "--epochs", "2")
    assert code == 1
    assert "was trained with other settings" in err
    (tmp_path / "mine").mkdir()
    code, _, _, err = make(tiny_checkpoint, tickets, output="mine")
    assert code == 1
    assert "`toolchain finetune` did not write it" in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_the_same_training_gives_the_same_bytes(make, headless, tickets):
    _, one, _, _ = make(headless, tickets, "--epochs", "1", output="one")
    _, two, _, _ = make(headless, tickets, "--epochs", "1", output="two")
    _, other, _, _ = make(headless, tickets, "--epochs", "1", "--seed", "21", output="three")
    assert sha256(one / "model.safetensors") == sha256(two / "model.safetensors")
    assert sha256(one / "model.safetensors") != sha256(other / "model.safetensors")


def test_dropout_is_on_while_it_learns_and_off_when_it_is_judged(make, headless, tickets, monkeypatch):
    modes = []
    learn, accuracy = loop._Run.learn, loop.accuracy

    def watched(model, rows):
        modes.append(("judged", model.training))
        return accuracy(model, rows)

    def learning(run, part):
        handle = run._model.register_forward_pre_hook(lambda module, _: modes.append(("learns", module.training)))
        try:
            return learn(run, part)
        finally:
            handle.remove()

    monkeypatch.setattr(loop, "accuracy", watched)
    monkeypatch.setattr(loop._Run, "learn", learning)
    assert make(headless, tickets, "--epochs", "1")[0] == 0
    assert set(modes) == {("judged", False), ("learns", True)}


def test_a_classifier_of_the_same_labels_goes_on_with_its_head(make, tiny_checkpoint, tmp_path):
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
    ("labels", "options", "says"),
    [
        (["positive", "posititve"], [], "has the labels NEGATIVE, POSITIVE, but .* has posititve, positive.*--labels"),
        (["0", "1", "2"], [], "has LABEL_0, LABEL_1, LABEL_2.*--labels"),
        (["a", "b"], ["--labels", "a,c"], "row 2: the label 'b' is not one of the model's"),
        (["a", "a"], [], "only one label"),
    ],
)
def test_labels_are_never_guessed(make, tiny_checkpoint, tmp_path, labels, options, says):
    import re

    file = write(tmp_path / "a.csv", [(f"text {i}", labels[i % len(labels)]) for i in range(40)])
    code, folder, _, err = make(tiny_checkpoint, file, *options)
    assert code == 1
    assert re.search(says, err), err
    assert not folder.exists()


def test_named_labels_are_a_new_head_in_their_order(make, tiny_checkpoint, tmp_path):
    file = write(tmp_path / "a.csv", [(f"text {i}", i % 2) for i in range(40)])
    code, folder, card, _ = make(tiny_checkpoint, file, "--labels", "no, yes, maybe", "--epochs", "1")
    assert code == 0
    assert card["labels"] == ["no", "yes", "maybe"]
    assert checkpoints.label_set(folder, checkpoints.config_of(folder)).names == ("no", "yes", "maybe")


@pytest.mark.usefixtures("short_bench")
def test_sets_of_labels_from_the_file_to_the_prediction(make, headless, tmp_path, say, monkeypatch):
    both = {**WORDS, "billing|technical": f"{WORDS['billing']} {WORDS['technical']}"}
    rows = sentences(160, both)
    file = write(
        tmp_path / "a.csv", [(t if i else "hello you there", label if i else "") for i, (t, label) in enumerate(rows)]
    )
    code, folder, card, err = make(headless, file, "--multi-label", "--epochs", "24")
    assert code == 0, err
    assert "any number of labels per text: 0 billing (" in err
    assert card["multi_label"]
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert card["training"]["held_out_accuracy"][card["training"]["best_epoch"]] > 0.6
    exported = tmp_path / "exported"
    code, _, err = say("quantize", "--model", folder, "--exported", exported)
    assert code == 0, err
    (tmp_path / "in.csv").write_text("text\n" + "\n".join(text for text, _ in rows) + "\n")
    options = ["--model", folder, "--exported", exported, "--output", tmp_path / "out.jsonl"]
    code, _, err = say("predict", "onnx-int8", tmp_path / "in.csv", *options)
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in found} >= {"billing", "delivery", "billing|technical"}
    for row in found:
        chances = {name: row[f"score_{name}"] for name in WORDS}
        assert row["prediction"] == "|".join(name for name in WORDS if chances[name] > 0.5)
    monkeypatch.chdir(tmp_path)
    options = ["--data", file, "--variant", "torch-fp32", "--quick"]
    code, out, err = say("bench", *options, "--model", folder, "--exported", exported, "--json")
    assert code == 0, err
    row = json.loads(out)[0]
    assert row["accuracy"]["value"] == pytest.approx(card["judged"]["accuracy"], abs=1e-4)
    for name in ("macro_f1", "balanced_accuracy"):
        assert row["quality"][name] == pytest.approx(card["judged"][name], abs=1e-4)
    # The bundle's own runner says so too.
    code, _, err = say("ship", "onnx-int8", "--target", "python", "--model", folder, "--exported", exported)
    assert code == 0, err
    bundle = exported / "out" / "bundle-python"
    run = subprocess.run(
        [sys.executable, "classify.py", found[3]["text"]],
        cwd=bundle,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split("\t")[0] == found[3]["prediction"]


def test_pairs_of_texts(make, headless, tmp_path, say):
    """The label is whether both texts are of the same kind, which neither says alone."""
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
    where = ["--model", folder, "--exported", exported]
    code, _, err = say("predict", "onnx-int8", file, *options, *where, "--output", tmp_path / "out.csv")
    assert code == 0, err
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "text,text_pair,prediction,score_other,score_same"
    right = sum(line.split(",")[2] == row["label"] for line, row in zip(lines[1:], rows, strict=True))
    assert right > 0.9 * len(rows)
    code, _, err = say("prune", "--ratio", "0.3", "--recover", "1", "--train-data", file, *options, *where)
    assert code == 0, err
    manifest = json.loads((exported / "out" / "torch-pruned30-r1" / "manifest.json").read_text())
    assert manifest["facts"]["recovery"]["pairs"] == 0


def test_a_teacher_is_learnt_from(make, headless, tickets, tmp_path):
    code, teacher, _, _ = make(headless, tickets, "--epochs", "8", output="teacher")
    assert code == 0
    code, student, own, err = make(
        headless, tickets, "--epochs", "2", "--teacher", teacher, "--seed", "3", output="student"
    )
    assert code == 0, err
    assert own["teacher"].startswith("sha256:")
    code, alone, _, _ = make(headless, tickets, "--epochs", "2", "--seed", "3", output="alone")
    assert code == 0
    assert weights(student).keys() == weights(alone).keys()
    ids = torch.arange(1000, 1400).reshape(50, 8)

    def answers(folder):
        with torch.inference_mode():
            return load_model(folder)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(1)

    taught, untaught = ((answers(folder) - answers(teacher)).abs().mean() for folder in (student, alone))
    assert taught < untaught


def test_a_teacher_of_other_labels_or_tokens_is_refused(make, headless, tickets, tmp_path, tiny_checkpoint):
    code, _, _, err = make(headless, tickets, "--teacher", tiny_checkpoint)
    assert code == 1
    assert "has the labels NEGATIVE, POSITIVE, but the model has billing, delivery, technical" in err
    teacher = make_checkpoint(tmp_path / "other", labels=tuple(WORDS))
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    first, second = "##ing", "##ed"
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, folder, _, err = make(headless, tickets, "--teacher", teacher)
    assert code == 1
    assert "has another vocabulary than the base" in err
    assert not folder.exists()


def test_a_teacher_of_another_architecture_is_asked_what_it_takes(make, headless, tickets, tmp_path):
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
    # And the other way round: a student that takes token types, a teacher that does not.
    first = make(headless, tickets, "--epochs", "1", output="distilbert")[1]
    tokenizer = json.loads((teacher / "tokenizer_config.json").read_text())
    tokenizer["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (teacher / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    code, _, _, err = make(teacher, tickets, "--teacher", first, "--epochs", "1", output="student")
    assert code == 0, err


def test_a_loss_that_is_no_number_ends_it_and_keeps_what_was(make, headless, tickets, monkeypatch, tmp_path):
    from toolchain.training import losses

    count = iter(range(-1, 100))  # the first are the held-out rows
    whole = losses.task_loss
    monkeypatch.setattr(losses, "task_loss", lambda *a: whole(*a) * (float("nan") if next(count) == 6 else 1.0))
    code, folder, _, err = make(headless, tickets, "--epochs", "3")
    assert code == 1
    assert "the loss is nan at step 6" in err
    assert "lower learning rate" in err
    assert not folder.exists()
    kept = publishing.work_folder(tmp_path / "out") / "training"
    assert str(kept) in err
    state = json.loads((kept / "state.json").read_text())
    assert (state["step"], len(state["held_out"])) == (6, 1)
    stored = load_file(kept / "6.weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())
    # A finite loss again: the same command goes on from there.
    code, _, card, _ = make(headless, tickets, "--epochs", "3")
    assert code == 0
    assert card["training"]["steps"] == 42
    assert not kept.exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [("", "a"), *[(f"text {i}", "ab"[i % 2]) for i in range(40)]],
            "1 rows have an empty text, the first is row 1",
        ),
        ([(f"text {i}", "ab"[i % 2]) for i in range(10)], "10 rows, which are too few"),
    ],
)
def test_texts_there_is_nothing_to_learn_from(make, tiny_checkpoint, tmp_path, rows, says):
    code, folder, _, err = make(tiny_checkpoint, write(tmp_path / "a.csv", rows))
    assert code == 1
    assert says in err
    assert not folder.exists()


def test_texts_of_a_hundred_thousand_words(make, headless, tmp_path):
    rows = [(f"{'good ' * 100_000 if i == 7 else 'bad film'} {i}", "ab"[i % 2]) for i in range(40)]
    code, _, card, err = make(headless, write(tmp_path / "a.csv", rows), "--epochs", "1", "--max-length", "32")
    assert code == 0, err
    assert card["max_length"] == 32


def test_a_base_that_is_none(make, headless, tickets, tmp_path):
    def refused(base, *options):
        code, folder, _, err = make(base, tickets, *options)
        assert code == 1
        assert not folder.exists()
        return err

    assert "has no tokenizer" in refused(_without(headless, tmp_path / "1", *checkpoints.TOKENIZER_FILES))
    assert "takes at most 512 tokens, not 513" in refused(headless, "--max-length", "513")
    folder = shutil.copytree(headless, tmp_path / "2")
    tensors = weights(folder)
    save_file({k: v for k, v in tensors.items() if "layer.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    assert "has no weights of the right shape for distilbert.transformer.layer.1" in refused(folder)
    folder = shutil.copytree(headless, tmp_path / "3")
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:1000].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "embeddings.word_embeddings.weight" in refused(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    assert "The tokenizer has 30522 tokens, but the embedding table has 1000 rows" in refused(folder)


def _without(folder, copy, *names):
    shutil.copytree(folder, copy)
    for name in names:
        (copy / name).unlink(missing_ok=True)
    return copy


def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(headless, tickets, tmp_path, make):
    _, whole, card, _ = make(headless, tickets, "--epochs", "3", output="whole")
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
    result, folder, again, _ = make(headless, tickets, "--epochs", "3")
    assert result == 0
    assert again["training"]["held_out_accuracy"] == card["training"]["held_out_accuracy"]
    assert sha256(folder / "model.safetensors") == sha256(whole / "model.safetensors")
    assert not publishing.work_folder(tmp_path / "out").exists()


def test_float16_is_scaled_and_resumes(make, headless, tickets, monkeypatch):
    monkeypatch.setattr(loop.mixed_precision, "precision", lambda device: torch.float16)
    code, _, card, err = make(headless, tickets, "--epochs", "8")
    assert code == 0, err
    assert card["training"]["precision"] == "float16"
    assert max(card["training"]["held_out_accuracy"]) > 0.8


@pytest.mark.parametrize(
    "options", [["--labels", "a,a"], ["--labels", "a,,b"], ["--epochs", "0"], ["--lr", "0"], ["--batch-size", "0"]]
)
def test_usage(say, options, tmp_path):
    assert say("finetune", "--base", "reference", "--output", tmp_path / "x", *options)[0] == 2


def test_the_reference_is_rebuilt_from_a_bert_read_as_distilbert(tmp_path):
    from transformers import BertConfig, BertModel

    from toolchain.reference.rebuild import distilbert

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertModel(BertConfig(**shape, vocab_size=500, initializer_range=0.3)).eval()
    bert.save_pretrained(tmp_path)
    made = distilbert(tmp_path)
    ids = torch.arange(5, 65).reshape(4, 15)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.inference_mode():
        one, two = (model(input_ids=ids, attention_mask=mask).last_hidden_state for model in (bert, made))
    assert torch.allclose(one[mask.bool()], two[mask.bool()], atol=1e-5)
