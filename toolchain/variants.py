"""What can be built: a variant is one step applied to one parent, and its name says how it came about.

Name grammar: ``<runtime>[-std][-<scheme>]``; ``-fp32`` is dropped as soon as another tag stands, and
``parse_name(str(name)) == name``. A new kind of artifact is a step config here, its function in `steps/`, and its
rows in `TABLE`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ArtifactError, UnknownVariantError

RUNTIMES = ("torch", "onnx")
SCHEMES = ("fp32", "int8")
PROVIDERS = ("cpu", "cuda")

# Rewrites `Optimize` applies by default, in order; each is a file of `passes/`.
CPU_PASSES = ("fuse", "residual-sum", "first-token")


@dataclass(frozen=True)
class Import:
    """Checkpoint to fp32 safetensors. `revision`: the hub's commit, or a digest of the files; None: the newest."""

    revision: str | None = None


@dataclass(frozen=True)
class Export:
    """PyTorch to ONNX, standard operators of one `opset`."""

    opset: int = 18


@dataclass(frozen=True)
class Optimize:
    """Standard ONNX to the graph that is fast on one execution `provider`, by the named `passes` in order."""

    provider: str = "cpu"
    passes: tuple[str, ...] = CPU_PASSES


@dataclass(frozen=True)
class Quantize:
    """Fewer bits: ``dynamic`` is U8 activations, scaled at run time, × S8 weights, scaled per channel."""

    backend: str = "ort"
    scheme: str = "dynamic"


Step = Import | Export | Optimize | Quantize

STEP_TYPES: dict[str, type[Import] | type[Export] | type[Optimize] | type[Quantize]] = {
    "import": Import,
    "export": Export,
    "optimize": Optimize,
    "quantize": Quantize,
}


def step_name(step: Step) -> str:
    """The verb of a step: ``export`` for an `Export`."""
    return next(name for name, kind in STEP_TYPES.items() if isinstance(step, kind))


def settings_of(step: Step) -> dict[str, Any]:
    """The step's settings as JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(step).items()}


def step_from(name: str, settings: Mapping[str, Any]) -> Step:
    """The step a manifest recorded; `ArtifactError` where this release knows no such step or setting."""
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return STEP_TYPES[name](**values)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"A manifest records the step {name!r} with settings {dict(settings)}, which this release does not know.",
            "Use the release that built it, or delete the folder and build it again.",
        ) from error


@dataclass(frozen=True)
class VariantName:
    """A variant's name in its parts."""

    runtime: str
    std: bool = False
    scheme: str = "fp32"

    def __str__(self) -> str:
        tags = ["std"] if self.std else []
        if self.scheme != "fp32" or not tags:
            tags.append(self.scheme)
        return "-".join([self.runtime, *tags])


_NAME = re.compile(rf"({'|'.join(RUNTIMES)})(-std)?(?:-({'|'.join(SCHEMES)}))?")


def parse_name(text: str) -> VariantName:
    """A name into its parts; `UnknownVariantError` unless it is the one spelling `str` gives."""
    match = _NAME.fullmatch(text)
    name = VariantName(match[1], bool(match[2]), match[3] or "fp32") if match else None
    if name is None or str(name) != text:
        raise UnknownVariantError(f"{text!r} is no variant name.", "`toolchain variants` lists them.")
    return name


@dataclass(frozen=True)
class Variant:
    """A row of the table: `step` applied to `parent` gives `name`, which is measured by default on `providers`."""

    name: str
    parent: str | None
    step: Step
    providers: tuple[str, ...] = ()

    @property
    def runtime(self) -> str:
        """``torch`` or ``onnx``: which backend opens it."""
        return parse_name(self.name).runtime

    @property
    def exact(self) -> bool:
        """Whether its logits must equal PyTorch's to fp32 rounding."""
        return parse_name(self.name).scheme == "fp32"


TABLE: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("torch-fp32", None, Import(), ("cpu", "cuda")),
        Variant("onnx-std", "torch-fp32", Export(), ("cpu",)),
        Variant("onnx-fp32", "onnx-std", Optimize(), ("cpu", "cuda")),
        Variant("onnx-int8", "onnx-fp32", Quantize(), ("cpu",)),
    )
}


def get(name: str) -> Variant:
    """The variant of that name; `UnknownVariantError` with the nearest names otherwise."""
    if name in TABLE:
        return TABLE[name]
    near = difflib.get_close_matches(name, TABLE, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(TABLE)}."
    raise UnknownVariantError(f"There is no variant {name!r}.", hint)


def lineage(name: str) -> list[Variant]:
    """The variant's ancestors from the root on, itself last."""
    chain = [get(name)]
    while chain[0].parent is not None:
        chain.insert(0, get(chain[0].parent))
    return chain


def child(parent: str, step: Step) -> Variant:
    """The variant that `step` makes of `parent`; `UnknownVariantError` where the table has none."""
    get(parent)
    same = [v for v in TABLE.values() if isinstance(v.step, type(step)) and _kind(v.step) == _kind(step)]
    for variant in same:
        if variant.parent == parent:
            return variant
    takes = ", ".join(v.parent for v in same if v.parent) or "nothing"
    raise UnknownVariantError(f"Nothing is made from {parent} by {step_name(step)}.", f"It takes: {takes}.")


def _kind(step: Step) -> tuple[str, ...]:
    """What tells two steps of one type apart by name: scheme and provider, not opsets and passes."""
    if isinstance(step, Quantize):
        return (step.backend, step.scheme)
    return (step.provider,) if isinstance(step, Optimize) else ()
