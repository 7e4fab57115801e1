"""What releases of ONNX Runtime read: IR version, operator set, ORT format, and ONNX Runtime's own operators.

Measured on the newest patch of every release, as a wheel for x86-64 Linux: it was given files of every IR version and
opset, and asked for the schemas of its operators and for its CPU kernels. Of 1.16, ONNX Runtime's page on compatibility
says the same; of 1.15 it says opset 19, which that release takes and has no kernels for, and IR version 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STANDARD, MICROSOFT, ML, EXTENSIONS = "", "com.microsoft", "ai.onnx.ml", "ai.onnx.contrib"
MICROSOFT_OPSET = 1  # the only one there is


@dataclass(frozen=True)
class Release:
    """The highest IR version, opset of standard operators, and version of the ORT format that a release reads."""

    ir_version: int
    opset: int
    ort_format: int


RELEASES = {
    "1.15": Release(9, 18, 5),
    "1.16": Release(9, 19, 6),
    "1.17": Release(9, 20, 6),
    "1.18": Release(10, 21, 6),
    "1.19": Release(10, 21, 6),
    "1.20": Release(10, 21, 6),
    "1.21": Release(10, 22, 6),
    "1.22": Release(10, 22, 6),
    "1.23": Release(11, 23, 6),
    "1.24": Release(13, 25, 6),
    "1.25": Release(13, 26, 6),
    "1.26": Release(13, 26, 6),
    "1.27": Release(13, 26, 6),
    "1.28": Release(13, 26, 6),
    "1.29": Release(13, 26, 6),
    "1.30": Release(13, 26, 6),
    "1.31": Release(13, 26, 6),
    "1.32": Release(14, 28, 6),
}
ORDER = list(RELEASES)
DEFAULT = "1.17"

# Standard operators whose kernels came after their opset was read: an .onnx file is helped out by their definition, one
# in ORT format is not. What has no kernel to this day is written in other operators when that is saved.
LATE = {"Gelu": "1.18", "DeformConv": "1.25", "TensorScatter": "1.25"}

# ONNX Runtime's operators that variants use or that its optimiser makes of them on the CPU → release → the attributes
# and further inputs that came with it, the operator itself with the first; all have CPU kernels from there on. 1.16
# stands for itself and whatever was before: 1.15 does not read today's ORT format.
OPERATORS: dict[str, dict[str, tuple[str, ...]]] = {
    "Attention": {
        "1.16": (
            "do_rotary",
            "mask_filter_value",
            "num_heads",
            "past_present_share_buffer",
            "qkv_hidden_sizes",
            "scale",
            "unidirectional",
        ),
        "1.17": ("rotary_embedding_dim",),
    },
    "BiasGelu": {"1.16": ()},
    "DequantizeLinear": {"1.16": ("axis",)},
    "DynamicQuantizeMatMul": {"1.16": ()},
    "EmbedLayerNormalization": {"1.16": ("epsilon", "mask_index_type")},
    "FastGelu": {"1.16": ()},
    "FusedGemm": {
        "1.16": (
            "activation",
            "activation_alpha",
            "activation_beta",
            "activation_gamma",
            "alpha",
            "beta",
            "transA",
            "transB",
        )
    },
    "FusedMatMul": {"1.16": ("alpha", "transA", "transB", "transBatchA", "transBatchB")},
    "GatherBlockQuantized": {"1.20": ("block_size", "gather_axis", "quantize_axis"), "1.23": ("bits",)},
    "Gelu": {"1.16": ()},
    "MatMulIntegerToFloat": {"1.16": ()},
    "MatMulNBits": {
        "1.16": ("K", "N", "bits", "block_size"),
        "1.17": ("accuracy_level",),
        "1.18": ("input 4",),
        "1.19": ("input 5",),
        "1.28": ("weight_prepacked",),
    },
    "MultiHeadAttention": {
        "1.16": ("mask_filter_value", "num_heads", "scale"),
        "1.17": ("unidirectional",),
        "1.22": ("input 8", "input 9"),
    },
    "QAttention": {
        "1.16": (
            "do_rotary",
            "mask_filter_value",
            "num_heads",
            "past_present_share_buffer",
            "scale",
            "unidirectional",
        )
    },
    "QLinearAdd": {"1.16": ()},
    "QLinearMul": {"1.16": ()},
    "QLinearSoftmax": {"1.16": ("axis", "opset")},
    "QuantizeLinear": {"1.16": ("axis",)},
    "QuickGelu": {"1.16": ("alpha",)},
    "SkipLayerNormalization": {"1.16": ("epsilon",)},
}


@dataclass(frozen=True, order=True)
class Use:
    """That a graph has an operator of `domain`, with an attribute, or with one of its inputs (``input 4``), given."""

    domain: str
    operator: str
    what: str = ""

    @property
    def since(self) -> str | None:
        """The first release that has it; None where none is known to. Standard operators are their opset's affair, but
        for late kernels, and inputs that are not listed were there from the first."""
        if self.domain in (ML, EXTENSIONS):  # older than all of these, and a library's of its own
            return ORDER[0]
        if self.domain == STANDARD:
            return ORDER[0] if self.what else LATE.get(self.operator, ORDER[0])
        by_release = OPERATORS.get(self.operator, {}) if self.domain == MICROSOFT else {}
        found = [release for release, names in by_release.items() if self.what in names]
        old = not self.what or self.what.startswith("input ")
        return next(iter(found or (by_release if old else ())), None)

    def __str__(self) -> str:
        name = f"{self.operator} with {self.what}" if self.what else self.operator
        return f"{name} ({f'since {self.since}' if self.since else 'of no release known here'})"


def newer(release: str, uses: Iterable[Use]) -> list[Use]:
    """Those of `uses` that `release` lacks; of an operator it lacks, no attribute as well."""
    lacking = [use for use in sorted(set(uses)) if use.since is None or ORDER.index(use.since) > ORDER.index(release)]
    whole = {(use.domain, use.operator) for use in lacking if not use.what}
    return [use for use in lacking if not use.what or (use.domain, use.operator) not in whole]


def oldest(uses: Iterable[Use]) -> str | None:
    """The first release that has all of them; None where there is none."""
    since = [use.since for use in uses]
    return None if None in since else max((each for each in since if each), key=ORDER.index, default=ORDER[0])
