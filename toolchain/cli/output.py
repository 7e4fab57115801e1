"""Output of the commands: every line goes through `echo`, so that text from files cannot act on a terminal."""

from __future__ import annotations

import io
from typing import Any

import click

from toolchain.errors import ToolchainError
from toolchain.system.escaping import escape_controls, escape_line, to_json

MAX_CAUSE = 4000  # Number of characters of an error's cause to print; a cause may name the columns of a hostile file.


def echo(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Prints a text, with visible escapes for control characters.

    Args:
        text: The text; its own line breaks stay.
        err: Whether to print to standard error instead of standard output.
        nl: Whether to add a line break.
    """
    click.echo(escape_controls(str(text)), err=err, nl=nl)


def echo_json(value: Any, **options: Any) -> None:
    """Prints a value as JSON; `options` are options of `json.dumps`."""
    echo(to_json(value, indent=1, ensure_ascii=True, **options))


def echo_error(error: ToolchainError) -> None:
    """Prints an error, with its cause, its hint and its code, as one line on standard error."""
    cause = error.cause if len(error.cause) <= MAX_CAUSE else f"{error.cause[:MAX_CAUSE]} …"
    echo(escape_line(f"Error: {f'{cause} {error.hint}'.rstrip()} [{error.code}]"), err=True)


def echo_usage_error(error: click.ClickException) -> None:
    """Prints an error of Click, with the usage of the command, on standard error."""
    text = io.StringIO()
    error.show(text)
    echo(text.getvalue(), err=True, nl=False)
