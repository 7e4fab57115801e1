"""Tests of the commands' output: text from files cannot act on a terminal."""

import ast
from pathlib import Path

import pytest
from sample_results import FP32, INT8, RUN, result

import toolchain
from toolchain.cli import output, progress
from toolchain.errors import DataError

ATTACK = "\x1b[31mred\x9b2J\u202e\x07"
PRINTING = ("echo", "secho", "echo_via_pager", "print")


def calls_of(path):
    """Yields the line and the name of every call in a Python file that prints."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "click":
                yield node.lineno, f"click.{node.func.attr}"
            elif isinstance(node.func, ast.Name):
                yield node.lineno, node.func.id


@pytest.mark.parametrize("path", sorted((Path(toolchain.__file__).parent / "cli").glob("*.py")), ids=lambda p: p.name)
def test_every_command_prints_through_one_function(path):
    forbidden = {f"click.{name}" for name in PRINTING} | {"print"}
    assert path.name == "output.py" or not [call for call in calls_of(path) if call[1] in forbidden]


def test_an_error_of_a_hostile_file_is_one_visible_line(capsys):
    output.echo_error(DataError(f"The label {ATTACK}\nError: forged.", "Correct it."))
    assert capsys.readouterr().err == (
        "Error: The label \\x1b[31mred\\x9b2J\\u202e\\x07\\nError: forged. Correct it. [E-DATA]\n"
    )


def test_a_long_cause_is_shortened_and_its_hint_stays(capsys):
    output.echo_error(DataError("x" * 10**6, "Correct it."))
    line = capsys.readouterr().err
    assert len(line) < output.MAX_CAUSE + 100
    assert line.endswith("… Correct it. [E-DATA]\n")


def test_progress_shows_escapes(capsys):
    progress.say(f"{ATTACK}\nforged")
    assert capsys.readouterr().err == "\\x1b[31mred\\x9b2J\\u202e\\x07\\nforged\n"


def test_a_hostile_argument_is_shown_with_escapes(say):
    for arguments in (["variants", f"--{ATTACK}"], ["verify", f"nowhere{ATTACK}"]):
        code, _, err = say(*arguments)
        assert code in (1, 2)
        assert "\\x1b[31mred" in err
        assert not set("\x1b\x9b\u202e\x07") & set(err)


def test_compare_refuses_control_characters_in_a_result_file(say, tmp_path):
    machine = {**result().machine, "cpu": ATTACK}
    result(FP32, INT8, run=RUN, machine=machine).write(tmp_path / "r.json")
    code, out, err = say("compare", tmp_path / "r.json")
    assert (code, out) == (1, "")
    assert "a control character" in err
    assert not set("\x1b\x9b\u202e\x07") & set(err)
