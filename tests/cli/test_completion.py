"""Tests of the shell completion: they ask the program as a shell does."""

import os
import shutil
import subprocess
import sys

import click
import pytest
from conftest import ROOT
from service_samples import measured, measured_result
from test_imports import HEAVY

from toolchain.artifacts.manifest import MANIFEST
from toolchain.cli import cli, main

VARIANTS = ["onnx-fp32", "onnx-int8", "onnx-int8+small", "onnx-std", "torch-fp32"]
BASH = shutil.which("bash")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the models `reference` and `mine`, and with folders that are no variants and no models."""
    for path in (*(f"reference/{name}" for name in VARIANTS), "mine/torch-fp32", "mine/torch-int8", "Mine!/torch-fp32"):
        (tmp_path / "exported" / path).mkdir(parents=True)
        (tmp_path / "exported" / path / MANIFEST).write_text("no manifest, because completion reads only names")
    for path in ("reference/onnx-int4", "reference/notes", "reference/.onnx-std.toolchain-1", ".cache/x", "empty"):
        (tmp_path / "exported" / path).mkdir(parents=True)
    (tmp_path / "exported" / "README.md").write_text("a file")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def complete(folder, monkeypatch, capsys):
    """Returns a function that completes the last word of a command line, as the script for bash does."""

    def ask(line, shell="bash"):
        words = line.split(" ")
        position = words[-1] if shell == "fish" else str(len(words) - 1)
        for name, value in (
            ("_TOOLCHAIN_COMPLETE", f"{shell}_complete"),
            ("COMP_WORDS", line),
            ("COMP_CWORD", position),
        ):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as exit_info:
            main([])
        out, err = capsys.readouterr()
        assert (exit_info.value.code, err) == (0, "")
        return out.split()

    return ask


def plain(*names):
    return [f"plain,{name}" for name in names]


@pytest.mark.parametrize(
    "line",
    [
        "validate ",
        "explain ",
        "predict ",
        "ship ",
        "ship onnx-int8 ",
        "bench --variant ",
        "bench --variant onnx-int8 --variant ",
        "export --from ",
        "prune --from ",
        "quantize --from ",
        "exits --from ",
        "tune --session ",
        "compare --baseline ",
    ],
)
def test_built_variants_are_completed(complete, line):
    assert complete(f"toolchain {line}") == plain(*VARIANTS)
    assert complete(f"toolchain {line}onnx-i") == plain("onnx-int8", "onnx-int8+small")


def test_variants_of_a_result_file_are_completed(complete, folder):
    measured_result(measured(), measured(variant="torch-fp32"), measured(variant="other")).write(folder / "run.json")
    assert complete("toolchain plan run.json --variant ") == plain("onnx-int8", "torch-fp32")
    assert complete("toolchain plan run.json --variant onnx-int8 --variant t") == plain("torch-fp32")
    for content in ("no JSON", "[1]", '{"rows": 1}', '{"rows": [1, {"variant": []}]}', "[" * 9999):
        (folder / "run.json").write_text(content)
        assert complete("toolchain plan run.json --variant ") == []
    assert complete("toolchain plan missing.json --variant ") == []


def test_every_parameter_that_takes_a_variant_completes_variants():
    texts = ("VARIANT", "[VARIANT]...", "VARIANT|BUNDLE", "VARIANT|CODE")
    for command in cli.commands.values():
        for parameter in command.params:
            if parameter.metavar in texts or parameter.name == "variant":
                assert "complete_variants" in str(parameter._custom_shell_complete), (command.name, parameter.name)
            if isinstance(parameter, click.Option) and parameter.opts[0] == "--model":
                assert "complete_models" in str(parameter._custom_shell_complete), command.name


@pytest.mark.parametrize(
    "options", ["--model mine", "--model=mine", "--as mine", "--model ./mine", "--model user/Mine"]
)
def test_variants_belong_to_the_named_model(complete, options):
    assert complete(f"toolchain validate {options} ") == plain("torch-fp32", "torch-int8")


def test_an_environment_variable_can_name_the_model(complete, monkeypatch):
    monkeypatch.setenv("TOOLCHAIN_VALIDATE_MODEL", "mine")
    assert complete("toolchain validate ") == plain("torch-fp32", "torch-int8")


def test_variants_come_from_the_named_folder(complete, folder):
    (folder / "exported").rename(folder / "elsewhere")
    assert complete("toolchain validate ") == []
    assert complete("toolchain validate --exported elsewhere onnx-s") == plain("onnx-std")


def test_imported_models_are_completed(complete, folder):
    assert complete("toolchain bench --model ") == plain("mine", "reference")
    assert complete("toolchain bench --model m") == plain("mine")
    assert complete("toolchain bench --model ./m") == ["dir,./m"]
    shutil.rmtree(folder / "exported")
    assert complete("toolchain bench --model ") == plain("reference")


def test_other_values_are_completed_by_the_shell(complete):
    assert complete("toolchain predict ./bun") == ["dir,./bun"]
    assert complete("toolchain predict onnx-int8 rev") == ["file,rev"]
    for option in ("bench --data", "prune --train-data", "tune --data", "quantize --trim-vocab"):
        assert complete(f"toolchain {option} rev") == ["file,rev"]
    for option in ("export --base", "finetune --base"):
        assert complete(f"toolchain {option} ./b") == ["dir,./b"]


def test_the_answers_of_init_are_completed(complete):
    assert complete("toolchain init --target ") == plain(
        "compare", "mlflow", "mobile", "other", "python", "ray-serve", "server", "web"
    )
    assert complete("toolchain init --target m") == plain("mlflow", "mobile")
    assert complete("toolchain init --data s") == plain("sst2")
    for text in ("rev", ""):
        assert complete(f"toolchain init --data {text}") == [f"file,{text}"]


def test_error_codes_commands_and_options_are_completed(complete):
    assert complete("toolchain explain E-S") == plain("E-SETTINGS", "E-SHIPPING", "E-SYSTEM")
    assert complete("toolchain expl") == plain("explain")
    assert complete("toolchain explain --prof") == plain("--profile")


@pytest.mark.parametrize("value", ["nowhere", "x" * 300, "~", "*"])
def test_an_impossible_model_gives_no_completion_and_no_message(complete, value):
    assert complete(f"toolchain validate --model {value} ") == []


def test_zsh_and_fish_are_answered_in_their_formats(complete):
    assert complete("toolchain validate onnx-s", "zsh") == ["plain", "onnx-std", "_"]
    assert complete("toolchain validate onnx-s", "fish") == plain("onnx-std")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_documented_line_prints_a_script_for_the_shell(shell, monkeypatch, capsys):
    text = (ROOT / "docs" / "how-to" / "install.md").read_text()
    assert f"_TOOLCHAIN_COMPLETE={shell}_source toolchain" in text
    monkeypatch.setenv("_TOOLCHAIN_COMPLETE", f"{shell}_source")
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 0
    assert f"_TOOLCHAIN_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.fixture
def program(tmp_path):
    """A folder with the program `toolchain`."""
    path = tmp_path / "bin" / "toolchain"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m toolchain "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_completes_after_the_documented_line(folder, program):
    script = (
        'eval "$(_TOOLCHAIN_COMPLETE=bash_source toolchain)"\n'
        "complete -p toolchain\n"
        "COMP_WORDS=(toolchain explain onnx-i) COMP_CWORD=2\n"
        "_toolchain_completion toolchain onnx-i explain\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    run = subprocess.run([BASH, "--norc", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    registration, replies = run.stdout.splitlines()
    assert "-F _toolchain_completion toolchain" in registration
    assert replies == "onnx-int8 onnx-int8+small"


@pytest.mark.parametrize("line", ["toolchain explain onnx-", "toolchain bench --model ", "toolchain explain E-"])
def test_completion_loads_nothing_heavy(folder, line):
    code = (
        "import atexit, sys; from toolchain.cli import main; "
        f"atexit.register(lambda: print(sorted({HEAVY | {'pydantic', 'huggingface_hub'}!r} & set(sys.modules)), "
        "file=sys.stderr)); main([])"
    )
    position = str(len(line.split(" ")) - 1)
    answers = {"_TOOLCHAIN_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": position}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **answers}, capture_output=True, text=True, check=False
    )
    assert run.stdout.startswith("plain,")
    assert run.stderr.strip() == "[]"
