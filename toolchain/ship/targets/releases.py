"""A table of ONNX Runtime's releases: the formats that each release reads, its operators, and its errors.

The table is releases.json. `benchmarks/releases.py` measures the table with the x86-64 Linux wheel of each release's
newest patch. The newest release saves the .ort files for this measurement.
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
        version: Measured patch version, such as 1.17.3.
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

# Standard operator → the first release with a CPU kernel. An operator is here only if an earlier release reads its
# opset but has no kernel. Without a kernel, ONNX Runtime expands the operator to its ONNX function in an .onnx file,
# but not in a file in ORT format. If no release has a kernel, ONNX Runtime expands the operator when it saves the file.
FIRST_KERNELS: dict[str, str] = _table["late"]

# Operator of ONNX Runtime → release → the attributes and inputs that this release added. The first release added the
# operator itself, with a CPU kernel. Variants use these operators, or ONNX Runtime's optimiser creates them on the CPU.
# Features of 1.16 may be older: ONNX Runtime 1.15 cannot list its operators.
OPERATORS: dict[str, dict[str, tuple[str, ...]]] = {
    operator: {release: tuple(names) for release, names in by_release.items()}
    for operator, by_release in _table["operators"].items()
}

# Kind of attention, such as ``MultiHeadAttention: attention_bias`` → release → one of `STATES`: the result for padded
# batches from this release on.
ATTENTION_STATES: dict[str, dict[str, str]] = _table["answers"]


def attention_state(release: str, kind: str) -> str:
    """Returns one of `STATES`: the result of a release for padded batches with a kind of attention.

    Args:
        release: Name of the release.
        kind: A key of `ATTENTION_STATES`.
    """
    releases = ORDER[: ORDER.index(release) + 1]
    return next(ATTENTION_STATES[kind][each] for each in reversed(releases) if each in ATTENTION_STATES[kind])


@dataclass(frozen=True, order=True)
class Use:
    """A feature of ONNX Runtime that a graph uses.

    Attributes:
        domain: Domain of the operator.
        operator: Name of the operator.
        trait: Name of an attribute, an input such as ``input 4``, or a kind of attention such as ``attention_bias``;
            empty for the operator itself.
    """

    domain: str
    operator: str
    trait: str = ""

    @property
    def attention_kind(self) -> str | None:
        """Returns the key of `ATTENTION_STATES`, or None if the feature is not a kind of attention."""
        key = f"{self.operator}: {self.trait}"
        return key if self.domain == MICROSOFT and key in ATTENTION_STATES else None

    @property
    def first_release(self) -> str | None:
        """Returns the first release that supports the feature; None if no known release does.

        For a kind of attention, this release and all later releases compute the attention correctly. For a standard
        operator outside `FIRST_KERNELS`, this is the oldest release of the table, because the file's opset already
        limits the releases.
        """
        if self.attention_kind:
            faulty = [release for release in ORDER if attention_state(release, self.attention_kind) != RIGHT]
            return next(iter(ORDER[ORDER.index(faulty[-1]) + 1 :] if faulty else ORDER), None)
        if self.domain in (ML, EXTENSIONS):  # ML is older than these releases; EXTENSIONS is a separate library
            return ORDER[0]
        if self.domain == STANDARD:
            return ORDER[0] if self.trait else FIRST_KERNELS.get(self.operator, ORDER[0])
        by_release = OPERATORS.get(self.operator, {}) if self.domain == MICROSOFT else {}
        return next((release for release, names in by_release.items() if not self.trait or self.trait in names), None)

    def __str__(self) -> str:
        name = f"{self.operator} with {self.trait}" if self.trait else self.operator
        start = f"from {self.first_release} on" if self.first_release else "in no known release"
        return f"{name} ({'correct ' if self.attention_kind else ''}{start})"


def find_unsupported(release: str, uses: Iterable[Use]) -> list[Use]:
    """Returns the uses that `release` does not support; for a missing operator, omits its attributes and inputs."""
    position = ORDER.index(release)
    firsts = {use: use.first_release for use in sorted(set(uses))}
    unsupported = [use for use, first in firsts.items() if first is None or ORDER.index(first) > position]
    operators = {(use.domain, use.operator) for use in unsupported if not use.trait}
    return [use for use in unsupported if not use.trait or (use.domain, use.operator) not in operators]


def oldest_reading_release(ir_version: int = 0, opset: int = 0, ort_format: int = 0) -> str | None:
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
            for name, entry in RELEASES.items()
            if all(a >= b for a, b in zip((entry.ir_version, entry.opset, entry.ort_format), limits, strict=True))
        ),
        None,
    )


def oldest_supporting_release(uses: Iterable[Use]) -> str | None:
    """Returns the first release that supports all uses; None if no known release does."""
    firsts = [use.first_release for use in uses]
    return None if None in firsts else max((each for each in firsts if each), key=ORDER.index, default=ORDER[0])
