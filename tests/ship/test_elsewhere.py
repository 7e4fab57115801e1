"""Transformers' pipeline and optimum load folders and bundles; they import nothing of this package.

`make test-clients` installs transformers 5, for which there is no optimum; without it, its tests are skipped.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import transformers
from conftest import ROOT, TESTS, import_job
from optimum.onnxruntime import ORTModelForSequenceClassification
from readme_parts import snippet
from tiny_architectures import ARCHITECTURES
from tiny_architectures import make as make_architecture

from toolchain.artifacts.steps import Prune
from toolchain.backends import Place, open_session
from toolchain.backends.ort import session_options
from toolchain.build.pipeline import ensure
from toolchain.build.steps.importing import import_checkpoint
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import label_probabilities
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.shipping import Order

TRANSFORMERS_5 = ROOT / "exported" / ".cache" / "test-clients" / "transformers5" / "bin" / "python"
TEXTS = ["a charming and often affecting journey .", "a waste of two hours .", "Café naïve, isn't it? 50%", ""]

needs_transformers_5 = pytest.mark.skipif(not TRANSFORMERS_5.exists(), reason="needs `make test-clients`")


def quiet(*_):
    pass


def expected(artifact, runtime, texts=TEXTS):
    """The label probabilities that this package computes, one text at a time."""
    manifest = artifact.manifest
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    session = open_session(artifact.path, runtime, Place("cpu", 1))
    logits = [session.run(pad([row], encoder.names, encoder.pad_id))[0] for row in encoder.encode(texts)]
    return [
        dict(zip(manifest.labels, row, strict=True)) for row in label_probabilities(np.array(logits), False).tolist()
    ]


def answered(classify, texts=TEXTS):
    return [{row["label"]: row["score"] for row in rows} for rows in classify(texts)]


def in_optimum(folder):
    """The pipeline of optimum's documentation, with the session options that exact products need on this processor."""
    model = ORTModelForSequenceClassification.from_pretrained(folder, session_options=session_options(1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)


def in_transformers_5(folder, tmp_path, texts=TEXTS):
    """The answers of a pipeline there."""
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    command = [TRANSFORMERS_5, TESTS / "clients" / "pipeline.py", folder, tmp_path / "texts.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("5.")
    return found["answers"]


def alike(answers, wanted):
    assert len(answers) == len(wanted)
    for found, known in zip(answers, wanted, strict=True):
        assert found == pytest.approx(known, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["torch-fp32", "torch-bf16"])
def test_a_pipeline_answers_as_the_variant_does(built_tiny, variant):
    artifact = ensure(built_tiny, [variant], {}, quiet)[variant]
    classify = transformers.pipeline("text-classification", model=str(artifact.path), top_k=None)
    wanted = expected(artifact, "torch")
    for found, known in zip(answered(classify), wanted, strict=True):
        assert found == pytest.approx(known, abs=1e-4 if variant == "torch-fp32" else 0.02)


@needs_transformers_5
def test_a_pipeline_of_transformers_5_answers_as_the_reference_does(reference, tmp_path):
    texts = list(inputs.load_embedded().sample(50, 7)) + TEXTS
    answers = in_transformers_5(reference.path("torch-fp32"), tmp_path, texts)
    alike(answers, expected(reference.load("torch-fp32"), "torch", texts))


@pytest.mark.parametrize("client", ["transformers", "optimum"])
def test_the_code_of_the_readme_runs(reference, client, tmp_path):
    (tmp_path / "exported").symlink_to(reference.exported)
    code = [sys.executable, "-c", snippet(client)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "'POSITIVE'" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_tokenizer_of_every_architecture_gives_what_the_model_takes(tmp_path, kind):
    checkpoint = make_architecture(tmp_path / "checkpoint", kind)
    (tmp_path / "imported").mkdir()
    built = import_checkpoint(import_job(checkpoint, tmp_path / "imported"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "imported")
    assert set(tokenizer(TEXTS[0])) == {spec.name for spec in built.inputs} == set(ARCHITECTURES[kind].inputs)
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "imported"), top_k=None)
    assert set(answered(classify, TEXTS[:1])[0]) == {"NEGATIVE", "POSITIVE"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["onnx-std", "onnx-fp32", "onnx-int8", "onnx-std-int8"])
def test_optimum_answers_as_the_variant_does(built_tiny, variant):
    artifact = ensure(built_tiny, [variant], {}, quiet)[variant]
    alike(answered(in_optimum(artifact.path)), expected(artifact, "onnx"))


BUNDLES = [
    ("python", ("onnx-int8",)),
    ("python", ("onnx-int8", "onnx-fp32")),
    ("other", ("onnx-std",)),
    ("web", ("onnx-fp32",)),
    ("web", ("onnx-int8",)),
    ("mobile", ("onnx-int8",)),
    ("server", ("onnx-int8",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "variants"), BUNDLES)
def test_optimum_finds_the_first_model_of_a_bundle(built_tiny, tmp_path, target, variants):
    shipping.ship(built_tiny, Order(variants, target, demo=False), tmp_path / "b", quiet, no_bar)
    alike(answered(in_optimum(tmp_path / "b")), expected(built_tiny.load(variants[0]), "onnx"))


def test_a_bundle_of_two_models_does_not_leave_the_choice_to_chance(built_tiny, tmp_path):
    body = shipping.ship(built_tiny, Order(("onnx-fp32", "onnx-int8"), "python"), tmp_path / "b", quiet, no_bar)
    assert [model["file"] for model in body["models"]] == ["model.onnx", "onnx-int8.onnx"]


@pytest.fixture(scope="module")
def not_transformers(built_tiny):
    """Variants whose layers transformers cannot make: of a pruned model, one whose missing layer fits no other's."""
    asked = {"torch-pruned50+depth": Prune(0.5, layers=1)}
    return ensure(built_tiny, ["torch-int8", "torch-pruned50+depth"], asked, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["torch-int8", "torch-pruned50+depth"])
def test_transformers_refuses_a_folder_that_it_cannot_load(not_transformers, variant):
    folder = not_transformers[variant].path
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.slow
@needs_transformers_5
@pytest.mark.parametrize("variant", ["torch-int8", "torch-pruned50+depth"])
def test_nor_by_transformers_5(not_transformers, tmp_path, variant):
    with pytest.raises(AssertionError, match=r"no file named .*model\.safetensors"):
        in_transformers_5(not_transformers[variant].path, tmp_path)
