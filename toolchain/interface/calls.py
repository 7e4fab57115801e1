"""What every call of the interface does with an error or an interrupt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from toolchain.errors import SystemRefusalError, ToolchainError
from toolchain.system.files import REFUSALS
from toolchain.system.interrupts import record_interrupts

# Option of a command → name of the argument, where it is not the option's name with underscores.
RENAMED: Mapping[str, str] = {"as": "folder", "from": "parent"}
# Options whose argument has the option's name.
OPTIONS = (
    *("model", "exported", "train-data", "text-column", "text-pair-column", "label-column", "split", "results", "data"),
    *("backend", "scheme", "isa", "embeddings", "keep-fp32", "max-drop", "trim-vocab", "name", "no-pass", "layers"),
    *("ratio", "method", "cost", "recover", "exits", "optimize", "opset", "exporter", "revision", "base"),
    *("quick", "provider", "threads", "batch-size", "by-length", "service-times", "device-id", "allow-fallback"),
    *("save-as", "force", "resume", "baseline", "filter", "sort", "target", "output", "demo", "with-tokenizer"),
    *("license", "embedding-rank", "exit-confidence", "id", "key", "root-certificate"),
    *("epochs", "lr", "max-length", "labels", "multi-label", "regression", "entities", "teacher", "seed"),
)
ARGUMENTS: Mapping[str, str] = {**{option: option.replace("-", "_") for option in OPTIONS}, **RENAMED}
_WORDS = {
    "`toolchain bench`": "`model.bench()`",
    "`toolchain variants`": "`model.variants()`",
    "`toolchain exits`": "`model.exits()`",
    "`toolchain ship`": "`model.ship()`",
    "run the command again": "call the method again",
    "Run the command again": "Call the method again",
    "the same command": "the same call",
}
# A command in a message stays as it is, because it works in a terminal.
_OPTION = re.compile(r"`toolchain [^`]*`|(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")


def to_python_words(text: str) -> str:
    """Returns a message of a command in the words of the interface: `--keep-fp32` becomes `keep_fp32`.

    An option for which the interface has no argument stays as it is.
    """
    for command_words, python_words in _WORDS.items():
        text = text.replace(command_words, python_words)
    return _OPTION.sub(lambda match: f"`{ARGUMENTS[match[1]]}`" if match[1] in ARGUMENTS else match[0], text)


@contextmanager
def calling() -> Iterator[None]:
    """Runs one call of the interface; a function with `@calling()` runs each of its calls in this way.

    An error of the toolchain keeps its class, and its message uses the words of the interface. An interrupt (Ctrl-C, or
    "Interrupt kernel" in a notebook) raises `KeyboardInterrupt`, also if a C library replaced it by its own error.
    """
    with record_interrupts() as interrupts:
        try:
            yield
        except Exception as error:
            if interrupts:
                raise KeyboardInterrupt from error
            if isinstance(error, OSError) and error.errno in REFUSALS:
                raise SystemRefusalError.from_os_error(error) from error
            if isinstance(error, ToolchainError):
                error.cause, error.hint = to_python_words(error.cause), to_python_words(error.hint)
                error.args = (error.cause, error.hint)
            raise
