"""What releases of ONNX Runtime read, have, and answer right, as `benchmarks/releases.py` measured it.

The table is releases.json: the script asked a wheel of every release for x86-64 Linux, in its newest patch. The .ort
files that it gave them were saved by the newest release.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STANDARD, MICROSOFT, ML, EXTENSIONS = "", "com.microsoft", "ai.onnx.ml", "ai.onnx.contrib"
MICROSOFT_OPSET = 1  # the only one there is
DEFAULT = "1.17"
TABLE = Path(__file__).with_name("releases.json")
RIGHT, REFUSED, WRONG = STATES = ("right", "refused", "wrong")  # of a release's answers, the worst last


@dataclass(frozen=True)
class Release:
    """The patch that was asked, and the highest IR version, opset of standard operators, and version of the ORT format
    that the release reads."""

    version: str
    ir_version: int
    opset: int
    ort_format: int


_table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))

RELEASES = {name: Release(**limits) for name, limits in _table["releases"].items()}
ORDER = list(RELEASES)

# Standard operators whose kernels came after their opset was read: an .onnx file is helped out by their definition, one
# in ORT format is not. What has no kernel to this day is written in other operators when that is saved.
LATE: dict[str, str] = _table["late"]

# ONNX Runtime's operators that variants use or that its optimiser makes of them on the CPU → release → the attributes
# and inputs that came with it, the operator itself with the first; all have CPU kernels from there on. 1.16 stands for
# itself and for releases before it, which have no way to be asked.
OPERATORS: dict[str, dict[str, tuple[str, ...]]] = {
    operator: {release: tuple(names) for release, names in by_release.items()}
    for operator, by_release in _table["operators"].items()
}

# A kind of attention, such as ``MultiHeadAttention: attention_bias`` → release → one of STATES, the answer to padded
# batches from that release on.
ANSWERS: dict[str, dict[str, str]] = _table["answers"]


def answer_of(release: str, question: str) -> str:
    """How `release` answers one of `ANSWERS`: one of STATES."""
    until = ORDER[: ORDER.index(release) + 1]
    return next(ANSWERS[question][each] for each in reversed(until) if each in ANSWERS[question])


@dataclass(frozen=True, order=True)
class Use:
    """That a graph has an operator of `domain`: with an attribute or an input (``input 4``) given, or as a kind of
    attention that `ANSWERS` has (``attention_bias``)."""

    domain: str
    operator: str
    what: str = ""

    @property
    def question(self) -> str | None:
        """The one of `ANSWERS` that is about this use; None for an operator, an attribute or an input."""
        key = f"{self.operator}: {self.what}"
        return key if self.domain == MICROSOFT and key in ANSWERS else None

    @property
    def since(self) -> str | None:
        """The first release that has it, or from which on all answer it right; None where none is known to. Standard
        operators are their opset's affair, but for late kernels."""
        if self.question:
            faulty = [release for release in ORDER if answer_of(release, self.question) != RIGHT]
            return next(iter(ORDER[ORDER.index(faulty[-1]) + 1 :] if faulty else ORDER), None)
        if self.domain in (ML, EXTENSIONS):  # older than all of these, and a library's of its own
            return ORDER[0]
        if self.domain == STANDARD:
            return ORDER[0] if self.what else LATE.get(self.operator, ORDER[0])
        by_release = OPERATORS.get(self.operator, {}) if self.domain == MICROSOFT else {}
        return next((release for release, names in by_release.items() if not self.what or self.what in names), None)

    def __str__(self) -> str:
        name = f"{self.operator} with {self.what}" if self.what else self.operator
        if self.question:
            return f"{name} ({f'right since {self.since}' if self.since else 'right in no release known here'})"
        return f"{name} ({f'since {self.since}' if self.since else 'of no release known here'})"


def newer(release: str, uses: Iterable[Use]) -> list[Use]:
    """Those of `uses` that `release` lacks; of an operator it lacks, no attribute as well."""
    lacking = [use for use in sorted(set(uses)) if use.since is None or ORDER.index(use.since) > ORDER.index(release)]
    whole = {(use.domain, use.operator) for use in lacking if not use.what}
    return [use for use in lacking if not use.what or (use.domain, use.operator) not in whole]


def oldest_reading(ir_version: int = 0, opset: int = 0, ort_format: int = 0) -> str | None:
    """The first release that reads files of that IR version, standard opset and version of the ORT format."""
    limits = (ir_version, opset, ort_format)
    return next(
        (
            name
            for name, its in RELEASES.items()
            if all(a >= b for a, b in zip((its.ir_version, its.opset, its.ort_format), limits, strict=True))
        ),
        None,
    )


def oldest(uses: Iterable[Use]) -> str | None:
    """The first release that has all of them; None where there is none."""
    since = [use.since for use in uses]
    return None if None in since else max((each for each in since if each), key=ORDER.index, default=ORDER[0])
