"""A table of ONNX Runtime's releases: the formats that each reads, its operators, and its computation errors.

`benchmarks/releases.py` measured the table, releases.json, with the x86-64 Linux wheel of each release's newest patch.
The newest release saved the .ort files of the measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STANDARD, MICROSOFT, ML, EXTENSIONS = "", "com.microsoft", "ai.onnx.ml", "ai.onnx.contrib"
MICROSOFT_OPSET = 1  # the only version
DEFAULT = "1.17"
TABLE = Path(__file__).with_name("releases.json")
RIGHT, REFUSED, WRONG = STATES = ("right", "refused", "wrong")  # results for a kind of attention, the worst last


@dataclass(frozen=True)
class Release:
    """The limits of a release of ONNX Runtime.

    Attributes:
        version: Version of the measured patch.
        ir_version: Highest IR version that the release reads.
        opset: Highest opset of standard operators that the release reads.
        ort_format: Highest version of the ORT format that the release reads.
    """

    version: str
    ir_version: int
    opset: int
    ort_format: int


_table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))

RELEASES = {name: Release(**limits) for name, limits in _table["releases"].items()}
ORDER = list(RELEASES)

# Standard operator → the first release with a CPU kernel, for operators whose opset an earlier release reads. Without a
# kernel, ONNX Runtime expands the operator's definition in an .onnx file, but not in a file in ORT format. An operator
# without a kernel in any release is expanded when ONNX Runtime saves the file.
LATE: dict[str, str] = _table["late"]

# Operator of ONNX Runtime → release → the attributes and inputs that this release added. The first release added the
# operator itself, with a CPU kernel. Variants use these operators, or ONNX Runtime's optimiser creates them on the CPU.
# 1.16 also stands for earlier releases, which cannot be queried.
OPERATORS: dict[str, dict[str, tuple[str, ...]]] = {
    operator: {release: tuple(names) for release, names in by_release.items()}
    for operator, by_release in _table["operators"].items()
}

# Kind of attention, such as ``MultiHeadAttention: attention_bias`` → release → one of STATES: the result for padded
# batches from that release on.
ANSWERS: dict[str, dict[str, str]] = _table["answers"]


def answer_of(release: str, question: str) -> str:
    """Returns one of `STATES`: the result of a release for a kind of attention.

    Args:
        release: Name of the release.
        question: A key of `ANSWERS`.
    """
    until = ORDER[: ORDER.index(release) + 1]
    return next(ANSWERS[question][each] for each in reversed(until) if each in ANSWERS[question])


@dataclass(frozen=True, order=True)
class Use:
    """A feature of ONNX Runtime that a graph uses.

    Attributes:
        domain: Domain of the operator.
        operator: Name of the operator.
        what: Name of an attribute, an input such as ``input 4``, or a kind of attention in `ANSWERS` such as
            ``attention_bias``; empty for the operator itself.
    """

    domain: str
    operator: str
    what: str = ""

    @property
    def question(self) -> str | None:
        """Returns the key of `ANSWERS` for a kind of attention; None for an operator, an attribute or an input."""
        key = f"{self.operator}: {self.what}"
        return key if self.domain == MICROSOFT and key in ANSWERS else None

    @property
    def since(self) -> str | None:
        """Returns the first release that supports the feature; None if no known release does.

        For a kind of attention, this and all later releases compute it correctly. Every release counts as the first for
        a standard operator, unless its kernel is in `LATE`, because the opset limits these operators.
        """
        if self.question:
            faulty = [release for release in ORDER if answer_of(release, self.question) != RIGHT]
            return next(iter(ORDER[ORDER.index(faulty[-1]) + 1 :] if faulty else ORDER), None)
        if self.domain in (ML, EXTENSIONS):  # ML predates these releases; EXTENSIONS is a separate library
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
    """Returns the uses that `release` does not support; for a missing operator, only the operator itself."""
    lacking = [use for use in sorted(set(uses)) if use.since is None or ORDER.index(use.since) > ORDER.index(release)]
    whole = {(use.domain, use.operator) for use in lacking if not use.what}
    return [use for use in lacking if not use.what or (use.domain, use.operator) not in whole]


def oldest_reading(ir_version: int = 0, opset: int = 0, ort_format: int = 0) -> str | None:
    """Returns the first release that reads files with these versions; None if no known release does.

    Args:
        ir_version: IR version of the file.
        opset: Opset of standard operators.
        ort_format: Version of the ORT format.
    """
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
    """Returns the first release that supports all uses; None if no known release does."""
    since = [use.since for use in uses]
    return None if None in since else max((each for each in since if each), key=ORDER.index, default=ORDER[0])
