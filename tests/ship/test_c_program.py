"""Tests of the C program in the README of a bundle for other runtimes, compiled as C and as C++."""

import json
import os
import platform
import shutil
import subprocess

import emulated
import pytest
import transformers
from c_program import COMPILERS, compile_program, reason_to_skip
from conftest import ROOT, make_checkpoint

from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.progress import no_bar
from toolchain.ship import shipping
from toolchain.ship.bundle_files.verify import read_bundle
from toolchain.ship.shipping import Order

CLIENTS = ROOT / "exported" / ".cache" / "test-clients"
HOSTILE_LABELS = ('say "yes"', "no??/\\ ```", "vielleicht, ä")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason := reason_to_skip(CLIENTS)), reason=reason)]
needs_avx2 = pytest.mark.skipif(
    bool(reason := emulated.reason_to_skip(emulated.AVX2, CLIENTS)), reason=reason or "qemu runs the program"
)


@pytest.fixture(scope="module")
def bundle(reference, tmp_path_factory):
    """The bundle of the reference model in int8."""
    ensure(reference, ["onnx-std-int8"], {}, lambda line: None)
    folder = tmp_path_factory.mktemp("c") / "bundle"
    shipping.ship(reference, Order(("onnx-std-int8",), "other"), folder, lambda line: None, no_bar)
    return folder


def ship_tiny(task, folder):
    """Returns the bundle of a tiny model for the task."""
    labels = {"regression": ("stars",), "token_classification": ("B-X", "I-X", "O")}.get(task, HOSTILE_LABELS)
    checkpoint = make_checkpoint(folder / "tiny", labels)
    if task == "token_classification":
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(checkpoint)
    else:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, "problem_type": task}))
    workspace = Workspace.open(str(checkpoint), folder / "exported")
    ensure(workspace, ["onnx-std"], {}, lambda line: None)
    shipping.ship(workspace, Order(("onnx-std",), "other", license="MIT"), folder / "bundle", lambda line: None, no_bar)
    return folder / "bundle"


def run(bundle, *command, **variables):
    """Returns the exit code and the output of the program, which runs in the folder of the bundle."""
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **variables}
    ended = subprocess.run(list(map(str, command)), cwd=bundle, capture_output=True, text=True, env=environment)
    return ended.returncode, ended.stdout + ended.stderr


def require_golden_answers(bundle, *program, count=None):
    """Checks the output for the first `count` golden sentences, or for all, against the logits that Python recorded."""
    body, golden = read_bundle(bundle), json.loads((bundle / "golden.json").read_text())
    (model,) = body["models"]
    pairs = zip(golden["sentences"], golden["logits"][model["variant"]], strict=True)
    for sentence, logits in list(pairs)[:count]:
        code, output = run(bundle, *program, *sentence["input_ids"])
        assert code == 0, output
        if body["task"] == "regression":
            assert float(output) == pytest.approx(logits[0], abs=1e-4)
        else:
            assert output == expected_output(body, logits)


def expected_output(body, logits):
    labels = body["labels"]
    if body["multi_label"]:
        return "".join(f"{label}\n" for label, logit in zip(labels, logits, strict=True) if logit > 0)
    rows = [logits[start : start + len(labels)] for start in range(0, len(logits), len(labels))]
    return "".join(f"{labels[max(range(len(row)), key=row.__getitem__)]}\n" for row in rows)


@pytest.mark.parametrize("language", COMPILERS)
def test_the_program_gives_the_golden_answers(bundle, tmp_path, language):
    require_golden_answers(bundle, compile_program(bundle, tmp_path, CLIENTS, language))


def test_the_command_of_the_readme_names_the_tokens_of_its_text(bundle, tmp_path):
    readme, golden = (bundle / "README.md").read_text(), json.loads((bundle / "golden.json").read_text())
    command = next(line for line in readme.splitlines() if line.startswith("./classify "))
    sentence = golden["sentences"][-1]
    assert f"the tokens of `{sentence['text']}`." in readme
    assert [int(token) for token in command.split()[1:]] == sentence["input_ids"]
    code, output = run(bundle, compile_program(bundle, tmp_path, CLIENTS), *command.split()[1:])
    assert (code, output) == (0, expected_output(read_bundle(bundle), golden["logits"]["onnx-std-int8"][-1]))


@needs_avx2
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for another processor")
def test_the_program_gives_the_golden_answers_on_avx2(bundle, tmp_path):
    program = compile_program(bundle, tmp_path, CLIENTS)
    require_golden_answers(bundle, *emulated.program(emulated.AVX2, program), count=4)


@pytest.mark.parametrize(
    "task",
    ["single_label_classification", "multi_label_classification", "regression", "token_classification"],
)
def test_the_program_of_each_task_gives_the_golden_answers(tmp_path, task):
    bundle = ship_tiny(task, tmp_path)
    assert read_bundle(bundle)["task"] == task
    for language in COMPILERS:
        (tmp_path / language).mkdir()
        require_golden_answers(bundle, compile_program(bundle, tmp_path / language, CLIENTS, language))


def test_wrong_input_ends_the_program_with_one_sentence(bundle, tmp_path):
    program = compile_program(bundle, tmp_path, CLIENTS)
    assert run(bundle, program) == (1, "the program needs 1 to 512 token ids\n")
    assert run(bundle, program, *[101] * 513) == (1, "the program needs 1 to 512 token ids\n")
    code, output = run(bundle, program, 101, 999999, 102)  # no token of the vocabulary
    assert code == 1
    assert "indices element out of data bounds" in output
    shutil.copy(program, tmp_path / "elsewhere")
    code, output = run(tmp_path, tmp_path / "elsewhere", 101, 102)
    assert code == 1
    assert "model.onnx failed" in output or "File doesn't exist" in output
