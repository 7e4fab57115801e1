"""A table of ONNX Runtime's releases: file formats, operators, and the kinds of attention with wrong results.

The file releases.json holds the table of releases. The script `benchmarks/releases.py` fills the table of releases: it
tests the x86-64 Linux wheel of each release's newest patch. In the tests of `benchmarks/releases.py`, the newest ONNX
Runtime release saves the .ort files that every release tries to read.
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
# Possible test results of an ONNX Runtime release for a kind of attention, from best to worst.
RIGHT, REFUSED, WRONG = STATES = ("right", "refused", "wrong")


@dataclass(frozen=True)
class Release:
    """The newest file versions that a release of ONNX Runtime reads.

    Attributes:
        version: Patch version of the tested wheel, such as 1.17.3.
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

# `FIRST_KERNELS` maps a standard operator to the first release with a CPU kernel for it. `FIRST_KERNELS` omits an
# operator if every release that reads the operator's opset has a kernel for the operator. ONNX Runtime expands an
# operator without a kernel to its ONNX function in an .onnx file, but not in a file in ORT format. If no release has a
# kernel for an operator, ONNX Runtime expands the operator to its ONNX function before it saves the file in ORT format.
FIRST_KERNELS: dict[str, str] = _table["late"]

# `OPERATORS` holds the attributes and inputs that each release of ONNX Runtime added to an operator. The outer key is
# the name of an operator in the domain com.microsoft. The inner key is a release. The first release of an operator is
# the release that added the operator and its CPU kernel. `OPERATORS` contains the operators that variants use, or that
# ONNX Runtime's optimiser creates on the CPU. Features listed for release 1.16 may exist in older releases too, because
# ONNX Runtime 1.15 cannot list its operators.
OPERATORS: dict[str, dict[str, tuple[str, ...]]] = {
    operator: {release: tuple(names) for release, names in by_release.items()}
    for operator, by_release in _table["operators"].items()
}
# `ATTENTION_STATES` holds the results of tests with padded batches. The outer key is a kind of attention, such as
# ``MultiHeadAttention: attention_bias``. The inner key is a release of ONNX Runtime. The value says what that
# release did with the test batches: its logits were ``right`` or ``wrong``, or it ``refused`` the graph. If a release
# is missing in `ATTENTION_STATES`, the test result of the nearest older release applies.
ATTENTION_STATES: dict[str, dict[str, str]] = _table["answers"]


def attention_state(release: str, kind: str) -> str:
    """Returns whether a release computes padded batches correctly with a kind of attention, as one of `STATES`.

    Args:
        release: Name of the ONNX Runtime release, such as 1.17.
        kind: Kind of attention, one of the keys of `ATTENTION_STATES`.
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
        """Returns the feature's key in `ATTENTION_STATES`, or None if the feature is not a kind of attention."""
        key = f"{self.operator}: {self.trait}"
        return key if self.domain == MICROSOFT and key in ATTENTION_STATES else None

    @property
    def first_release(self) -> str | None:
        """Returns the first ONNX Runtime release that supports the feature; None if no known release does.

        If the feature is a kind of attention, the returned release and all later releases compute this attention
        correctly. If the feature is a standard operator that the table `FIRST_KERNELS` omits, the function returns the
        oldest known release. The oldest known release may be unable to read the opset of the file. The function
        `oldest_reading_release` checks the opset separately.
        """
        if self.attention_kind:
            faulty = [release for release in ORDER if attention_state(release, self.attention_kind) != RIGHT]
            return next(iter(ORDER[ORDER.index(faulty[-1]) + 1 :] if faulty else ORDER), None)
        # Every known release has the domain `ML`, and the domain `EXTENSIONS` belongs to a separate library.
        if self.domain in (ML, EXTENSIONS):
            return ORDER[0]
        if self.domain == STANDARD:
            return ORDER[0] if self.trait else FIRST_KERNELS.get(self.operator, ORDER[0])
        by_release = OPERATORS.get(self.operator, {}) if self.domain == MICROSOFT else {}
        return next((release for release, names in by_release.items() if not self.trait or self.trait in names), None)

    def __str__(self) -> str:
        name = f"{self.operator} with {self.trait}" if self.trait else self.operator
        start = f"from {self.first_release} on" if self.first_release else "in no known release"
        correct = "correct " if self.attention_kind else ""
        return f"{name} ({correct}{start})"


def find_unsupported(release: str, uses: Iterable[Use]) -> list[Use]:
    """Returns the features that `release` does not support; omits attributes and inputs of unsupported operators."""
    position = ORDER.index(release)
    firsts = {use: use.first_release for use in sorted(set(uses))}
    unsupported = [use for use, first in firsts.items() if first is None or ORDER.index(first) > position]
    operators = {(use.domain, use.operator) for use in unsupported if not use.trait}
    return [use for use in unsupported if not use.trait or (use.domain, use.operator) not in operators]


def oldest_reading_release(ir_version: int = 0, opset: int = 0, ort_format: int = 0) -> str | None:
    """Returns the first ONNX Runtime release that reads the given file versions; None if no known release does.

    Args:
        ir_version: IR version of the file.
        opset: Opset of the file's standard operators.
        ort_format: Version of the file's ORT format.
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
    """Returns the first ONNX Runtime release that supports all features in `uses`; None if no known release does."""
    firsts = [use.first_release for use in uses]
    return None if None in firsts else max((each for each in firsts if each), key=ORDER.index, default=ORDER[0])
