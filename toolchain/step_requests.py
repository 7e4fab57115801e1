"""The steps that a user's request needs; the commands and the Python interface share these requests.

Each request checks its settings when it is made, before any model is opened. Its method `steps` returns the steps by
the name of the variant that each step builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolchain.artifacts.steps import (
    EXITS_WEIGHT,
    QUANTIZED,
    Exits,
    Export,
    Import,
    Optimize,
    Prune,
    Quantize,
    Recover,
    Step,
)
from toolchain.artifacts.variants import derive_variant
from toolchain.artifacts.variants import get as get_variant
from toolchain.backends.ort import saturates
from toolchain.build.workspace import Workspace
from toolchain.errors import SettingsError
from toolchain.exporters import require_exporter
from toolchain.progress import Bar, Say
from toolchain.tuning.settings import fewest_fp32_layers, largest_ratio

NO_OPTIMIZATION = "none"


@dataclass(frozen=True)
class ExportRequest:
    """A request to export PyTorch variants to ONNX.

    Attributes:
        parents: Names of the variants to export.
        provider: Execution provider for which the graph is optimised, or `NO_OPTIMIZATION`.
        omitted_passes: Passes to leave out of the optimisation.
        opset: Version of the ONNX operator set.
        exporter: Name of the exporter; None chooses one, as `Export` describes.
        revision: Revision of a hub model.
        label: Label of the last variant; may be empty.

    Raises:
        SettingsError: The optimisation does not apply an omitted pass.
        ProviderError: The exporter is not installed, or does not support the opset.
    """

    parents: tuple[str, ...] = ("torch-fp32",)
    provider: str = "cpu"
    omitted_passes: tuple[str, ...] = ()
    opset: int = 18
    exporter: str | None = None
    revision: str | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if self.exporter:
            require_exporter(self.exporter, self.opset)
        passes = self._passes
        if not set(self.omitted_passes) <= set(passes):
            applied = f"only the passes {', '.join(passes)}" if passes else "no passes"
            raise SettingsError(
                f"--no-pass names a pass that --optimize {self.provider} does not have.",
                f"It applies {applied}.",
            )

    @property
    def _passes(self) -> tuple[str, ...]:
        return () if self.provider == NO_OPTIMIZATION else Optimize.for_provider(self.provider).passes

    def steps(self) -> dict[str, Step]:
        """Returns the steps, by the name of the variant that each step builds.

        Raises:
            UnknownVariantError: A parent cannot be exported.
        """
        step = None
        if self.provider != NO_OPTIMIZATION:
            step = Optimize(self.provider, tuple(name for name in self._passes if name not in self.omitted_passes))
        steps: dict[str, Step] = {"torch-fp32": Import(self.revision)}
        for parent in self.parents:
            export = Export(self.opset, self.exporter)
            exported_name = derive_variant(parent, export, "" if step else self.label).name
            steps[exported_name] = export
            if step:
                steps[derive_variant(exported_name, step, self.label).name] = step
        return steps


@dataclass(frozen=True)
class PruneRequest:
    """A request to prune a PyTorch variant, and to train the pruned model.

    Attributes:
        ratios: Shares of linear parameters to remove; each gives a variant.
        max_drop: Instead of `ratios`: largest accuracy drop on held-out rows, in percentage points.
        method: Importance measure; see `Prune`.
        cost: Cost that pruning reduces; see `Prune`.
        layers: Number of layers to keep; None for all.
        epochs: Largest number of epochs of the training; None for no training.
        for_exits: Whether the training also trains the early layers for exits.
        parent: Name of the variant to prune.
        label: Label of the pruned variant; may be empty.
        embedding_rank: Rank of the table of word embeddings; see `Prune`.

    Raises:
        SettingsError: Two settings exclude each other, or a ratio is invalid.
    """

    ratios: tuple[float, ...] = ()
    max_drop: float | None = None
    method: str = "fisher"
    cost: str = "parameters"
    layers: int | None = None
    epochs: int | None = None
    for_exits: bool = False
    parent: str = "torch-fp32"
    label: str = ""
    embedding_rank: int | None = None

    def __post_init__(self) -> None:
        if bool(self.ratios) == (self.max_drop is not None):
            raise SettingsError("Pruning needs either --ratio or --max-drop.", "Give one of them.")
        if self.method == "mask" and (self.epochs or self.max_drop is not None):
            raise SettingsError(
                "--method mask removes nothing: it cannot be used with --max-drop or --recover.", "Leave them out."
            )
        if self.max_drop is not None and self.epochs:
            raise SettingsError(
                "--max-drop builds pruned models without training: it cannot be used with --recover.",
                "Recover the pruned variant afterwards.",
            )
        if self.for_exits and not self.epochs:
            raise SettingsError("--exits trains the early layers, but --recover is missing.", "Give --recover too.")
        self._prunings()

    def _prunings(self) -> list[Prune]:
        # With `max_drop`, the ratio is still unknown. The other checks of `Prune` give the same result for every ratio.
        return [
            Prune(ratio, self.method, self.cost, self.layers, embedding_rank=self.embedding_rank)
            for ratio in self.ratios or (0.5,)
        ]

    def steps(self, workspace: Workspace, say: Say, bar: Bar) -> dict[str, Step]:
        """Returns the steps, by the name of the variant that each step builds; with `max_drop`, searches the ratio.

        Raises:
            UnknownVariantError: The parent cannot be pruned.
        """
        prunings = self._prunings()
        # `derive_variant` is called before the search, so that a wrong parent raises its error at once.
        children = [derive_variant(self.parent, pruning, self.label) for pruning in prunings]
        if self.max_drop is not None:
            ratio = largest_ratio(workspace, prunings[0], self.max_drop, say, bar)
            prunings = [replace(prunings[0], ratio=round(ratio, 2))]
            children = [derive_variant(self.parent, prunings[0], self.label)]
        steps: dict[str, Step] = {}
        for pruning, variant in zip(prunings, children, strict=True):
            steps[variant.name] = pruning
            if self.epochs:
                recovery = Recover(self.epochs, exits=EXITS_WEIGHT if self.for_exits else None)
                steps[derive_variant(variant.name, recovery).name] = recovery
        return steps


@dataclass(frozen=True)
class QuantizeRequest:
    """A request to quantise variants.

    Attributes:
        parents: Names of the variants to quantise; empty for the default of the backend and scheme.
        backend: Library that quantises, a key of `QUANTIZED`.
        scheme: Scheme of the backend; None for the backend's first scheme.
        isa: Processors on which int8 sums must not saturate: ``vnni`` or ``portable``; see `isa_of`.
        embeddings: Type of the embedding tables; None for the default of the scheme.
        keep_fp32: Number of linear layers that stay fp32; None for no choice.
        max_drop: Instead of `keep_fp32`: largest accuracy drop on held-out rows, in percentage points.
        omitted_passes: Passes to leave out.
        trim_vocab: Corpus whose tokens stay in the vocabulary, either ``train`` or the digest of the workspace's
            corpus; None keeps all tokens.
        label: Label of the variants; may be empty.

    Raises:
        SettingsError: Two settings exclude each other, or the backend does not have the scheme.
    """

    parents: tuple[str, ...] = ()
    backend: str = "ort"
    scheme: str | None = None
    isa: str = "vnni"
    embeddings: str | None = None
    keep_fp32: int | None = None
    max_drop: float | None = None
    omitted_passes: tuple[str, ...] = ()
    trim_vocab: str | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if self.keep_fp32 is not None and self.max_drop is not None:
            raise SettingsError("--keep-fp32 and --max-drop exclude each other.", "Give only one of them.")
        settings = (self.embeddings, self.omitted_passes, self.trim_vocab, self.keep_fp32)
        if not self.is_half:
            _ = self.step
        elif self.isa != "vnni" or any(settings) or self.max_drop is not None:
            raise SettingsError(
                "--scheme fp16 cannot be used with --isa portable, --embeddings, --keep-fp32, --max-drop, "
                "--sensitivity, --no-pass or --trim-vocab.",
                "Leave them out.",
            )

    @property
    def chosen_scheme(self) -> str:
        """Returns the scheme, or the backend's first scheme if the request names none."""
        return self.scheme or next(iter(QUANTIZED[self.backend]))

    @property
    def is_half(self) -> bool:
        """Returns whether `Optimize` builds the variants, which are fp16 graphs; otherwise `Quantize` builds them."""
        return (self.backend, self.chosen_scheme) == ("ort", "fp16")

    @property
    def chosen_parents(self) -> tuple[str, ...]:
        """Returns the names of the variants to quantise."""
        if self.is_half:
            return self.parents or ("onnx-std",)
        return self.parents or ("onnx-fp32" if self.backend == "ort" else "torch-fp32",)

    @property
    def step(self) -> Quantize:
        """Returns the step; with `max_drop`, the number of its fp32 layers is a placeholder."""
        return Quantize(
            self.backend,
            self.chosen_scheme,
            reduce_range=True if self.isa == "portable" else None,
            embeddings=self.embeddings,
            # With `max_drop`, the number of fp32 layers is still unknown, so 1 is a placeholder. The checks in
            # `Quantize` give the same result for every number of fp32 layers from 1.
            keep_fp32=1 if self.max_drop is not None else self.keep_fp32,
            passes=Quantize.passes_without(self.chosen_scheme, self.omitted_passes),
            trim_vocab=self.trim_vocab,
        )

    def steps(self, workspace: Workspace, say: Say, bar: Bar) -> dict[str, Step]:
        """Returns the steps, by the name of the variant that each step builds.

        With `max_drop`, the method searches the number of fp32 layers.

        Raises:
            UnknownVariantError: A parent cannot be quantised.
        """
        if self.is_half:
            halvings = {parent: Optimize.to_half(get_variant(parent).name) for parent in self.chosen_parents}
            return {derive_variant(parent, step, self.label).name: step for parent, step in halvings.items()}
        names = {parent: derive_variant(parent, self.step, self.label).name for parent in self.chosen_parents}
        steps: dict[str, Step] = {}
        for parent, name in names.items():
            steps[name] = self.step
            if self.max_drop is not None:
                layer_count = fewest_fp32_layers(workspace, parent, self.step, self.max_drop, say, bar)
                steps[name] = replace(self.step, keep_fp32=layer_count or None)
        return steps


def isa_of(isa: str, say: Say) -> str:
    """Returns the value of `--isa`; replaces ``auto`` by the value for this processor, and reports it."""
    if isa != "auto":
        return isa
    chosen = "portable" if saturates() else "vnni"
    say(f"--isa auto chooses {chosen} for this processor")
    return chosen


def exits_steps(parents: Sequence[str], step: Exits, label: str = "") -> dict[str, Step]:
    """Returns the steps that add exits to variants, by the name of the variant that each step builds.

    Args:
        parents: Names of the variants without exits; empty for onnx-int8.
        step: The step with its settings.
        label: Label of the variants; may be empty.

    Raises:
        UnknownVariantError: A parent cannot have exits.
    """
    return {derive_variant(parent, step, label).name: step for parent in parents or ("onnx-int8",)}
