"""Loads artifacts and bundles with transformers 4.57, transformers 5 and optimum, which do not import this package.

Child processes load the artifacts and bundles in environments that `make test-clients` installs. If an environment is
missing, pytest skips the tests that use child processes. The tests run optimum with transformers 4.57, because
optimum-onnx needs that release.
"""

import contextlib
import functools
import json
import os
import subprocess

import numpy as np
import pytest
import transformers
from conftest import ROOT, TESTS, import_job
from readme_parts import snippet
from tiny_architectures import ARCHITECTURES
from tiny_architectures import make as make_architecture

from toolchain.artifacts.steps import Prune
from toolchain.backends import Place, open_session
from toolchain.backends.ort import EXACT_PRODUCTS, saturates
from toolchain.build.pipeline import ensure
from toolchain.build.steps.importing import import_checkpoint
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import SINGLE, label_probabilities
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.shipping import Order

CLIENTS = ROOT / "exported" / ".cache" / "test-clients"
# Maps each major release of transformers to the Python interpreter of its environment.
PYTHONS = {release: CLIENTS / f"transformers{release}" / "bin" / "python" for release in ("4", "5")}
# The major release of transformers that only child processes use.
OTHER = "4" if transformers.__version__.startswith("5.") else "5"
TEXTS = ["a charming and often affecting journey .", "a waste of two hours .", "Café naïve, isn't it? 50%", ""]

needs_clients = pytest.mark.skipif(
    not all(python.exists() for python in PYTHONS.values()), reason="needs `make test-clients`"
)


def quiet(*_):
    pass


def probabilities_here(artifact, runtime, texts=TEXTS):
    """Returns the label probabilities that this package computes, one text at a time."""
    manifest = artifact.manifest
    encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    session = open_session(artifact.path, runtime, Place("cpu", 1))
    logits = [session.run(pad([row], encoder.names, encoder.pad_id))[0] for row in encoder.encode(texts)]
    return [
        dict(zip(manifest.labels, row, strict=True)) for row in label_probabilities(np.array(logits), SINGLE).tolist()
    ]


def probabilities_of(classify, texts=TEXTS):
    return [{row["label"]: row["score"] for row in rows} for rows in classify(texts)]


@pytest.fixture(scope="module")
def ask():
    """Returns a function that asks a pipeline of another environment for its label probabilities.

    Each environment has one child process for all tests, because its imports take seconds.
    """
    with contextlib.ExitStack() as processes:

        @functools.cache
        def start(release):
            command = [PYTHONS[release], TESTS / "clients" / "pipeline.py"]
            return processes.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )

        def answer(folder, release, texts=TEXTS, by_optimum=False):
            """Returns the label probabilities that a pipeline of transformers `release` computes.

            If `by_optimum` is true, optimum loads the ONNX model in `folder` for the pipeline. Otherwise, transformers
            loads the PyTorch model in `folder`.
            """
            options = dict([EXACT_PRODUCTS]) if saturates() else {}
            request = {"folder": str(folder), "texts": texts, "options": options if by_optimum else None}
            process = start(release)
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
            assert "error" not in reply, reply["error"]
            assert reply["version"].startswith(f"{release}.")
            return reply["answers"]

        yield answer


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


@needs_clients
@pytest.mark.parametrize("release", PYTHONS)
def test_a_pipeline_of_every_release_gives_the_probabilities_of_the_reference(reference, ask, release):
    texts = list(inputs.load_embedded().sample(50, 7)) + TEXTS
    answers = ask(reference.path("torch-fp32"), release, texts)
    require_equal_answers(answers, probabilities_here(reference.load("torch-fp32"), "torch", texts))


@needs_clients
@pytest.mark.parametrize(("client", "release"), [("transformers", "4"), ("transformers", "5"), ("optimum", "4")])
def test_the_code_of_the_page_runs(reference, client, release, tmp_path):
    (tmp_path / "exported").symlink_to(reference.exported)
    code = [PYTHONS[release], "-c", snippet(client)]
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


@needs_clients
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["onnx-std", "onnx-fp32", "onnx-int8", "onnx-std-int8"])
def test_optimum_gives_the_probabilities_of_the_variant(built_tiny, ask, variant):
    artifact = ensure(built_tiny, [variant], {}, quiet)[variant]
    require_equal_answers(ask(artifact.path, "4", by_optimum=True), probabilities_here(artifact, "onnx"))


BUNDLES = [
    ("python", ("onnx-int8",)),
    ("python", ("onnx-int8", "onnx-fp32")),
    ("other", ("onnx-std",)),
    ("web", ("onnx-fp32",)),
    ("web", ("onnx-int8",)),
    ("mobile", ("onnx-int8",)),
    ("server", ("onnx-int8",)),
]


@needs_clients
@pytest.mark.slow
@pytest.mark.parametrize(("target", "variants"), BUNDLES)
def test_optimum_loads_the_first_model_of_a_bundle(built_tiny, ask, tmp_path, target, variants):
    shipping.ship(built_tiny, Order(variants, target, demo=False), tmp_path / "b", quiet, no_bar)
    answers = ask(tmp_path / "b", "4", by_optimum=True)
    require_equal_answers(answers, probabilities_here(built_tiny.load(variants[0]), "onnx"))


def test_only_the_first_model_of_a_bundle_has_the_default_name(built_tiny, tmp_path):
    body = shipping.ship(built_tiny, Order(("onnx-fp32", "onnx-int8"), "python"), tmp_path / "b", quiet, no_bar)
    assert [model["file"] for model in body["models"]] == ["model.onnx", "onnx-int8.onnx"]


@pytest.fixture(scope="module")
def unloadable_variants(built_tiny):
    """Two variants that transformers cannot load: one with int8 layers, and one that lost a whole layer by pruning."""
    steps = {"torch-pruned50+depth": Prune(0.5, layers=1)}
    return ensure(built_tiny, ["torch-int8", "torch-pruned50+depth"], steps, quiet)


@needs_clients
@pytest.mark.slow
@pytest.mark.parametrize("release", PYTHONS)
@pytest.mark.parametrize("variant", ["torch-int8", "torch-pruned50+depth"])
def test_transformers_refuses_a_variant_that_it_cannot_build(unloadable_variants, ask, variant, release):
    with pytest.raises(AssertionError, match=r"no file named .*model\.safetensors"):
        ask(unloadable_variants[variant].path, release)


@pytest.fixture(scope="module")
def other_checkpoints(tmp_path_factory):
    """A folder with one checkpoint per architecture, saved by a transformers release that only child processes use."""
    folder = tmp_path_factory.mktemp("other-checkpoints")
    code = (
        "import sys; from tiny_architectures import ARCHITECTURES, make; "
        "[make(f'{sys.argv[1]}/{kind}', kind) for kind in ARCHITECTURES]"
    )
    completed = subprocess.run(
        [PYTHONS[OTHER], "-c", code, folder],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return folder


@needs_clients
@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_checkpoint_of_the_other_release_becomes_a_bundle(other_checkpoints, ask, tmp_path, kind):
    """Imports a checkpoint that another release of transformers saved, and compares the probabilities of two releases.

    The test process imports the checkpoint with the installed release of transformers. A child process loads the
    imported checkpoint with the release that saved the original checkpoint.
    """
    if not (other_checkpoints / kind).exists():
        pytest.skip(f"transformers {OTHER} does not know {kind}")
    workspace = Workspace.open(str(other_checkpoints / kind), tmp_path / "exported")
    artifacts = ensure(workspace, ["onnx-fp32"], {}, quiet)
    shipping.ship(workspace, Order(("onnx-fp32",), "python"), tmp_path / "b", quiet, no_bar)
    shipping.verify(tmp_path / "b")
    # Unlike transformers 4, transformers 5 ignores the normaliser in the tokenizer.json of ALBERT and DeBERTa.
    # For ALBERT and DeBERTa, transformers 4 and 5 therefore give the same tokens only for lower-case ASCII texts.
    texts = [text for text in TEXTS if text.isascii() and text == text.lower()]
    assert len(texts) == 3
    expected_rows = probabilities_here(artifacts["torch-fp32"], "torch", texts)
    require_equal_answers(ask(artifacts["torch-fp32"].path, OTHER, texts), expected_rows)
