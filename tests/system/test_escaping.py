"""Tests of escaping: text from a file acts neither on a terminal, nor as Markdown, nor as a formula."""

import ast
import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from toolchain.system.escaping import (
    escape_controls,
    escape_formula,
    escape_line,
    escape_markdown,
    format_c_string,
    format_markdown_code,
    to_json,
)

ATTACK = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eevil\u2066\x7f\r"
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
# Characters that a terminal may obey: control characters, and characters that change the direction of text.
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(ATTACK + BIDI), max_size=30)
MARKUP = ["`", "``", "|", "\\", "<b>", "](x)", "[", "]", "*", "_", "~~", "#", "- ", "1. ", "&amp;", "a", " ", "\n", "!"]


def obeyed(text):
    return [char for char in text if unicodedata.category(char) == "Cc" or char in BIDI]


@given(texts)
@example(ATTACK)
def test_escaped_text_has_no_control_character(text):
    assert not obeyed(escape_line(text))
    assert set(obeyed(escape_controls(text))) <= {"\n", "\t", "\r"}
    assert "\r" not in escape_controls(text).replace("\r\n", "")


@given(texts)
@example(ATTACK)
def test_json_has_no_control_character_and_the_same_value(text):
    value = {text: [text]}
    assert not obeyed(to_json(value))
    assert json.loads(to_json(value)) == value


def test_an_escape_is_visible_and_layout_stays():
    assert escape_controls("a\x1b[31mb\n\tc\r\n") == "a\\x1b[31mb\n\tc\r\n"
    assert escape_line("ü\n\u202e\u2028") == "ü\\n\\u202e\\u2028"


def shown_text(tokens):
    """Returns the text of inline tokens; fails if the tokens have markup."""
    assert {token.type for token in tokens} <= {"text", "text_special"}
    return "".join(token.content for token in tokens)


@given(st.lists(st.sampled_from(MARKUP), max_size=12).map("".join))
@example("[a](http://x)")
@example("1.")
@example("---")
def test_markdown_shows_the_text_and_no_markup(text):
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    tokens = PARSER.parse(escaped)
    assert [token.type for token in tokens] in ([], ["paragraph_open", "inline", "paragraph_close"])
    assert "".join(shown_text(token.children) for token in tokens if token.children) == escape_line(text).strip()
    cells = [token for token in PARSER.parse(f"| a | b |\n|---|---|\n| {escaped} | end |\n") if token.type == "inline"]
    assert [cell.content for cell in cells][-1] == "end"
    assert len(cells) == 4


@given(st.lists(st.sampled_from(MARKUP), max_size=12).map("".join))
def test_a_code_span_shows_the_text(text):
    children = PARSER.parse(f"x {format_markdown_code(text)} y")[1].children
    assert [child.type for child in children] == ["text", "code_inline", "text"] or not text.strip()
    if text.strip():
        assert children[1].content.strip() == escape_line(text).strip()


@given(texts | st.lists(st.sampled_from([*MARKUP, "??/", '"', "7", "\ud800"]), max_size=12).map("".join))
def test_a_string_of_c_has_the_bytes_of_the_text_and_ends_no_block(text):
    string = format_c_string(text)
    assert ast.literal_eval(f"b{string}") == text.encode(errors="surrogatepass")  # Python has the same escapes
    assert "??" not in string
    assert [token.type for token in PARSER.parse(f"```c\n{string}\n```\n")] == ["fence"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1"])
def test_a_formula_gets_an_apostrophe(text):
    assert escape_formula(text) == f"'{text}"
    assert escape_formula(f"a{text}") == f"a{text}"
