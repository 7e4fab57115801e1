"""Tests of regression models: a file of scores becomes a fine-tuned, quantised, measured and shipped model."""

import csv
import json
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_checkpoint, needs_node, verify_in_node
from demo_page import ask_page, needs_chromium, use_npm_packages

from toolchain.build.steps import validate
from toolchain.cli import main
from toolchain.data.inputs import TrainingSource
from toolchain.data.labels import REGRESSION, LabelSet
from toolchain.errors import CheckpointError, DataError
from toolchain.models import checkpoints
from toolchain.results.scores import score_answers

# Words that are common in the validation sentences, so that the scores of these sentences differ as well.
WORTH = {"the": -1, "of": -0.5, "film": 0, "it": 0, "and": 0.5, "a": 1}


def write_reviews(file):
    """Writes texts whose words decide their score."""
    rng = random.Random(1)
    rows = [rng.choices(list(WORTH), k=5) for _ in range(200)]
    lines = [f"{' '.join(words)},{3 + sum(WORTH[word] for word in words) / 2:g}\n" for words in rows]
    file.write_text("text,stars\n" + "".join(lines))
    return file


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A fine-tuned regression model, with the texts and scores of its training data."""
    folder = tmp_path_factory.mktemp("scorer")
    base = make_checkpoint(folder / "base", width=64)
    options = ["--train-data", str(write_reviews(folder / "reviews.csv")), "--label-column", "stars", "--regression"]
    options += ["--epochs", "20", "--lr", "4e-3", "--batch-size", "8", "--output", str(folder / "stars")]
    assert main(["finetune", "--base", str(base), *options]) == 0
    return folder / "stars"


def test_a_base_with_labels_gets_a_head_for_the_score(scorer):
    config, card = checkpoints.config_of(scorer), json.loads((scorer / "training.json").read_text())
    assert checkpoints.label_set(scorer, config) == LabelSet(("score",), REGRESSION)
    assert (config["problem_type"], card["task"], card["training"]["score"]) == ("regression", "regression", "R²")
    assert card["judged"]["r2"] == pytest.approx(max(card["training"]["held_out_accuracy"]), abs=1e-4)
    assert card["judged"]["r2"] > 0.2
    assert 0 < card["judged"]["mean_absolute_error"] < card["judged"]["root_mean_squared_error"] < 1


@pytest.fixture
def reviews(scorer):
    return scorer.parent / "reviews.csv"


@pytest.fixture
def run(scorer, say, monkeypatch):
    """Returns a function that runs a command on the model and returns its standard output.

    Quantisation moves the scores of the tiny model more than those of a real model, so validation allows more.
    """
    monkeypatch.setattr(validate, "MAX_SHIFT", 5.0)

    def invoke(command, *arguments):
        code, out, err = say(command, *arguments, "--model", scorer, "--exported", scorer.parent / "exported")
        assert code == 0, err
        return out

    return invoke


@pytest.mark.usefixtures("short_bench")
def test_the_whole_chain_of_a_regression_model(scorer, run, reviews, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("quantize")
    exported = scorer.parent / "exported" / "stars"
    manifests = {
        name: json.loads((exported / name / "manifest.json").read_text()) for name in ("torch-fp32", "onnx-int8")
    }
    assert {manifest["facts"]["task"] for manifest in manifests.values()} == {"regression"}
    validation = manifests["onnx-int8"]["validation"]
    assert 0 < validation["shift"] <= 5
    assert "flips" not in validation
    # The benchmark stores scores, and derives the errors from them.
    data = ["--data", reviews, "--label-column", "stars"]
    names = ["torch-fp32", "onnx-int8"]
    variants = [option for name in names for option in ("--variant", name)]
    rows = {row["cell"]: row for row in json.loads(run("bench", *data, *variants, "--quick", "--json"))}
    card = json.loads((scorer / "training.json").read_text())
    assert rows["torch-fp32@cpu"]["regression"]["r2"] == pytest.approx(card["judged"]["r2"], abs=1e-3)
    quality = rows["onnx-int8@cpu"]["quality"]
    assert quality["low"] < rows["onnx-int8@cpu"]["regression"]["r2"] < quality["high"]
    assert quality["test"] == "Wilcoxon"
    assert quality["pearson"] > 0.4
    assert 0 < quality["mean_shift"] <= quality["largest_shift"]
    assert "accuracy" not in rows["onnx-int8@cpu"]
    # `predict` gives the score of each text, in a column of its own.
    labelled = list(csv.DictReader(reviews.open(encoding="utf-8")))
    run("predict", "onnx-int8", reviews, "--output", tmp_path / "out.csv")
    predictions = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8")))
    assert list(predictions[0]) == ["text", "score"]
    scores = [float(row["score"]) for row in predictions]
    assert np.corrcoef(scores, [float(row["stars"]) for row in labelled])[0, 1] > 0.4
    # The runner in the bundle gives the same score, up to rounding.
    run("ship", "onnx-int8", "--target", "python", "--output", tmp_path / "bundle")
    line = subprocess.run(
        [sys.executable, "classify.py", labelled[0]["text"]],
        cwd=tmp_path / "bundle",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    score, text = line.rstrip("\n").split("\t")
    assert text == labelled[0]["text"]
    assert float(score) == pytest.approx(scores[0], abs=0.1)  # the scale of an int8 activation depends on the batch
    readme = (tmp_path / "bundle" / "README.md").read_text()
    assert "a text scorer for Python" in readme
    assert "gives a text the score `score`" in readme


@pytest.mark.parametrize("target", ["web", "server", "other", "mobile"])
def test_bundles_of_a_regression_model_give_scores(run, tmp_path, target):
    variant = "onnx-std" if target == "other" else "onnx-int8"
    options = ["--no-demo"] if target == "web" else []
    run("ship", variant, "--target", target, "--output", tmp_path / target, *options)
    body = json.loads((tmp_path / target / "bundle.json").read_text())
    assert (body["task"], body["labels"]) == ("regression", ["score"])
    assert [spec["name"] for spec in body["models"][0]["outputs"]] == ["logits"]
    readme = (tmp_path / target / "README.md").read_text()
    assert "probabilit" not in readme
    assert "softmax" not in readme or target == "web"  # the page says why the pipeline with its softmax is wrong


@needs_node
@pytest.mark.slow
def test_node_gives_the_recorded_scores(run, tmp_path):
    run("ship", "onnx-int8", "onnx-fp32", "--target", "web", "--no-demo", "--output", tmp_path / "web")
    assert len(verify_in_node(tmp_path / "web")) == 2


@needs_chromium
@pytest.mark.web
@pytest.mark.slow
def test_the_demo_page_shows_the_score(run, scorer, tmp_path):
    use_npm_packages(scorer.parent / "exported")
    run("ship", "onnx-int8", "--target", "web", "--output", tmp_path / "web")
    answer, summary = ask_page(tmp_path / "web", tmp_path, "good good film")
    assert re.match(r"score: \d\.\d+\s+onnx-int8 took", answer), answer
    assert "match the recorded logits" in summary


def test_a_graph_with_the_tokenizer_gives_the_score(run, tmp_path):
    run("ship", "onnx-int8", "--target", "python", "--with-tokenizer", "--output", tmp_path / "bundle")
    line = subprocess.run(
        [sys.executable, "classify.py", "a film of the"],
        cwd=tmp_path / "bundle",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    run("predict", "onnx-int8", _file(tmp_path, "text\na film of the\n"), "--output", tmp_path / "out.jsonl")
    score = json.loads((tmp_path / "out.jsonl").read_text())["score"]
    assert float(line.split("\t")[0]) == pytest.approx(score, abs=1e-4)


def _file(folder, text):
    (folder / "in.csv").write_text(text)
    return folder / "in.csv"


def test_pruning_and_recovery_of_a_regression_model(run, scorer, reviews):
    data = ["--train-data", reviews, "--label-column", "stars"]
    out = run("prune", "--ratio", "0.5", "--recover", "1", *data)
    assert "torch-pruned50-r1" in out
    manifest = json.loads((scorer.parent / "exported" / "stars" / "torch-pruned50-r1" / "manifest.json").read_text())
    assert manifest["facts"]["recovery"]["score"] == "R²"


def test_the_sensitivity_of_a_regression_model_has_no_flips(run, reviews):
    layers = json.loads(run("quantize", "--sensitivity", "--train-data", reviews, "--label-column", "stars", "--json"))
    for layer in layers["onnx-fp32"]:
        assert layer["flips"] is None
        assert layer["divergence"] >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_type": "regression", "id2label": {"0": "a", "1": "b"}}, "predicts 2 scores"),
        ({"problem_type": "single_label_classification", "id2label": {"0": "a"}}, "one label, but its problem_type is"),
        (
            {"problem_type": "ranking", "id2label": {"0": "a", "1": "b"}},
            "problem_type 'ranking' of config.json is unknown",
        ),
    ],
)
def test_a_task_that_does_not_fit_the_labels_is_refused(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.label_set(tmp_path, change)


def test_one_label_without_a_problem_type_is_a_regression(tmp_path):
    assert checkpoints.label_set(tmp_path, {"id2label": {"0": "LABEL_0"}}).task == REGRESSION


def test_the_embedded_data_do_not_fit_a_regression_model():
    with pytest.raises(DataError, match="this model answers with a score"):
        TrainingSource().load(LabelSet(("score",), REGRESSION))


SCORES = LabelSet(("score",), REGRESSION)


def test_r2_is_the_explained_share_of_the_variance():
    labels = (1.0, 2.0, 3.0, 4.0)
    assert score_answers(labels, labels, SCORES).value == 1
    assert score_answers((2.5,) * 4, labels, SCORES).value == 0
    score = score_answers((1.5, 2.5, 3.5, 4.5), labels, SCORES)
    assert (score.value, score.mean_absolute_error, score.root_mean_squared_error) == (0.8, 0.5, 0.5)
    assert score_answers((2.0, 2.0), (2.0, 2.0), SCORES).value == 1
    assert score_answers((2.0, 2.5), (2.0, 2.0), SCORES).value == 0


def test_scores_without_the_option_give_an_error_that_names_it(tmp_path, say):
    rows = "".join(f"a film of {number} words,{number / 2}\n" for number in range(1, 40))
    (tmp_path / "a.csv").write_text("text,label\n" + rows)
    base = make_checkpoint(tmp_path / "base")
    code, _, err = say("finetune", "--base", base, "--train-data", tmp_path / "a.csv", "--output", tmp_path / "out")
    assert code == 1
    assert "Add --regression" in err


@pytest.mark.slow
def test_a_regression_model_learns_from_a_teacher_whose_score_has_another_name(scorer, reviews, tmp_path, say):
    teacher = shutil.copytree(scorer, tmp_path / "teacher")
    config = checkpoints.config_of(teacher)
    config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
    (teacher / "config.json").write_text(json.dumps(config))
    options = [
        "--train-data",
        reviews,
        "--label-column",
        "stars",
        "--regression",
        "--teacher",
        teacher,
        "--epochs",
        "1",
    ]
    code, _, err = say("finetune", "--base", scorer, *options, "--output", tmp_path / "out")
    assert code == 0, err


def test_the_limit_for_rounding_grows_with_the_scores():
    from toolchain.ship.bundles import _scale_tolerance

    limits = {"largest": 0.5, "median": 0.01}
    assert _scale_tolerance(limits, [[0.3], [-0.9]]) == limits
    assert _scale_tolerance(limits, [[30.0], [-100.0]]) == {"largest": 50.0, "median": 1.0}
