"""Shared fixtures: a tiny random checkpoint, the reference model, and fake artifacts for the benchmark."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from filelock import FileLock
from short_bench import SETTINGS

from toolchain.artifacts import store
from toolchain.artifacts.manifest import Manifest, TensorSpec
from toolchain.artifacts.steps import Import
from toolchain.artifacts.store import Artifact
from toolchain.build.job import Job
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.cli import main
from toolchain.data.inputs import TrainingSource
from toolchain.models import checkpoints, locations
from toolchain.ship.targets import clients

# The default variants are onnx-int8 and its ancestors.
DEFAULT_VARIANTS = ["torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8"]
TESTS = Path(__file__).parent
ROOT = TESTS.parent
# The npm packages that `make test-clients` installs
MODULES = clients.find_modules(ROOT / "exported" / ".cache")
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(MODULES is None or NODE is None, reason="needs Node and `make test-clients`")
# Tests import the scripts in docs/, which write the generated parts of the pages.
sys.path.append(str(ROOT / "docs"))
# Child processes of the benchmark import `fake_backend` from tests/. No process may use the Hugging Face hub.
os.environ["PYTHONPATH"] = str(TESTS)
os.environ["HF_HUB_OFFLINE"] = "1"


# The test files in `LONGEST` take minutes, so they start first. If a long test file started last, only one pytest
# worker would be busy at the end.
LONGEST = (
    "test_docs.py",
    "test_clients.py",
    "test_architectures.py",
    "test_distributed.py",
    "test_mobile.py",
    "test_tune.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Pins each pytest worker and its child processes to one processor.

    More threads than processors would waste time, because a waiting thread keeps its processor busy.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})


@pytest.hookimpl(tryfirst=True)  # pytest runs this hook first, so that other plugins see the new order of the tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest test files first, and marks tests of the reference model and of the website as slow.

    The fixture `reference` exports a real model, and the fixture `site` builds the documentation website.
    """
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    for item in items:
        if {"reference", "site"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def verify_in_node(bundle: Path) -> list[str]:
    """Runs the script of a web bundle that compares its logits in Node; returns one line for each model."""
    (bundle.parent / "node_modules").symlink_to(MODULES)  # Node also searches the parent folders of a script
    command = [NODE, "verify.mjs"]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=True).stdout.splitlines()


def make_checkpoint(
    folder: Path,
    labels: Sequence[str] = ("NEGATIVE", "POSITIVE"),
    seed: int = 1,
    width: int = 32,
    leaning: float = 0.0,
    neurons: int | None = None,
) -> Path:
    """Saves a random DistilBERT classifier of two narrow layers with the reference model's tokenizer.

    The argument `leaning` is added to the last label's bias; if it is large, quantisation changes no predicted label.
    `neurons` is the number of FFN neurons of a layer; None stands for twice the width.
    """
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(seed)
    config = DistilBertConfig(
        dim=width,
        hidden_dim=neurons or 2 * width,
        n_layers=2,
        n_heads=4,
        initializer_range=0.3,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = DistilBertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.bias[-1] += leaning
    model.save_pretrained(folder)
    for name in checkpoints.TOKENIZER_FILES:
        if (checkpoints.REFERENCE / name).is_file():
            shutil.copyfile(checkpoints.REFERENCE / name, folder / name)
    return folder


def write_short_rows(file: Path, count: int, labels: Sequence[int] = (0, 1)) -> Path:
    """Writes rows of 3 to 11 simple words, whose labels repeat `labels`, to a CSV file; returns its path."""
    words = ["good", "bad", "film", "dull", "bright", "a", "the", "story"]
    texts = (" ".join(words[(i * k) % 8] for k in range(1, 4 + i % 9)) for i in range(count))
    rows = (f"{text},{labels[i % len(labels)]}" for i, text in enumerate(texts))
    file.write_text("sentence,label\n" + "\n".join(rows) + "\n")
    return file


@pytest.fixture(scope="session", autouse=True)
def working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs all tests in an empty folder, because `ship` and `compare` read result files of the working directory."""
    previous = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("working-directory"))
    yield
    os.chdir(previous)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all pytest workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(shared: Path) -> Path:
    """The tiny checkpoint, which tests must not change."""
    folder = shared / "checkpoint" / "tiny"
    with FileLock(shared / "checkpoint.lock"):
        return folder if folder.exists() else make_checkpoint(folder)


@pytest.fixture(scope="session")
def built_tiny(tiny_checkpoint: Path, shared: Path) -> Workspace:
    """A workspace of the tiny checkpoint, shared by all tests.

    Tests may add variants to this workspace but must not change its existing variants.
    """
    workspace = Workspace.open(str(tiny_checkpoint), shared / "tiny")
    ensure(workspace, DEFAULT_VARIANTS[-1:], {}, lambda line: None)
    return workspace


@pytest.fixture
def tiny(built_tiny: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the default variants of `built_tiny`, which a test may change."""
    copy = Workspace(tmp_path / "exported", built_tiny.model, built_tiny.source)
    for name in DEFAULT_VARIANTS:
        shutil.copytree(built_tiny.path(name), copy.path(name))
    locations.record(copy.exported / copy.model, copy.source)
    return copy


@pytest.fixture(scope="session")
def reference(shared: Path) -> Workspace:
    """The workspace of the reference model, shared by all tests.

    Tests may add variants to this workspace but must not change its existing variants.
    """
    workspace = Workspace.open("reference", shared / "reference")
    ensure(workspace, ["onnx-int8"], {}, lambda line: None)
    return workspace


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def short_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `bench --quick` take seconds: one process per cell, short rounds, and a machine probe of small layers."""
    for module, name, value in SETTINGS:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Artifact]:
    """Returns a function that makes artifacts; `fake_backend.FakeSession` behaves as the opened artifact states."""

    def make(name: str, **behaviour: object) -> Artifact:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "behaviour.json").write_text(json.dumps(behaviour))
        tensors = tuple(
            TensorSpec(n, "int64", ("batch_size", "sequence_length")) for n in ("input_ids", "attention_mask")
        )
        manifest = Manifest(
            model="fake",
            variant=name,
            source={},
            parent=None,
            parent_id=None,
            step=Import(),
            step_version=1,
            files=store.list_files(folder),
            inputs=tensors,
            outputs=(),
            labels=("NEGATIVE", "POSITIVE"),
            max_length=512,
            facts={"int8_headroom": behaviour["headroom"]} if "headroom" in behaviour else {},
        )
        return Artifact(folder, manifest)

    return make


def import_job(checkpoint: Path, folder: Path) -> Job:
    """Returns the `Job` of the build step that imports `checkpoint` into `folder`."""
    missing_path = folder / "nothing"
    return Job(Import(), None, checkpoint, folder, None, TrainingSource(), missing_path, missing_path, lambda *_: None)


def run_toolchain(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "toolchain", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
