"""What can be built: a variant is one step applied to one parent, and its name says both.

A new kind of artifact is a step config here, a line in `_derived`, and its function in `steps/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from toolchain.artifacts.names import VariantName, parse_name, shorter
from toolchain.errors import ArtifactError, UnknownVariantError

PROVIDERS = ("cpu", "cuda")
# Backend → the schemes it quantises to, the first by default, each with the tag of the variant's name. ONNX Runtime's
# fp16 is a graph for other kernels, by `Optimize`.
QUANTIZED = {
    "ort": {"dynamic": "int8", "static": "int8", "int4": "int4", "fp16": "fp16"},
    "torch": {"int8": "int8", "bf16": "bf16", "fp16": "fp16"},
    "bnb": {"int8": "int8", "nf4": "nf4", "fp4": "fp4"},
}

# Rewrites `Optimize` applies by default, in order.
CPU_PASSES = ("fuse", "residual-sum", "first-token", "first-query")
CUDA_PASSES = ("fuse-cuda", "half")
# Rewrites `Quantize` applies on ONNX Runtime by scheme, in order; the last two have a form for each scheme.
QUANTIZE_PASSES = {
    "dynamic": ("padding", "quantize-linear", "quantize-embedding"),
    "static": ("smooth", "quantize-linear", "quantize-embedding"),
    "int4": ("quantize-linear", "quantize-embedding"),
}


@dataclass(frozen=True)
class Import:
    """Checkpoint to fp32 safetensors. `revision`: the hub's commit, or a digest of the files; None: the newest.

    `base`: of a LoRA adapter, what it is merged into, ``ID@COMMIT`` of the hub or a digest.
    """

    revision: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Prune:
    """Heads and FFN neurons removed until `ratio` of the encoder's linear parameters is gone.

    `method`: what is unimportant, by ``fisher`` information or ``magnitude``; ``mask`` zeroes rows and removes nothing.
    `cost`: what is paid for importance, ``parameters`` or this machine's ``latency``. `layers`: how many stay, None for
    all; the others go first and whole. `train` is the training data's digest (empty: what the workspace has), of which
    `sentences` rank and tune.
    """

    ratio: float
    method: str = "fisher"
    cost: str = "parameters"
    layers: int | None = None
    train: str = ""
    sentences: int = 2000
    seed: int = 20


@dataclass(frozen=True)
class Recover:
    """A pruned model trained for `epochs` to answer as the unpruned one does; `train` as for `Prune`.

    It learns from the rows and from pairs of them, new ones in each epoch, `pairs` a row times the share of parameters
    that is gone, in which the share `masked` of the tokens is hidden.
    """

    epochs: int
    train: str = ""
    learning_rate: float = 1e-4
    batch_size: int = 64
    pairs: float = 1.0
    masked: float = 0.2
    seed: int = 20


@dataclass(frozen=True)
class Export:
    """PyTorch to ONNX, standard operators of one `opset`."""

    opset: int = 18


@dataclass(frozen=True)
class Optimize:
    """Standard ONNX to the graph that is fast on one execution `provider`, by the named `passes` in order."""

    provider: str = "cpu"
    passes: tuple[str, ...] = CPU_PASSES

    @classmethod
    def for_provider(cls, provider: str) -> Optimize:
        """With the provider's own passes."""
        return cls(provider, {"cpu": CPU_PASSES, "cuda": CUDA_PASSES}[provider])


@dataclass(frozen=True)
class Quantize:
    """Fewer bits, by `backend` and its `scheme`.

    ``ort`` ``dynamic`` is U8 activations, scaled at run time, × S8 weights, scaled per channel; ``static`` the same
    with scales fixed beforehand, on training data, `train` as for `Prune`; ``int4`` is weights in blocks of 4 bits, for
    size; ``torch`` ``int8`` the same in PyTorch, ``bf16`` and ``fp16`` half precision; ``bnb`` is
    bitsandbytes: ``int8`` LLM.int8(), ``nf4`` and ``fp4`` 4-bit blocks. For ``ort``: `reduce_range` is weights of 7
    bits, whose products no processor saturates; `embeddings` the bits of the tables where these are not the scheme's
    own, ``int8`` or ``int4``; `keep_fp32` how many of the linear layers that lose most stay as they are, chosen on
    training data, `train` as for `Prune`; `passes` those of its `QUANTIZE_PASSES` that are applied, None for all;
    `trim_vocab` the texts whose tokens stay in the vocabulary, ``train`` or the digest of a file
    (`rows.Texts.digest`), where the others go.
    """

    backend: str = "ort"
    scheme: str = "dynamic"
    reduce_range: bool | None = None
    embeddings: str | None = None
    keep_fp32: int | None = None
    train: str | None = None
    passes: tuple[str, ...] | None = None
    trim_vocab: str | None = None


Step = Import | Prune | Recover | Export | Optimize | Quantize

STEP_TYPES: dict[str, type[Step]] = {
    "import": Import,
    "prune": Prune,
    "recover": Recover,
    "export": Export,
    "optimize": Optimize,
    "quantize": Quantize,
}


def learns(step: Step) -> TypeGuard[Prune | Recover | Quantize]:
    """Whether what comes of it depends on the training data."""
    if isinstance(step, Quantize):
        return bool(step.keep_fp32 or step.trim_vocab) or step.scheme == "static"
    return isinstance(step, Recover) or (isinstance(step, Prune) and step.method != "mask")


def step_name(step: Step) -> str:
    """The verb of a step: ``export`` for an `Export`."""
    return next(name for name, kind in STEP_TYPES.items() if isinstance(step, kind))


def settings_of(step: Step) -> dict[str, Any]:
    """The step's settings as JSON values; what a step does not have is None and left out."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(step).items()
        if value is not None
    }


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
class Variant:
    """`step` applied to `parent` gives `name`, which can run on `providers`."""

    name: str
    parent: str | None
    step: Step
    providers: tuple[str, ...] = ("cpu",)

    @property
    def runtime(self) -> str:
        """``torch`` or ``onnx``: which backend opens it."""
        return parse_name(self.name).runtime

    @property
    def agreement(self) -> str:
        """How its answers must agree with the PyTorch model it came from: ``exact`` to fp32 rounding, ``close`` in
        fewer bits, or ``free`` where the step makes another model of it."""
        if isinstance(self.step, Prune | Recover):
            return "free"
        return "exact" if parse_name(self.name).scheme == "fp32" else "close"


DEFAULT_RATIOS = (0.3, 0.4, 0.5)
_PRUNED = tuple(VariantName("torch", pruned=round(100 * ratio)) for ratio in DEFAULT_RATIOS)
# What is built and measured where nothing is named.
DEFAULT_CELLS: dict[str, tuple[str, ...]] = {
    "cpu": (
        "torch-fp32",
        "torch-bf16",
        "torch-int8",
        *map(str, _PRUNED),
        *(str(dataclasses.replace(name, scheme="int8")) for name in _PRUNED),
        "bnb-int8",
        "bnb-nf4",
        "onnx-std",
        "onnx-fp32",
        "onnx-int8",
        *(str(dataclasses.replace(name, runtime="onnx", scheme="int8")) for name in _PRUNED),
    ),
    "cuda": ("torch-fp32", "torch-fp16", "bnb-int8", "bnb-nf4", "onnx-fp32", "onnx-fp16"),
}


def get(name: str) -> Variant:
    """The variant of that name; `UnknownVariantError` with the nearest names otherwise."""
    try:
        variant = _derived(parse_name(name))
    except UnknownVariantError:
        variant = None
    if variant:
        return variant
    known = [variant.name for default in DEFAULT_CELLS["cpu"] for variant in lineage(default)]
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known)}."
    raise UnknownVariantError(f"There is no variant {name!r}.", hint)


def is_variant(name: str) -> bool:
    """Whether `get` knows it."""
    try:
        return _derived(parse_name(name)) is not None
    except UnknownVariantError:
        return False


def _derived(name: VariantName) -> Variant | None:
    """The step that makes a variant and what it takes, by the last tag of its name; None where nothing makes it."""
    other = functools.partial(dataclasses.replace, name, label="")
    parent: VariantName
    step: Step
    providers: tuple[str, ...] = PROVIDERS
    if name.recovered and name.method == "mask":
        return None  # training would fill the zeros
    if (name.portable or name.static) and (name.runtime, name.scheme) != ("onnx", "int8"):
        return None  # only ONNX Runtime's int8 has weights of fewer bits, or fixed scales, to choose
    if name.portable and name.static:
        return None
    if name.runtime == "torch" and not name.std and name.scheme == "fp32":
        if not name.pruned:
            return None if name.label else Variant(str(name), None, Import(), PROVIDERS)
        if name.recovered:
            parent, step = other(recovered=0), Recover(name.recovered)
        else:
            parent, step = VariantName("torch"), Prune(name.pruned / 100, name.method)
    elif name.runtime == "torch" and name.scheme in QUANTIZED["torch"] and not name.std:
        parent, step = other(scheme="fp32"), Quantize("torch", name.scheme)
        providers = ("cpu",) if name.scheme == "int8" else PROVIDERS
    elif name.runtime == "bnb" and name.scheme in QUANTIZED["bnb"] and not (name.std or name.pruned):
        parent, step = VariantName("torch"), Quantize("bnb", name.scheme)
    elif name.runtime == "onnx" and name.scheme == "int8":
        parent, providers = other(scheme="fp32", portable=False, static=False), ("cpu",)
        step = Quantize(scheme="static") if name.static else Quantize(reduce_range=name.portable or None)
    elif name.runtime == "onnx" and name.scheme == "int4" and not name.std:
        parent, step, providers = other(scheme="fp32"), Quantize(scheme="int4"), ("cpu",)
    elif name.runtime == "onnx" and name.scheme == "fp32" and name.std:
        parent, step = other(runtime="torch", std=False), Export()
    elif name.runtime == "onnx" and name.scheme == "fp32":
        parent, step = other(std=True), Optimize.for_provider("cpu")
    elif name.runtime == "onnx" and name.scheme == "fp16" and not name.std:
        parent, step, providers = other(std=True, scheme="fp32"), Optimize.for_provider("cuda"), ("cuda",)
    else:
        return None
    return Variant(str(name), str(parent), step, providers)


def lineage(name: str) -> list[Variant]:
    """The variant's ancestors from the root on, itself last; of a label, those it has unless its manifest says
    otherwise."""
    chain = [get(name)]
    while chain[0].parent is not None:
        chain.insert(0, get(chain[0].parent))
    return chain


def child(parent: str, step: Step, label: str = "") -> Variant:
    """The variant that `step` makes of `parent`, under a `label` or its parent's; `UnknownVariantError` where it makes
    none of it."""
    get(parent)
    of = parse_name(parent)
    if of.label and label and of.label not in shorter(label):
        raise UnknownVariantError(
            f"What is made of {parent} is called {of.label} as well.",
            f"Leave the name out, or say {of.label} or {of.label}-{label}.",
        )
    name = {
        Prune: lambda s: dataclasses.replace(of, pruned=round(100 * s.ratio), method=s.method, recovered=0),
        Recover: lambda s: dataclasses.replace(of, recovered=s.epochs),
        Export: lambda s: dataclasses.replace(of, runtime="onnx", std=True),
        Optimize: lambda s: dataclasses.replace(of, std=False, scheme="fp16" if s.provider == "cuda" else "fp32"),
        Quantize: lambda s: dataclasses.replace(
            of,
            runtime=_RUNTIME[s.backend],
            scheme=QUANTIZED[s.backend].get(s.scheme, ""),
            portable=bool(s.reduce_range),
            static=s.scheme == "static",
        ),
    }[type(step)](step)
    variant = _derived(dataclasses.replace(name, label=label or of.label))
    plain = str(dataclasses.replace(of, label=""))
    if variant is None or variant.parent != plain or not isinstance(variant.step, type(step)):
        raise UnknownVariantError(
            f"Nothing is made from {parent} by {step_name(step)}.", f"It takes {_TAKES[type(step)]}."
        )
    return dataclasses.replace(variant, parent=parent)


_RUNTIME = {"ort": "onnx", "torch": "torch", "bnb": "bnb"}
_TAKES = {
    Prune: "torch-fp32: what is pruned already is pruned further from there, at a higher ratio",
    Recover: "a pruned PyTorch variant such as torch-pruned50",
    Export: "a PyTorch variant such as torch-fp32",
    Optimize: "an exported graph such as onnx-std",
    Quantize: "an fp32 graph such as onnx-fp32, onnx-pruned50 or onnx-std (--backend ort), an fp32 PyTorch variant "
    "such as torch-pruned50 (torch), or torch-fp32 (bnb)",
}
