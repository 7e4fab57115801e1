"""Settings of the steps that turn one artifact into another, and checks of these settings.

The function of each step is in `toolchain/build/steps/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from toolchain.artifacts.names import VariantName
from toolchain.errors import ArtifactError, SettingsError
from toolchain.system.decoding import convert, strict

# Maps each backend to its quantisation schemes, default first, and each scheme to its tag in the variant's name.
# For ONNX Runtime, `Optimize` and not `Quantize` builds fp16 variants, because an fp16 graph needs the fused operators
# of CUDA.
QUANTIZED = {
    "ort": {"dynamic": "int8", "static": "int8", "int4": "int4", "fp16": "fp16"},
    "torch": {"int8": "int8", "bf16": "bf16", "fp16": "fp16"},
    "bnb": {"int8": "int8", "nf4": "nf4", "fp4": "fp4"},
    "torchao": {"int8": "int8"},
}

# Passes that `Optimize` applies by default, in order.
CPU_PASSES = ("fuse", "residual-sum", "first-token", "first-query")
CUDA_PASSES = ("fuse-cuda", "half")
WEBGPU_PASSES = ("fuse", "first-token", "first-query", "split-attention")
# Passes that convert an optimised graph for WebGPU from fp32 to fp16.
HALF_PASSES = ("half",)
OPTIMIZE_PASSES = {"cpu": CPU_PASSES, "cuda": CUDA_PASSES, "webgpu": WEBGPU_PASSES}
# Passes that `Quantize` applies on ONNX Runtime, by scheme and in order. ``quantize-linear`` and
# ``quantize-embedding`` have several forms, such as ``quantize-linear-int4``; the step chooses the form.
QUANTIZE_PASSES = {
    "dynamic": ("padding", "quantize-linear", "quantize-embedding"),
    "static": ("smooth", "quantize-linear", "quantize-embedding"),
    "int4": ("quantize-linear", "quantize-embedding"),
}


@strict
@dataclass(frozen=True)
class Import:
    """Converts a checkpoint to fp32 safetensors.

    Attributes:
        revision: Commit of a hub checkpoint, or a digest of the checkpoint's files; None for the newest revision.
        base: Base model of a LoRA adapter, as ``ID@COMMIT`` of the hub or as a digest; None for a complete model.
    """

    revision: str | None = None
    base: str | None = None


@strict
@dataclass(frozen=True)
class Prune:
    """Removes heads and FFN neurons until `ratio` of the encoder's linear parameters is removed.

    Attributes:
        ratio: Minimum share of the encoder's linear parameters to remove.
        method: Importance measure, ``fisher`` or ``magnitude``. The method ``mask`` only sets rows of weights to zero.
        cost: Cost of a head or neuron, which pruning weighs against importance, either ``parameters`` or ``latency`` on
            this machine.
        layers: Number of encoder layers to keep; None keeps all layers. Pruning removes layers first, and then heads
            and neurons.
        train: Digest of the training data; if empty, the workspace's training data.
        sentences: Number of training sentences to rank heads and neurons, and to refit the remaining weights.
        seed: Random seed for the choice of the training sentences.
        embedding_rank: Width of a narrow embedding table that, with a linear layer, replaces the table of word
            embeddings; None keeps the table.

    Raises:
        SettingsError: The ratio is not a multiple of 0.01 from 0.01 to 0.99, or a setting does not apply to the method.
    """

    ratio: float
    method: str = "fisher"
    cost: str = "parameters"
    layers: int | None = None
    train: str = ""
    sentences: int = 2000
    seed: int = 20
    embedding_rank: int | None = None

    def __post_init__(self) -> None:
        if not 0.01 <= self.ratio <= 0.99 or abs(100 * self.ratio - round(100 * self.ratio)) > 1e-9:
            raise SettingsError(
                f"--ratio {self.ratio:g} is not a multiple of 0.01 from 0.01 to 0.99.", "Give a ratio such as 0.5."
            )
        if self.embedding_rank is not None and self.embedding_rank < 1:
            raise SettingsError(
                f"--embedding-rank {self.embedding_rank} is not a positive number.", "Give a rank such as 64."
            )
        if self.method == "mask" and (self.layers or self.cost != "parameters" or self.embedding_rank):
            raise SettingsError("--method mask removes nothing.", "Leave --layers, --cost and --embedding-rank out.")


EXITS_WEIGHT = 1.0  # of exits in the loss of `Recover`


@strict
@dataclass(frozen=True)
class Recover:
    """Trains a pruned model on the unpruned model's logits.

    The step trains on the rows of the training data and on random pairs of these rows. Each epoch draws new pairs of
    rows.

    Attributes:
        epochs: Largest number of epochs.
        train: Digest of the training data, as in `Prune`.
        learning_rate: Peak learning rate.
        batch_size: Number of rows per training step.
        pairs: Factor for the number of random pairs of rows in each epoch. The number of pairs is `pairs` × the number
            of training rows × the share of linear parameters that pruning removed.
        masked: Share of the tokens that the mask token replaces in each pair of rows.
        seed: Random seed of the pairs of rows, the masks and the row order.
        exits: Weight of exits in the loss, which makes exits after early layers more accurate; None for no exits.
    """

    epochs: int
    train: str = ""
    learning_rate: float = 1e-4
    batch_size: int = 64
    pairs: float = 1.0
    masked: float = 0.2
    seed: int = 20
    exits: float | None = None


@strict
@dataclass(frozen=True)
class Export:
    """Exports a PyTorch model to ONNX with standard operators.

    Attributes:
        opset: Version of the ONNX operator set.
        exporter: An exporter of `toolchain.exporters`. None means the exporter of the existing artifact if that
            exporter is installed, and otherwise the default exporter. Manifests omit the exporter ``optimum``, so that
            the ids of artifacts from earlier releases stay valid.
    """

    opset: int = 18
    exporter: str | None = None


@strict
@dataclass(frozen=True)
class Optimize:
    """Rewrites an ONNX graph for speed on one execution `provider`, by `passes` in order.

    The graph has standard operators, except with `HALF_PASSES`, which convert a graph for WebGPU to fp16.
    """

    provider: str = "cpu"
    passes: tuple[str, ...] = CPU_PASSES

    @classmethod
    def for_provider(cls, provider: str) -> Optimize:
        """Returns the step with the default passes of the provider, a key of `OPTIMIZE_PASSES`."""
        return cls(provider, OPTIMIZE_PASSES[provider])

    @classmethod
    def to_half(cls, parent: VariantName) -> Optimize:
        """Returns the step that builds an fp16 graph: for WebGPU if the parent is a graph for WebGPU, else for CUDA."""
        return cls("webgpu", HALF_PASSES) if parent.parts.webgpu else cls.for_provider("cuda")


@strict
@dataclass(frozen=True)
class Quantize:
    """Quantises a model to fewer bits, by the `scheme` of a `backend`.

    Schemes of ``ort`` (ONNX Runtime):

    * ``dynamic``: multiplies unsigned 8-bit activations (U8) by signed 8-bit weights (S8). The scale of the activations
      is computed at run time. The weights have one scale per channel.
    * ``static``: multiplies as ``dynamic`` does, but the activation scales come from calibration on training data.
    * ``int4``: stores weights of 4 bits, for small files. The weights of each block share one scale.

    The backend ``torch`` has the schemes ``int8`` (the products of ``dynamic``), and ``bf16`` and ``fp16`` (half
    precision). The backend ``bnb`` (bitsandbytes) has the schemes ``int8`` (LLM.int8()), and ``nf4`` and ``fp4``
    (blocks of 4-bit weights). The backend ``torchao`` has the scheme ``int8`` (weights with one scale per channel, and
    signed 8-bit activations with one scale per token, computed at run time).

    Attributes:
        backend: ``ort``, ``torch``, ``bnb`` or ``torchao``. All attributes except `backend` and `scheme` apply to
            ``ort`` only.
        scheme: Quantisation scheme, one of the backend's schemes.
        reduce_range: True for weights of 7 bits, whose products never saturate.
        embeddings: Type of the embedding tables, ``int8`` or ``int4``; None for the default of the scheme.
        keep_fp32: Number of linear layers that stay fp32, namely the layers that are most sensitive to quantisation,
            measured on held-out rows.
        train: Digest of the training data, as in `Prune`; None if the step uses no training data.
        passes: The passes of `QUANTIZE_PASSES` to apply; None for all.
        trim_vocab: Corpus whose tokens stay in the vocabulary, either ``train`` or the `Texts.digest` of a file; None
            keeps all tokens.

    Raises:
        SettingsError: The backend does not have the scheme, or two settings exclude each other.
    """

    backend: str = "ort"
    scheme: str = "dynamic"
    reduce_range: bool | None = None
    embeddings: str | None = None
    keep_fp32: int | None = None
    train: str | None = None
    passes: tuple[str, ...] | None = None
    trim_vocab: str | None = None

    def __post_init__(self) -> None:
        schemes = [name for name in QUANTIZED[self.backend] if (self.backend, name) != ("ort", "fp16")]
        if self.scheme not in schemes:
            raise SettingsError(
                f"--backend {self.backend} has no scheme {self.scheme}.",
                f"The schemes of --backend {self.backend}: {', '.join(schemes)}.",
            )
        if self.reduce_range and (self.backend, self.scheme) != ("ort", "dynamic"):
            raise SettingsError(
                "Only --backend ort --scheme dynamic supports weights of 7 bits.", "Leave --isa portable out."
            )
        ort_settings = (self.embeddings, self.keep_fp32, self.passes, self.trim_vocab)
        if self.backend != "ort" and any(setting is not None for setting in ort_settings):
            raise SettingsError(
                f"--backend {self.backend} supports no quantisation option except --scheme.",
                "Leave out --embeddings, --keep-fp32, --max-drop, --sensitivity, --no-pass and --trim-vocab.",
            )
        if self.passes is not None:
            self._check_passes(self.passes)

    def _check_passes(self, passes: tuple[str, ...]) -> None:
        scheme_passes = QUANTIZE_PASSES[self.scheme]
        if not set(passes) <= set(scheme_passes):
            raise SettingsError(
                f"--scheme {self.scheme} does not have all of the passes {', '.join(passes)}.",
                f"The passes of --scheme {self.scheme}: {', '.join(scheme_passes)}.",
            )
        if "quantize-linear" not in passes and (
            not passes or self.scheme == "static" or self.reduce_range or self.keep_fp32
        ):
            raise SettingsError(
                "Without the pass quantize-linear, only embedding tables are quantised.",
                "Keep the pass quantize-embedding, and leave out --scheme static, --isa portable, --keep-fp32, "
                "--max-drop and --sensitivity.",
            )
        if "quantize-embedding" not in passes and self.embeddings:
            raise SettingsError(
                "Without the pass quantize-embedding, no embedding table is quantised.", "Leave --embeddings out."
            )

    @staticmethod
    def passes_without(scheme: str, omitted_passes: Collection[str]) -> tuple[str, ...] | None:
        """Returns the passes of an ONNX Runtime scheme without `omitted_passes`; None if `omitted_passes` is empty.

        If ``quantize-linear`` is omitted, the function also omits all passes before ``quantize-linear``, which only
        prepare the graph for it.

        Raises:
            SettingsError: `omitted_passes` names a pass that the scheme does not have.
        """
        if not omitted_passes:
            return None
        passes = QUANTIZE_PASSES.get(scheme, ())
        if not set(omitted_passes) <= set(passes):
            raise SettingsError(
                f"--no-pass names a pass that --scheme {scheme} does not have.",
                f"The passes of --scheme {scheme}: {', '.join(passes) or 'none'}.",
            )
        if "quantize-linear" in omitted_passes:
            passes = passes[passes.index("quantize-linear") :]
        return tuple(name for name in passes if name not in omitted_passes)


@strict
@dataclass(frozen=True)
class Compile:
    """Runs a PyTorch model with `torch.compile`; the weights are those of the parent."""


@strict
@dataclass(frozen=True)
class Exits:
    """Adds exits to the ONNX graph of a text classifier.

    An exit has a small network, its head. The head predicts the label from the hidden states after an early layer. If
    the probability of the predicted label reaches a threshold, the text skips the later layers. The heads learn the
    logits of the parent's graph on training rows. The step chooses the threshold on held-out rows.

    Attributes:
        layers: Numbers of encoder layers before the exits, ascending; 0 for an exit after the embeddings. None lets the
            step choose them.
        max_drop: Largest accuracy drop below the parent on the held-out rows, in percentage points.
        train: Digest of the training data, as in `Prune`.
        sentences: Largest number of training rows for the heads.
        pairs: Factor for the number of random pairs of training rows, each joined to one text, from which the heads
            also learn. The number of pairs is `pairs` × the number of training rows.
        seed: Random seed of the heads and of the pairs.

    Raises:
        SettingsError: The layers are not ascending, or there is none.
    """

    layers: tuple[int, ...] | None = None
    max_drop: float = 0.5
    train: str = ""
    sentences: int = 100_000
    pairs: float = 1.0
    seed: int = 20

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise SettingsError("--layers needs different numbers in ascending order.", "Give layers such as 1,3.")


Step = Import | Prune | Recover | Export | Optimize | Quantize | Exits | Compile

STEP_TYPES: dict[str, type[Step]] = {
    "import": Import,
    "prune": Prune,
    "recover": Recover,
    "export": Export,
    "optimize": Optimize,
    "quantize": Quantize,
    "exits": Exits,
    "compile": Compile,
}


def uses_training_data(step: Step) -> TypeGuard[Prune | Recover | Quantize | Exits]:
    """Returns whether the result of the step depends on training data."""
    if isinstance(step, Quantize):
        return bool(step.keep_fp32 or step.trim_vocab) or step.scheme == "static"
    return isinstance(step, Recover | Exits) or (isinstance(step, Prune) and step.method != "mask")


def step_name(step: Step) -> str:
    """Returns the name of the step in manifests and commands, such as ``export`` for an `Export`."""
    return next(name for name, kind in STEP_TYPES.items() if isinstance(step, kind))


_OMITTED = ("exporter", "optimum")  # optimum was the only exporter in earlier releases of the toolchain


def settings_of(step: Step) -> dict[str, Any]:
    """Returns the step's settings as JSON values, without those that are None, and without the exporter optimum."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(step).items()
        if value is not None and (key, value) != _OMITTED
    }


def decode_step(name: str, settings: Mapping[str, Any]) -> Step:
    """Returns the step that a manifest recorded.

    Args:
        name: Name of the step, as `step_name` returns it.
        settings: Settings of the step, as `settings_of` returns them.

    Raises:
        ArtifactError: This release does not know the step or one of its settings.
    """
    try:
        defaults = dict([_OMITTED]) if STEP_TYPES[name] is Export else {}
        return convert(STEP_TYPES[name], {**defaults, **settings})
    except (KeyError, ValueError, SettingsError) as error:
        raise ArtifactError(
            f"A manifest records the step {name!r} with settings {dict(settings)}, which this release does not know.",
            "Use the release that built the artifact, or delete its folder and build it again.",
        ) from error
