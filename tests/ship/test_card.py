"""Tests of the metadata of model cards: huggingface_hub reads it, and it states measured figures only."""

import json

import pytest
import yaml
from hub_server import card_faults
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from toolchain.build.steps.importing import _training_facts
from toolchain.models.model_card import languages_of
from toolchain.progress import no_bar
from toolchain.ship import bundles, shipping
from toolchain.ship.card import front_matter
from toolchain.ship.shipping import Order

ACCURACY = {"data": "sst2", "accuracy": {"value": 0.9123456789, "count": 872}}
ENTITIES = {"data": "orders.csv", "entities": {"value": 0.5, "precision": 0.4, "recall": 0.6, "count": 10}}
REGRESSION = {"data": "someone/stars:en", "regression": {"r2": -0.25, "mean_absolute_error": 1.5, "count": 10}}
VALIDATION = {"unit": "sentences", "count": 200, "flips": 3}


def body_with(measured="not measured", validation=VALIDATION, target="python", task="single_label", **model):
    provenance = {"name": "tiny", "license": "MIT", "base_model": None, "datasets": [], "languages": [], **model}
    models = [{"variant": "onnx-int8", "measured": measured, "validation": validation}]
    return {"model": provenance, "models": models, "target": target, "task": task}


def read(body):
    """Returns the metadata as huggingface_hub reads it; requires that the hub would accept it."""
    card = front_matter(body) + "# Title\n"
    assert card_faults(card) == []
    return ModelCard(card).data


def figures_of(data):
    return {(each.metric_type, each.metric_value) for each in data.eval_results or []}


@pytest.mark.parametrize(
    ("target", "task", "library", "tag"),
    [
        ("web", "single_label", "transformers.js", "text-classification"),
        ("python", "regression", "onnx", "text-classification"),
        ("other", "token_classification", "onnx", "token-classification"),
    ],
)
def test_a_card_names_its_library_and_its_task(target, task, library, tag):
    data = read(body_with(target=target, task=task))
    assert (data.library_name, data.pipeline_tag) == (library, tag)


@pytest.mark.parametrize(
    ("measured", "figures", "dataset"),
    [
        (ACCURACY, {("accuracy", 0.912346)}, ("nyu-mll/glue", "sst2", "sst2")),
        (ENTITIES, {("f1", 0.5), ("precision", 0.4), ("recall", 0.6)}, ("orders.csv", "orders.csv", None)),
        (REGRESSION, {("r_squared", -0.25), ("mae", 1.5)}, ("someone/stars", "someone/stars:en", "en")),
    ],
)
def test_a_card_states_the_scores_of_the_benchmark(measured, figures, dataset):
    data = read(body_with(measured))
    assert figures_of(data) == figures
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == dataset
    assert result.metric_name.endswith("of onnx-int8")
    assert data.model_name == "tiny"
    assert data.metrics == sorted({metric for metric, _ in figures})


def test_without_a_benchmark_a_card_states_the_agreement_of_the_validation():
    data = read(body_with())
    assert figures_of(data) == {("agreement", 0.985)}
    assert data.eval_results[0].dataset_name == "validation sentences of the toolchain"
    assert figures_of(read(body_with({**ACCURACY, "accuracy": None}))) == {("agreement", 0.985)}


def test_a_card_without_measurements_has_no_figures():
    shift = {"unit": "sentences", "count": 200, "flips": None, "shift": 0.01}
    data = read(body_with(validation=shift, task="regression"))
    assert figures_of(data) == set()
    assert "model-index" not in front_matter(body_with(validation=shift))
    assert data.metrics is None


@pytest.mark.parametrize(
    ("license_", "expected"),
    [
        ("Apache-2.0", ("apache-2.0", None)),
        ("not stated", (None, None)),
        ("My own: terms!", ("other", "my-own-terms")),
        ("<b>", ("other", "b")),
        ("!", ("other", None)),
    ],
)
def test_a_card_names_the_licence_as_the_hub_does(license_, expected):
    data = read(body_with(license=license_))
    assert (data.license, getattr(data, "license_name", None)) == expected


def test_a_card_names_base_data_and_languages():
    data = read(body_with(base_model="a/base", datasets=["a/data"], languages=["en", "no"]))
    assert (data.base_model, data.datasets, data.language) == ("a/base", ["a/data"], ["en", "no"])
    empty = yaml.safe_load(front_matter(body_with()).split("---\n")[1])
    assert not {"base_model", "datasets", "language"} & empty.keys()


def test_hostile_text_in_a_card_stays_text():
    hostile = "a`|``b <b>c</b> [d](http://e) ![f](g)](h) *i* ~~j~~ _k_ &amp; \\ ```\n---\n# l\x1b\u202e"
    measured = {**ACCURACY, "data": hostile}
    card = front_matter(body_with(measured, license=hostile))
    assert card.count("---\n") == 2
    good = front_matter(body_with({**ACCURACY, "data": "good"}, license="good"))
    inline = {child.type for card in (card, good) for t in MarkdownIt().parse(card) for child in t.children or []}
    assert inline <= {"text", "softbreak"}
    assert read(body_with(measured, license=hostile)).license == "other"


def test_the_readme_of_a_bundle_is_its_card(built_tiny, tmp_path):
    order = Order(("onnx-int8", "onnx-fp32"), "python", license="Apache-2.0")
    shipping.ship(built_tiny, order, tmp_path / "bundle", lambda line: None, no_bar)
    body = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    card = ModelCard.load(tmp_path / "bundle" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "Licence: Apache-2.0." in card.text
    for model in body["models"]:
        report = built_tiny.load(model["variant"]).manifest.validation
        assert model["validation"] == {"unit": "sentences", "count": report["sentences"], "flips": report["flips"]}
        sentence = f"predict different labels for {report['flips']} of {report['sentences']} validation sentences"
        assert f"{model['variant']} and the PyTorch model {sentence}" in card.text
    shares = {round(1 - model["validation"]["flips"] / model["validation"]["count"], 6) for model in body["models"]}
    assert {each.metric_value for each in card.data.eval_results} == shares


@pytest.mark.parametrize(
    ("report", "entry", "sentence"),
    [
        ({"sentences": 200, "flips": 3}, VALIDATION, "predict different labels for 3 of 200 validation sentences."),
        (
            {"sentences": 200, "words": 900, "flips": 4},
            {"unit": "words", "count": 900, "flips": 4},
            "predict different labels for 4 of 900 validation words.",
        ),
        (
            {"sentences": 200, "shift": 0.01234},
            {"unit": "sentences", "count": 200, "flips": None, "shift": 0.01234},
            "differ in a score by at most 0.0123 standard deviations of the scores.",
        ),
        (
            {"sentences": 200, "shift": None},
            {"unit": "sentences", "count": 200, "flips": None, "shift": None},
            None,
        ),
        ({"passed": True}, {"unit": "sentences", "count": 0, "flips": None}, None),
    ],
)
def test_the_readme_states_the_figures_of_the_validation(report, entry, sentence):
    assert bundles._validation_entry(report) == entry
    parts = bundles.template_environment().get_template("parts.j2").module
    body = body_with(validation=entry)
    text = parts.measuring(body)
    assert ("* onnx-int8 and the PyTorch model" in text) == (sentence is not None)
    assert (sentence or "") in text
    assert len(read(body).eval_results or []) == (entry["flips"] is not None)


def test_the_card_of_the_reference_names_its_base_and_its_data():
    body = body_with(**vars(shipping.REFERENCE_PROVENANCE))
    data = read(body)
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.datasets == ["nyu-mll/glue"]
    assert (data.license, data.language) == ("apache-2.0", ["en"])


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("language: en\n", ["en"]),
        ("language: [en, 'de']\n", ["en", "de"]),
        ("license: mit\nlanguage:\n- en\n- swe  # Swedish\n- multilingual\ntags:\n- nlp\n", ["en", "swe"]),
        ("language: en-US\n", []),
        ("tags:\n- en\n", []),
    ],
)
def test_the_languages_come_from_the_checkpoints_model_card(tmp_path, text, languages):
    (tmp_path / "README.md").write_text(f"---\n{text}---\n# Title\n")
    assert languages_of(tmp_path) == languages


@pytest.mark.parametrize(
    ("card", "facts"),
    [
        ({"train": "a/b:1", "base": {"kind": "hub", "ref": "a/base"}}, {"trained_on": "a/b:1", "base_model": "a/base"}),
        ({"train": "a.csv:1", "base": {"kind": "folder", "ref": "base"}}, {"trained_on": "a.csv:1"}),
        ({"train": "a.csv:1", "base": {"kind": "hub", "ref": "a\nb"}}, {"trained_on": "a.csv:1"}),
        ({"train": ["a"]}, {}),
        ({}, {}),
    ],
)
def test_base_and_data_come_from_training_json(tmp_path, card, facts):
    (tmp_path / "training.json").write_text(json.dumps(card))
    assert _training_facts(tmp_path) == facts
