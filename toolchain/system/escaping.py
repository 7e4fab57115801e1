"""Escapes text from files, so that the text acts neither on a terminal nor as markup nor as a formula."""

from __future__ import annotations

import json
import re
from typing import Any

# Characters that change the direction in which a terminal shows text
DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
# Control characters, without the line breaks and tabs that lay out the output of a command.
_CONTROL = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{DIRECTION}]|\r(?!\n)")
_CONTROL_OR_BREAK = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029{DIRECTION}]")
_RAW_IN_JSON = re.compile(f"[\x7f-\x9f\u2028\u2029{DIRECTION}]")  # `json.dumps` leaves these characters as they are
# Markdown: characters that are markup anywhere, and `_MARKDOWN_START`: characters that are markup only in front.
_MARKDOWN = re.compile(r"[\\`*<>&~|]|(?<!\w)_|_(?!\w)|\](?=[(\[])")
_MARKDOWN_START = re.compile(r"^(?:([#=\[]|[-+](?=[\s-]|$))|(\d+)([.)])(?=\s|$))")
# The bytes that need an escape in a string of C in Markdown: `?` could begin a trigraph, and `:` an address.
_ACTIVE_IN_C = re.compile(rb"[^A-Za-z0-9 _.,-]")
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", '"': r"\char34{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}"},
        # After a line break, LaTeX would read a bracket or a star as an argument.
        **{"'": r"\textquotesingle{}", "[": "{[}", "*": "{*}"},
        **{"×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$", "→": r"$\to$", "−": "$-$"},
        **{"Δ": r"$\Delta$", "±": r"$\pm$", "◆": r"$\diamond$", "…": r"\ldots{}", "µ": r"\textmu{}", "²": "$^2$"},
    }
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # A spreadsheet reads a text that begins with these as a formula.


def escape_controls(text: str) -> str:
    r"""Returns the text with visible escapes such as ``\x1b`` for control characters; keeps tabs and line breaks.

    A terminal would obey control characters: C0, C1, and the characters of Unicode that override the direction of text.
    """
    return _CONTROL.sub(_visible_escape, text)


def escape_line(text: str) -> str:
    r"""Returns the text as one line, with visible escapes such as ``\n`` for control characters and line breaks."""
    return _CONTROL_OR_BREAK.sub(_visible_escape, text)


def _visible_escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def to_json(value: Any, **options: Any) -> str:
    r"""Returns a value as JSON, in which escapes such as ``\u009b`` replace every control character.

    Args:
        value: The value.
        **options: Options of `json.dumps`; characters outside ASCII stay by default.
    """
    text = json.dumps(value, **{"ensure_ascii": False, **options})
    return _RAW_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def escape_markdown(text: str) -> str:
    """Returns the text as one line of Markdown (GitHub's dialect) that shows the text and contains no markup."""
    text = _MARKDOWN.sub(lambda match: f"\\{match[0]}", escape_line(text).strip())
    return _MARKDOWN_START.sub(lambda match: f"\\{match[1]}" if match[1] else f"{match[2]}\\{match[3]}", text)


def escape_latex(text: str) -> str:
    """Returns the text as one line of LaTeX that shows the text and runs no command.

    Symbols that a comparison contains become commands of LaTeX; all other characters outside ASCII stay.
    """
    escaped = escape_line(text).strip().translate(_LATEX)
    return re.sub("-(?=-)", "-{}", escaped)  # two hyphens would become a dash


def format_markdown_code(text: str) -> str:
    """Returns the text as a code span of Markdown; the span's delimiters are longer than any backticks in the text."""
    text = escape_line(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    space = " " if longest or not text.strip() else ""
    return f"{'`' * (longest + 1)}{space}{text}{space}{'`' * (longest + 1)}"


def format_c_string(text: str) -> str:
    """Returns the UTF-8 text as a string of the language C, with an escape for each byte that may act there.

    A block of Markdown can contain the string, because backticks and line breaks are escaped as well.
    """
    content = _ACTIVE_IN_C.sub(lambda match: b"\\%03o" % match[0][0], text.encode(errors="surrogatepass"))
    return f'"{content.decode("ascii")}"'


def escape_formula(text: str) -> str:
    """Returns the text with a leading apostrophe if a spreadsheet would read the text as a formula.

    The rule is that of OWASP's page on CSV injection.
    """
    return f"'{text}" if text.startswith(_FORMULA) else text
