"""Variants: a variant is one step applied to one parent, and its name determines both.

A new kind of variant needs an entry in `_KINDS` below, and a step that builds it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.artifacts.names import COMPILED, METHODS, Parts, VariantName, label_prefixes
from toolchain.artifacts.steps import (
    HALF_PASSES,
    QUANTIZED,
    Compile,
    Exits,
    Export,
    Import,
    Optimize,
    Prune,
    Quantize,
    Recover,
    Step,
    step_name,
)
from toolchain.errors import UnknownVariantError
from toolchain.results.providers import CUDA_GRAPHS, TENSORRT


@dataclass(frozen=True)
class Variant:
    """A variant `name` that `step` builds from `parent` (None for an import), and that runs on `providers`."""

    name: VariantName
    parent: VariantName | None
    step: Step
    providers: tuple[str, ...] = ("cpu",)

    @property
    def runtime(self) -> str:
        """Returns the runtime that opens the variant, a key of `backends.BACKENDS`."""
        return self.name.parts.runtime

    @property
    def agreement(self) -> str:
        """Returns how closely the variant's logits must match the logits of its PyTorch ancestor.

        Returns:
            ``exact`` (equal up to fp32 rounding), ``close`` (few flips, for variants with fewer bits), or ``free`` (no
            limit, because pruning, recovery and exits change the model).
        """
        if isinstance(self.step, Prune | Recover | Exits):
            return "free"
        return "exact" if self.name.parts.scheme == "fp32" else "close"


DEFAULT_RATIOS = (0.3, 0.4, 0.5)
_PRUNED_NAMES = tuple(VariantName(f"torch-pruned{round(100 * ratio)}") for ratio in DEFAULT_RATIOS)
# Variants that commands build and measure by default, by provider.
DEFAULT_CELLS: dict[str, tuple[str, ...]] = {
    "cpu": (
        "torch-fp32",
        "torch-bf16",
        "torch-compile",
        "torch-compile-bf16",
        "torch-int8",
        *_PRUNED_NAMES,
        *(name.with_parts(scheme="int8") for name in _PRUNED_NAMES),
        "bnb-int8",
        "bnb-nf4",
        "onnx-std",
        "onnx-fp32",
        "onnx-int8",
        *(name.with_parts(runtime="onnx", scheme="int8") for name in _PRUNED_NAMES),
    ),
    "cuda": ("torch-fp32", "torch-fp16", "bnb-int8", "bnb-nf4", "onnx-fp32", "onnx-fp16"),
    CUDA_GRAPHS: ("torch-compile-fp16", "onnx-fp16"),
    TENSORRT: ("onnx-std",),
}


@dataclass(frozen=True)
class _Kind:
    """A kind of variants: the possible names of the variants, and the step and the parent of each variant.

    Attributes:
        runtime: Runtime tag in the variants' names.
        schemes: Scheme tags that can be in the variants' names.
        tags: Parts that the variants' names must have, besides runtime and scheme.
        optional: Parts that the variants' names may have.
        parent: Parts in which the parent's name differs from the variant's name, with the parent's values; None for
            variants without a parent.
        step: Function that returns the default step for the parts of a variant's name.
        providers: Execution providers that run the variants.
    """

    runtime: str
    schemes: tuple[str, ...]
    tags: frozenset[str]
    optional: frozenset[str]
    parent: Mapping[str, Any] | None
    step: Callable[[Parts], Step]
    providers: tuple[str, ...] = ("cpu", "cuda")

    def describes(self, parts: Parts) -> bool:
        """Returns whether a variant with these `parts` in its name is of this kind."""
        tags = {tag for tag in _TAGS if getattr(parts, tag)}
        same_runtime = parts.runtime == self.runtime and parts.scheme in self.schemes
        return same_runtime and self.tags <= tags <= self.tags | self.optional


_TAGS = ("std", "webgpu", "pruned", "recovered", "exits", "portable", "static")
_NO_TAGS: frozenset[str] = frozenset()
_PRUNING_TAGS = frozenset({"pruned", "recovered"})
_WEBGPU_TAGS = frozenset({"webgpu"})
_FP32_SCHEMES = ("fp32",)
_KINDS = (
    _Kind("torch", _FP32_SCHEMES, _NO_TAGS, _NO_TAGS, None, lambda _: Import()),
    _Kind(
        "torch",
        _FP32_SCHEMES,
        frozenset({"pruned"}),
        _NO_TAGS,
        {"pruned": 0, "method": METHODS[0]},
        lambda parts: Prune(parts.pruned / 100, parts.method),
    ),
    _Kind("torch", _FP32_SCHEMES, _PRUNING_TAGS, _NO_TAGS, {"recovered": 0}, lambda parts: Recover(parts.recovered)),
    _Kind(
        "torch", ("int8",), _NO_TAGS, _PRUNING_TAGS, {"scheme": "fp32"}, lambda _: Quantize("torch", "int8"), ("cpu",)
    ),
    _Kind(
        "torch",
        ("bf16", "fp16"),
        _NO_TAGS,
        _PRUNING_TAGS,
        {"scheme": "fp32"},
        lambda parts: Quantize("torch", parts.scheme),
    ),
    _Kind(
        COMPILED,
        ("fp32", "bf16", "fp16"),
        _NO_TAGS,
        _PRUNING_TAGS,
        {"runtime": "torch"},
        lambda _: Compile(),
        ("cpu", "cuda", CUDA_GRAPHS),
    ),
    _Kind(
        "bnb",
        tuple(QUANTIZED["bnb"]),
        _NO_TAGS,
        _NO_TAGS,
        {"runtime": "torch", "scheme": "fp32"},
        lambda parts: Quantize("bnb", parts.scheme),
    ),
    _Kind(
        "torchao",
        tuple(QUANTIZED["torchao"]),
        _NO_TAGS,
        _PRUNING_TAGS,
        {"runtime": "torch", "scheme": "fp32"},
        lambda parts: Quantize("torchao", parts.scheme),
        ("cpu",),
    ),
    _Kind(
        "onnx",
        _FP32_SCHEMES,
        frozenset({"std"}),
        _PRUNING_TAGS,
        {"runtime": "torch", "std": False},
        lambda _: Export(),
        ("cpu", "cuda", TENSORRT),
    ),
    _Kind("onnx", _FP32_SCHEMES, _NO_TAGS, _PRUNING_TAGS, {"std": True}, lambda _: Optimize.for_provider("cpu")),
    _Kind(
        "onnx",
        ("fp16",),
        _NO_TAGS,
        _PRUNING_TAGS,
        {"std": True, "scheme": "fp32"},
        lambda _: Optimize.for_provider("cuda"),
        ("cuda", CUDA_GRAPHS),
    ),
    _Kind(
        "onnx",
        _FP32_SCHEMES,
        _WEBGPU_TAGS,
        _PRUNING_TAGS,
        {"std": True, "webgpu": False},
        lambda _: Optimize.for_provider("webgpu"),
        ("cpu",),
    ),
    _Kind(
        "onnx",
        ("fp16",),
        _WEBGPU_TAGS,
        _PRUNING_TAGS,
        {"scheme": "fp32"},
        lambda _: Optimize("webgpu", HALF_PASSES),
        ("cpu",),
    ),
    _Kind("onnx", ("int8",), _NO_TAGS, _PRUNING_TAGS | {"std"}, {"scheme": "fp32"}, lambda _: Quantize(), ("cpu",)),
    _Kind(
        "onnx",
        ("int8",),
        frozenset({"portable"}),
        _PRUNING_TAGS | {"std"},
        {"scheme": "fp32", "portable": False},
        lambda _: Quantize(reduce_range=True),
        ("cpu",),
    ),
    _Kind(
        "onnx",
        ("int8",),
        frozenset({"static"}),
        _PRUNING_TAGS | {"std"},
        {"scheme": "fp32", "static": False},
        lambda _: Quantize(scheme="static"),
        ("cpu",),
    ),
    _Kind(
        "onnx",
        ("int4",),
        _NO_TAGS,
        _PRUNING_TAGS | _WEBGPU_TAGS,
        {"scheme": "fp32"},
        lambda _: Quantize(scheme="int4"),
        ("cpu",),
    ),
    _Kind(
        "onnx",
        ("fp32", "int8", "int4"),
        frozenset({"exits"}),
        _PRUNING_TAGS | {"std", "portable", "static"},
        {"exits": False},
        lambda _: Exits(),
        ("cpu",),
    ),
)


def get(name: str) -> Variant:
    """Returns the variant called `name`.

    Raises:
        UnknownVariantError: No variant is called `name`; the error suggests similar names.
    """
    try:
        variant = _find_variant(VariantName(name))
    except UnknownVariantError:
        variant = None
    if variant:
        return variant
    names = list(dict.fromkeys(variant.name for default in DEFAULT_CELLS["cpu"] for variant in lineage(default)))
    similar_names = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(similar_names)}?" if similar_names else f"Variants: {', '.join(names)}."
    raise UnknownVariantError(f"There is no variant {name!r}.", hint)


def is_variant(name: str) -> bool:
    """Returns whether a variant called `name` exists."""
    try:
        return _find_variant(VariantName(name)) is not None
    except UnknownVariantError:
        return False


def _find_variant(name: VariantName) -> Variant | None:
    """Returns the variant called `name`, with its default step and parent; None if no step builds such a variant."""
    kind = next((kind for kind in _KINDS if kind.describes(name.parts)), None)
    if kind is None or (name.parts.label and kind.parent is None):
        return None
    if name.parts.recovered and name.parts.method == "mask":
        return None  # training would overwrite the zeros that the method ``mask`` sets
    parent = None if kind.parent is None else name.with_parts(label="", **kind.parent)
    return Variant(name, parent, kind.step(name.parts), kind.providers)


def lineage(name: str) -> list[Variant]:
    """Returns the variant's ancestors, root first, and then the variant itself.

    The returned ancestors have no labels. `Workspace.lineage` returns the recorded ancestors, with their labels.
    """
    chain = [get(name)]
    while chain[0].parent is not None:
        chain.insert(0, get(chain[0].parent))
    return chain


def derive_variant(parent: str, step: Step, label: str = "") -> Variant:
    """Returns the variant that `step` builds from `parent`.

    Args:
        parent: Name of the parent.
        step: The step to apply.
        label: Label of the variant; if empty, the label of the parent.

    Raises:
        UnknownVariantError: The step cannot build from this parent, or `label` does not extend the parent's label.
    """
    parent_name = get(parent).name
    if parent_name.parts.label and label and parent_name.parts.label not in label_prefixes(label):
        raise UnknownVariantError(
            f"The label of a variant built from {parent} must start with {parent_name.parts.label}.",
            f"Leave --name out, or use --name {parent_name.parts.label} or --name {parent_name.parts.label}-{label}.",
        )
    name = parent_name.with_parts(**_changed_parts(step), label=label or parent_name.parts.label)
    variant = _find_variant(name)
    if (
        variant is None
        or variant.parent != parent_name.with_parts(label="")
        or not isinstance(variant.step, type(step))
    ):
        raise UnknownVariantError(
            f"The step {step_name(step)} cannot build a variant from {parent}.",
            f"It takes {_PARENT_DESCRIPTIONS[type(step)]}.",
        )
    return dataclasses.replace(variant, parent=parent_name)


def _changed_parts(step: Step) -> dict[str, Any]:
    """Returns the parts of the parent's name that the step changes, with their new values."""
    match step:
        case Prune():
            return {"pruned": round(100 * step.ratio), "method": step.method, "recovered": 0}
        case Recover():
            return {"recovered": step.epochs}
        case Export():
            return {"runtime": "onnx", "std": True}
        case Optimize():
            is_half = step.provider == "cuda" or step.passes == HALF_PASSES
            return {"std": False, "webgpu": step.provider == "webgpu", "scheme": "fp16" if is_half else "fp32"}
        case Compile():
            return {"runtime": COMPILED}
        case Exits():
            return {"exits": True}
        case Quantize():
            return {
                "runtime": _BACKEND_RUNTIMES[step.backend],
                "scheme": QUANTIZED[step.backend][step.scheme],
                "portable": bool(step.reduce_range),
                "static": step.scheme == "static",
            }
        case Import():
            return {}


_BACKEND_RUNTIMES = {"ort": "onnx", "torch": "torch", "bnb": "bnb", "torchao": "torchao"}
_PARENT_DESCRIPTIONS = {
    Prune: "torch-fp32. To prune a pruned variant further, prune torch-fp32 at a higher ratio",
    Recover: "a pruned PyTorch variant such as torch-pruned50",
    Export: "a PyTorch variant such as torch-fp32",
    Optimize: "an exported graph such as onnx-std, or onnx-webgpu for fp16 on WebGPU",
    Compile: "a PyTorch variant in fp32, bf16 or fp16, such as torch-fp32",
    Exits: "an ONNX graph for CPUs such as onnx-int8 or onnx-pruned50",
    Quantize: "an fp32 graph such as onnx-fp32, onnx-pruned50 or onnx-std (--backend ort), onnx-webgpu (--scheme int4 "
    "and fp16), an fp32 PyTorch variant such as torch-pruned50 (torch and torchao), or torch-fp32 (bnb)",
}
