"""Variants and steps: a variant is one step applied to one parent, and its name determines both.

A new kind of artifact needs a step class here, a line in `_derived`, and a function in `steps/`.
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
# Backend → its quantisation schemes, the default first → the tag in the variant's name. On ONNX Runtime, `Optimize`
# makes fp16, because that graph is for other kernels.
QUANTIZED = {
    "ort": {"dynamic": "int8", "static": "int8", "int4": "int4", "fp16": "fp16"},
    "torch": {"int8": "int8", "bf16": "bf16", "fp16": "fp16"},
    "bnb": {"int8": "int8", "nf4": "nf4", "fp4": "fp4"},
}

# Passes that `Optimize` applies by default, in order.
CPU_PASSES = ("fuse", "residual-sum", "first-token", "first-query")
CUDA_PASSES = ("fuse-cuda", "half")
# Passes that `Quantize` applies on ONNX Runtime, by scheme and in order. The last two have several forms, such as
# ``quantize-linear-int4``; the step chooses the form.
QUANTIZE_PASSES = {
    "dynamic": ("padding", "quantize-linear", "quantize-embedding"),
    "static": ("smooth", "quantize-linear", "quantize-embedding"),
    "int4": ("quantize-linear", "quantize-embedding"),
}


@dataclass(frozen=True)
class Import:
    """Converts a checkpoint to fp32 safetensors.

    Attributes:
        revision: The hub's commit, or a digest of the files; None for the newest.
        base: For a LoRA adapter, the base to merge it into: ``ID@COMMIT`` of the hub, or a digest. None otherwise.
    """

    revision: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Prune:
    """Removes heads and FFN neurons until `ratio` of the encoder's linear parameters is removed.

    Attributes:
        ratio: Minimum share of the encoder's linear parameters to remove.
        method: Importance measure, ``fisher`` or ``magnitude``. ``mask`` sets rows to zero instead and removes nothing.
        cost: Cost that the selection weighs importance against: ``parameters``, or ``latency`` on this machine.
        layers: Number of layers to keep; the step first removes the others completely. None removes none in advance.
        train: Digest of the training data; if empty, the workspace's training data.
        sentences: Number of training sentences that rank the units and fit the remaining weights.
        seed: Random seed that chooses these sentences.
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
    """Trains a pruned model on the unpruned model's logits.

    The training rows are the original rows and random pairs of them. Each epoch draws new pairs.

    Attributes:
        epochs: Largest number of epochs.
        train: Digest of the training data, as in `Prune`.
        learning_rate: Peak learning rate.
        batch_size: Rows of a training step.
        pairs: Pairs per row and epoch, multiplied by the share of parameters that pruning removed.
        masked: Share of a pair's tokens that the mask token replaces.
        seed: Random seed of pairs, masks and row order.
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
    """Exports a PyTorch model to ONNX with standard operators of one `opset`."""

    opset: int = 18


@dataclass(frozen=True)
class Optimize:
    """Rewrites a standard ONNX graph for speed on one execution `provider`, by `passes` in order."""

    provider: str = "cpu"
    passes: tuple[str, ...] = CPU_PASSES

    @classmethod
    def for_provider(cls, provider: str) -> Optimize:
        """Returns the step with the default passes of the provider, ``cpu`` or ``cuda``."""
        return cls(provider, {"cpu": CPU_PASSES, "cuda": CUDA_PASSES}[provider])


@dataclass(frozen=True)
class Quantize:
    """Quantises a model to fewer bits, by the `scheme` of a `backend`.

    Schemes of ``ort`` (ONNX Runtime):

    * ``dynamic``: U8 activations with scales computed at run time, times S8 weights with scales per channel.
    * ``static``: the same products, with activation scales from calibration on training data.
    * ``int4``: weights in blocks of 4 bits, for size.

    Schemes of ``torch``: ``int8`` computes the products of ``dynamic`` in PyTorch; ``bf16`` and ``fp16`` are half
    precision. Schemes of ``bnb`` (bitsandbytes): ``int8`` is LLM.int8(); ``nf4`` and ``fp4`` are blocks of 4 bits.

    Attributes:
        backend: ``ort``, ``torch`` or ``bnb``. The attributes below `scheme` apply to ``ort`` only.
        scheme: A scheme of the backend.
        reduce_range: True for weights of 7 bits, whose products no processor saturates.
        embeddings: Type of the embedding tables, ``int8`` or ``int4``; None for the default of the scheme.
        keep_fp32: Number of linear layers that stay fp32. Training data selects the most sensitive layers.
        train: Digest of the training data, as in `Prune`; None where the step uses none.
        passes: The passes of `QUANTIZE_PASSES` to apply; None for all.
        trim_vocab: Corpus whose tokens stay in the vocabulary: ``train``, or `Texts.digest` of a file. None keeps all.
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
    """Returns whether the result of the step depends on training data."""
    if isinstance(step, Quantize):
        return bool(step.keep_fp32 or step.trim_vocab) or step.scheme == "static"
    return isinstance(step, Recover) or (isinstance(step, Prune) and step.method != "mask")


def step_name(step: Step) -> str:
    """Returns the name of the step in manifests and commands, such as ``export`` for an `Export`."""
    return next(name for name, kind in STEP_TYPES.items() if isinstance(step, kind))


def settings_of(step: Step) -> dict[str, Any]:
    """Returns the step's settings as JSON values, without those that are None."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(step).items()
        if value is not None
    }


def step_from(name: str, settings: Mapping[str, Any]) -> Step:
    """Returns the step that a manifest recorded.

    Args:
        name: Name of the step, as from `step_name`.
        settings: Settings of the step, as from `settings_of`.

    Raises:
        ArtifactError: This release does not know the step or one of its settings.
    """
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
    """A variant: `step` applied to `parent` gives `name`, which runs on `providers`; `parent` is None for an import."""

    name: str
    parent: str | None
    step: Step
    providers: tuple[str, ...] = ("cpu",)

    @property
    def runtime(self) -> str:
        """Returns the runtime that opens the variant: ``torch``, ``bnb`` or ``onnx``."""
        return parse_name(self.name).runtime

    @property
    def agreement(self) -> str:
        """Returns how closely its logits must match the PyTorch model that it derives from.

        Returns:
            ``exact`` (equal to fp32 rounding), ``close`` (few flips, for fewer bits), or ``free`` (no limit, because
            pruning and recovery make another model).
        """
        if isinstance(self.step, Prune | Recover):
            return "free"
        return "exact" if parse_name(self.name).scheme == "fp32" else "close"


DEFAULT_RATIOS = (0.3, 0.4, 0.5)
_PRUNED = tuple(VariantName("torch", pruned=round(100 * ratio)) for ratio in DEFAULT_RATIOS)
# Variants that commands build and measure by default, by provider.
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
    """Returns the variant of that name.

    Raises:
        UnknownVariantError: No variant has this name. The error suggests similar names.
    """
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
    """Returns whether a variant of that name exists."""
    try:
        return _derived(parse_name(name)) is not None
    except UnknownVariantError:
        return False


def _derived(name: VariantName) -> Variant | None:
    """Returns the variant with its default step and parent, which its tags determine; None where no step builds it."""
    other = functools.partial(dataclasses.replace, name, label="")
    parent: VariantName
    step: Step
    providers: tuple[str, ...] = PROVIDERS
    if name.recovered and name.method == "mask":
        return None  # training would overwrite the zeros of a mask
    if (name.portable or name.static) and (name.runtime, name.scheme) != ("onnx", "int8"):
        return None  # only ONNX Runtime's int8 offers 7-bit weights and fixed activation scales
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
    """Returns the variant's ancestors from the root on, and the variant itself last.

    The ancestors of a labelled variant are unlabelled here. `Workspace.lineage` returns the recorded ones.
    """
    chain = [get(name)]
    while chain[0].parent is not None:
        chain.insert(0, get(chain[0].parent))
    return chain


def child(parent: str, step: Step, label: str = "") -> Variant:
    """Returns the variant that `step` builds from `parent`.

    Args:
        parent: Name of the parent.
        step: The step to apply.
        label: Label of the variant; if empty, the label of the parent.

    Raises:
        UnknownVariantError: The step cannot build from this parent, or `label` does not extend the parent's label.
    """
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
