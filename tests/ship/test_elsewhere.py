"""Loads artifacts and bundles with transformers' pipeline and with optimum, which do not import this package.

`make test-clients` installs transformers 5, which no release of optimum supports. Without transformers 5, the
tests of transformers 5 are skipped.
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


def probabilities_here(artifact, runtime, texts=TEXTS):
    """Returns the label probabilities that this package computes, one text at a time."""
    manifest = artifact.manifest
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    session = open_session(artifact.path, runtime, Place("cpu", 1))
    logits = [session.run(pad([row], encoder.names, encoder.pad_id))[0] for row in encoder.encode(texts)]
    return [
        dict(zip(manifest.labels, row, strict=True)) for row in label_probabilities(np.array(logits), False).tolist()
    ]


def probabilities_of(classify, texts=TEXTS):
    return [{row["label"]: row["score"] for row in rows} for rows in classify(texts)]


def optimum_pipeline(folder):
    """Returns the pipeline from optimum's documentation, with the session options for exact products."""
    model = ORTModelForSequenceClassification.from_pretrained(folder, session_options=session_options(1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)


def run_transformers_5(folder, tmp_path, texts=TEXTS):
    """Returns the label probabilities of a pipeline of transformers 5."""
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    command = [TRANSFORMERS_5, TESTS / "clients" / "pipeline.py", folder, tmp_path / "texts.json"]
    completed = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    output = json.loads(completed.stdout.splitlines()[-1])
    assert output["version"].startswith("5.")
    return output["answers"]


def require_equal_answers(answers, expected_answers):
    assert len(answers) == len(expected_answers)
    for answer, expected_answer in zip(answers, expected_answers, strict=True):
        assert answer == pytest.approx(expected_answer, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["torch-fp32", "torch-bf16"])
def test_a_pipeline_gives_the_probabilities_of_the_variant(built_tiny, variant):
    artifact = ensure(built_tiny, [variant], {}, quiet)[variant]
    classify = transformers.pipeline("text-classification", model=str(artifact.path), top_k=None)
    expected_rows = probabilities_here(artifact, "torch")
    for row, expected_row in zip(probabilities_of(classify), expected_rows, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-4 if variant == "torch-fp32" else 0.02)


@needs_transformers_5
def test_a_pipeline_of_transformers_5_gives_the_probabilities_of_the_reference(reference, tmp_path):
    texts = list(inputs.load_embedded().sample(50, 7)) + TEXTS
    answers = run_transformers_5(reference.path("torch-fp32"), tmp_path, texts)
    require_equal_answers(answers, probabilities_here(reference.load("torch-fp32"), "torch", texts))


@pytest.mark.parametrize("client", ["transformers", "optimum"])
def test_the_code_of_the_readme_runs(reference, client, tmp_path):
    (tmp_path / "exported").symlink_to(reference.exported)
    code = [sys.executable, "-c", snippet(client)]
    completed = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "'POSITIVE'" in completed.stdout, completed.stderr


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_tokenizer_of_every_architecture_gives_the_models_inputs(tmp_path, kind):
    checkpoint = make_architecture(tmp_path / "checkpoint", kind)
    (tmp_path / "imported").mkdir()
    import_result = import_checkpoint(import_job(checkpoint, tmp_path / "imported"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "imported")
    assert set(tokenizer(TEXTS[0])) == {spec.name for spec in import_result.inputs} == set(ARCHITECTURES[kind].inputs)
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "imported"), top_k=None)
    assert set(probabilities_of(classify, TEXTS[:1])[0]) == {"NEGATIVE", "POSITIVE"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["onnx-std", "onnx-fp32", "onnx-int8", "onnx-std-int8"])
def test_optimum_gives_the_probabilities_of_the_variant(built_tiny, variant):
    artifact = ensure(built_tiny, [variant], {}, quiet)[variant]
    require_equal_answers(probabilities_of(optimum_pipeline(artifact.path)), probabilities_here(artifact, "onnx"))


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
def test_optimum_loads_the_first_model_of_a_bundle(built_tiny, tmp_path, target, variants):
    shipping.ship(built_tiny, Order(variants, target, demo=False), tmp_path / "b", quiet, no_bar)
    require_equal_answers(
        probabilities_of(optimum_pipeline(tmp_path / "b")), probabilities_here(built_tiny.load(variants[0]), "onnx")
    )


def test_only_the_first_model_of_a_bundle_has_the_default_name(built_tiny, tmp_path):
    body = shipping.ship(built_tiny, Order(("onnx-fp32", "onnx-int8"), "python"), tmp_path / "b", quiet, no_bar)
    assert [model["file"] for model in body["models"]] == ["model.onnx", "onnx-int8.onnx"]


@pytest.fixture(scope="module")
def unloadable_variants(built_tiny):
    """Two variants that transformers cannot load: one with int8 layers, and one that lost a whole layer by pruning."""
    steps = {"torch-pruned50+depth": Prune(0.5, layers=1)}
    return ensure(built_tiny, ["torch-int8", "torch-pruned50+depth"], steps, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["torch-int8", "torch-pruned50+depth"])
def test_transformers_refuses_a_variant_that_it_cannot_build(unloadable_variants, variant):
    folder = unloadable_variants[variant].path
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.slow
@needs_transformers_5
@pytest.mark.parametrize("variant", ["torch-int8", "torch-pruned50+depth"])
def test_transformers_5_refuses_a_variant_that_it_cannot_build(unloadable_variants, tmp_path, variant):
    with pytest.raises(AssertionError, match=r"no file named .*model\.safetensors"):
        run_transformers_5(unloadable_variants[variant].path, tmp_path)
