"""Tests of the explanations of errors."""

import json
import re

import pytest

from toolchain import errors
from toolchain.cli import cli
from toolchain.errors import ToolchainError
from toolchain.explain.error_texts import TEXTS, all_explanations, error_page


def error_classes(kind=ToolchainError):
    """Returns an error class and its subclasses in the package; tests may define classes of their own."""
    children = [child for child in kind.__subclasses__() if child.__module__.startswith("toolchain.")]
    return [kind, *(inner for child in children for inner in error_classes(child))]


def test_every_error_has_a_text_and_a_code_of_its_own():
    classes = error_classes()
    assert set(TEXTS) == set(classes)
    codes = [vars(kind)["code"] for kind in classes]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch("E-[A-Z]+", code) for code in codes)


def test_the_tree_in_the_docstring_names_every_error():
    assert re.findall(r"^ *\* `(\w+)`", errors.__doc__, re.MULTILINE) == [kind.__name__ for kind in TEXTS]


@pytest.mark.parametrize("explanation", all_explanations(), ids=lambda explanation: explanation.code)
def test_every_text_has_causes_and_hints_in_short_sentences(explanation):
    text = explanation.text
    assert len(text.causes) >= 2
    assert len(text.hints) >= 2
    for sentence in (text.meaning, *text.causes, *text.hints):
        assert sentence.endswith("."), sentence
        assert all(len(part.split()) <= 25 for part in re.split(r"\. |: ", sentence)), sentence


def test_the_texts_name_only_existing_options_and_commands():
    options = {name for command in cli.commands.values() for option in command.params for name in option.opts}
    text = error_page()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= options | {"--help", "--head"}  # `ray start --head`
    assert set(re.findall(r"`toolchain ([a-z]+)", text)) <= set(cli.commands)


@pytest.mark.parametrize("code", ["E-DATA", "e-data"])
def test_a_code_prints_its_text(say, code):
    exit_code, out, err = say("explain", code)
    assert (exit_code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "E-DATA: DataError, exit code 1"
    causes = TEXTS[errors.DataError].causes
    assert [f"  * {cause}" for cause in causes] == lines[lines.index("Usual causes") + 1 :][: len(causes)]
    assert f"  * {TEXTS[errors.DataError].hints[0]}" in lines


def test_a_code_as_json(say):
    body = json.loads(say("explain", "E-VERDICT", "--json")[1])
    assert (body["code"], body["error"], body["exit_code"]) == ("E-VERDICT", "VerdictError", 3)
    assert body["causes"] == list(TEXTS[errors.VerdictError].causes)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["E-DATTA"], 1, "There is no error code 'E-DATTA'. Did you mean E-DATA?"),
        (["E-XXXXXXXX"], 1, "Codes: E-FAILED, E-SETTINGS, "),
        (["E-\x1b[31m"], 1, "\\x1b"),
        (["E-DATA", "--profile"], 2, "--profile needs a VARIANT."),
    ],
)
def test_a_wrong_code_is_one_sentence(say, arguments, code, message):
    actual_code, out, err = say("explain", *arguments)
    assert (actual_code, out) == (code, "")
    assert message in err
    assert "\x1b" not in err


def test_the_code_in_a_message_leads_to_its_text(say, tmp_path):
    err = say("compare", tmp_path / "nowhere.json")[2]
    (code,) = re.findall(r"\[(E-[A-Z]+)\]$", err.strip())
    assert code == "E-RESULT"
    assert "ResultFileError" in say("explain", code)[1]
