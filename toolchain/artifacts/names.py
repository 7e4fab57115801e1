"""Names of variants.

Name grammar:
``<runtime>[-std|-webgpu][-prunedNN[-rE][-magnitude|-mask]][-exits][-<scheme>][-portable|-static][+<label>]``. In
``-prunedNN``, NN is the pruning ratio in per cent; in ``-rE``, E is the number of recovery epochs. A name with
``-std``, ``-webgpu``, ``-prunedNN`` or ``-exits``, or with the runtime ``torch-compile``, omits ``-fp32``.

A label distinguishes variants that have the same tags and different settings. A variant built from a labelled variant
keeps that label, or appends a hyphen and another word to it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from toolchain.errors import UnknownVariantError

COMPILED = "torch-compile"
RUNTIMES = (COMPILED, "torchao", "torch", "bnb", "onnx")
SCHEMES = ("fp32", "bf16", "fp16", "int8", "int4", "nf4", "fp4")
METHODS = ("fisher", "magnitude", "mask")
LABEL = r"(?=.{1,100}\Z)[a-z0-9]+(?:-[a-z0-9]+)*"


@dataclass(frozen=True)
class Parts:
    """The parts of a variant's name; ``str`` joins them.

    Attributes:
        runtime: Runtime tag, one of `RUNTIMES`.
        std: Whether the ONNX graph has standard operators only.
        webgpu: Whether the ONNX graph has only operators that ONNX Runtime computes on WebGPU.
        pruned: Pruning ratio in per cent; 0 for an unpruned model.
        recovered: Number of recovery epochs; 0 without recovery.
        method: Pruning method, one of `METHODS`.
        exits: Whether texts can skip the last layers of the ONNX graph.
        scheme: Tag of the quantisation scheme, one of `SCHEMES`; ``fp32`` without quantisation.
        portable: Whether the int8 weights have 7 bits, so that their products never saturate.
        static: Whether the int8 activation scales are fixed.
        label: Label after ``+``; empty without a label.
    """

    runtime: str
    std: bool = False
    webgpu: bool = False
    pruned: int = 0
    recovered: int = 0
    method: str = METHODS[0]
    exits: bool = False
    scheme: str = "fp32"
    portable: bool = False
    static: bool = False
    label: str = ""

    @property
    def is_torch_fp32(self) -> bool:
        """Returns whether the variant is a PyTorch model in fp32, from which all variants of other kinds derive."""
        return (self.runtime, self.scheme) == ("torch", "fp32")

    def __str__(self) -> str:
        tags = [tag for tag in ("std", "webgpu") if getattr(self, tag)]
        if self.pruned:
            tags.append(f"pruned{self.pruned:02}")
            tags += [f"r{self.recovered}"] if self.recovered else []
            tags += [self.method] if self.method != METHODS[0] else []
        tags += ["exits"] if self.exits else []
        if self.scheme != "fp32" or not (tags or self.runtime == COMPILED):
            tags.append(self.scheme)
        tags += ["portable"] if self.portable else []
        tags += ["static"] if self.static else []
        return "-".join([self.runtime, *tags]) + (f"+{self.label}" if self.label else "")


_NAME = re.compile(
    rf"(?P<runtime>{'|'.join(RUNTIMES)})(?P<std>-std)?(?P<webgpu>-webgpu)?"
    rf"(-pruned(?P<pruned>\d\d)(-r(?P<recovered>\d{{1,6}}))?(-(?P<method>{'|'.join(METHODS)}))?)?"
    rf"(?P<exits>-exits)?(-(?P<scheme>{'|'.join(SCHEMES)}))?(?P<portable>-portable)?(?P<static>-static)?(\+(?P<label>{LABEL}))?",
    re.ASCII,
)


class VariantName(str):
    """A variant name that matches the grammar, with its `parts`.

    Raises:
        UnknownVariantError: The text does not match the grammar, or is not canonical, such as ``onnx-pruned50-fp32``.
    """

    parts: Parts

    def __new__(cls, text: str | Parts) -> VariantName:
        """Creates a variant name: parses a text, or joins parts."""
        name = super().__new__(cls, text)
        name.parts = text if isinstance(text, Parts) else text.parts if isinstance(text, VariantName) else _parse(text)
        return name

    def with_parts(self, **changes: Any) -> VariantName:
        """Returns a copy of the name with the given changes in its parts."""
        return VariantName(dataclasses.replace(self.parts, **changes))

    @property
    def unpruned_name(self) -> VariantName:
        """Returns the name of the corresponding variant of the unpruned model, without a label."""
        return self.with_parts(pruned=0, recovered=0, method=METHODS[0], label="")


def _parse(text: str) -> Parts:
    match = _NAME.fullmatch(text)
    if match:
        parts = Parts(
            match["runtime"],
            bool(match["std"]),
            bool(match["webgpu"]),
            int(match["pruned"] or 0),
            int(match["recovered"] or 0),
            match["method"] or METHODS[0],
            bool(match["exits"]),
            match["scheme"] or "fp32",
            bool(match["portable"]),
            bool(match["static"]),
            match["label"] or "",
        )
        if str(parts) == text:
            return parts
    raise UnknownVariantError(f"{text!r} is not a variant name.", "`toolchain variants` lists the names.")


def label_prefixes(label: str) -> list[str]:
    """Returns the labels that the parent of a variant with this `label` can have, longest first.

    For the label ``a-b``, the parent can have the label ``a-b``, the label ``a`` or no label.
    """
    parts = label.split("-")
    return ["-".join(parts[:count]) for count in range(len(parts), 0, -1)] + [""]
