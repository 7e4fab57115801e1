"""Runs one case: a fresh copy of valid files, some mutations, one command; says whether the command escaped its rules.

A command may accept hostile files or refuse them. It *escapes* if it ends in another way than with an exit code of the
toolchain and one message, or if it takes longer than `LONGEST_S`. It also escapes if it prints control characters,
changes a file that it only reads, or leaves a partial file.
"""

import contextlib
import io
import random
import re
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from toolchain.cli import main
from toolchain.errors import ToolchainError

MOST_MUTATIONS = 3
LONGEST_S = 20
_CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]")
_SCRATCH = re.compile(r"^\.[0-9a-f]{32}$")


@dataclass(frozen=True)
class Kind:
    """A kind of file under attack.

    Attributes:
        name: Name of the kind, a key of `ATTACKS`.
        prepare: Writes valid files into an empty folder.
        files: Returns the paths of the files to mutate.
        mutate: Changes the content of a file.
        run: Reads the files: calls `call`, or raises `ToolchainError` for files that it refuses. The second argument is
            a random generator for the choice of options.
        alone: Whether only the mutated files of a case are read.
        repair: Makes the mutated files consistent again, such as a digest; None if there is nothing to repair.
    """

    name: str
    prepare: Callable[[Path], None]
    files: Callable[[Path], Sequence[Path]]
    mutate: Callable[[random.Random, bytes], bytes]
    run: Callable[[Path, random.Random], None]
    alone: bool = False
    repair: Callable[[Path], None] | None = None


class RefusedError(Exception):
    """The command refused the files with an exit code and a message."""


class EscapeError(Exception):
    """The command broke a rule; the message says which."""


def call(*arguments: object) -> str:
    """Runs the command line in this process and returns its standard output.

    Raises:
        RefusedError: The command ended with the exit code 1, 2 or 3 and a message.
        EscapeError: The command ended in another way.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    text = err.getvalue()
    if code not in (0, 1, 2, 3):
        raise EscapeError(f"exit code {code}: {text[-300:]}")
    if "Error: unexpected" in text:
        raise EscapeError(text[text.index("Error: unexpected") :][:400])
    if control := _CONTROL.search(out.getvalue() + text):
        raise EscapeError(f"the output has the control character {control[0]!r}")
    if code:
        if "Error: " not in text:
            raise EscapeError(f"exit code {code} without a message")
        raise RefusedError(text[text.index("Error: ") :])
    return out.getvalue()


def run_case(kind: Kind, pristine: Path, folder: Path, seed: str, parts: Sequence[int] | None = None) -> str:
    """Runs one case and returns ``refused``, ``accepted``, or the description of the escape.

    Args:
        kind: The kind of file.
        pristine: Folder with the valid files.
        folder: Folder for the case; the function replaces it.
        seed: Seed of the case.
        parts: Indices of the mutations to apply; None for all of the case.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    paths, mutated = kind.files(folder), set[Path]()
    for part in range(_mutation_count(seed)) if parts is None else parts:
        rng = random.Random(f"{seed} {part}")
        path = rng.choice(list(paths))
        path.write_bytes(kind.mutate(rng, path.read_bytes()))
        mutated.add(path)
    for path in set(paths) - mutated if mutated and kind.alone else ():
        path.unlink()
    if kind.repair:
        kind.repair(folder)
    before, started = _snapshot(folder), time.monotonic()
    try:
        with warnings.catch_warnings(), _time_limit():
            warnings.simplefilter("ignore")
            kind.run(folder, random.Random(f"{seed} options"))
        outcome = "accepted"
    except (RefusedError, ToolchainError):
        outcome = "refused"
    except EscapeError as error:
        return str(error)
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(frame.filename).name}:{frame.lineno})"
    if time.monotonic() - started >= LONGEST_S:  # a reader may convert the error of `_time_limit` to its own
        return f"the case takes longer than {LONGEST_S} s"
    after = _snapshot(folder)
    if changed := sorted(str(path) for path in before if after.get(path) != before[path]):
        return f"changed {changed[0]}"
    if partial := sorted(str(path) for path in set(after) - set(before) if _SCRATCH.search(path.name)):
        return f"left {partial[0]}"
    return outcome


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Interrupts a case that takes longer than `LONGEST_S`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise EscapeError(f"the case takes longer than {LONGEST_S} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def shrink(seed: str, run: Callable[[Sequence[int]], str]) -> list[int]:
    """Returns the fewest mutations of an escaping case that still escape.

    Args:
        seed: Seed of the case.
        run: Function that runs the case with the mutations of some indices, and returns the outcome.
    """
    parts = list(range(_mutation_count(seed)))
    for part in list(parts):
        fewer = [other for other in parts if other != part]
        if fewer and run(fewer) not in ("accepted", "refused"):
            parts = fewer
    return parts


def _mutation_count(seed: str) -> int:
    return random.Random(seed).randint(1, MOST_MUTATIONS)


def _snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Returns size and time of each file, except in the folder ``output``, which a command may change."""
    return {
        path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and "output" not in path.parts
    }
