"""The workspace of one model: its folder of artifacts, its source and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.artifacts import store, variants
from toolchain.artifacts.names import VariantName, label_prefixes
from toolchain.artifacts.steps import Export, Optimize
from toolchain.artifacts.store import Artifact
from toolchain.artifacts.variants import Variant
from toolchain.data.files import Texts
from toolchain.data.inputs import TrainingSource
from toolchain.errors import ArtifactError, UnknownVariantError
from toolchain.models import checkpoints
from toolchain.system import hardware


@dataclass(frozen=True)
class Workspace:
    """The folder of one model under `exported`, with the model's source and data.

    Attributes:
        exported: The folder of all models.
        model: Name of the model's folder.
        source: Source of the checkpoint.
        train: Training data.
        corpus: Texts that vocabulary trimming uses; None for the training data.
    """

    exported: Path
    model: str
    source: checkpoints.Source
    train: TrainingSource = field(default_factory=TrainingSource)
    corpus: Texts | None = None

    @classmethod
    def open(
        cls,
        model: str,
        exported: Path,
        slug: str | None = None,
        train: TrainingSource | None = None,
        corpus: Texts | None = None,
    ) -> Workspace:
        """Opens the workspace that `model` names; `checkpoints.resolve` explains the arguments and errors."""
        name, source = checkpoints.resolve(model, exported, slug)
        return cls(exported, name, source, train or TrainingSource(), corpus)

    def on(self, base: str) -> Workspace:
        """Returns the same workspace with another base for the adapter.

        Args:
            base: Value of `--base`.

        Raises:
            CheckpointError: `base` names no source.
        """
        found = checkpoints.locate(base)
        return dataclasses.replace(self, source=dataclasses.replace(self.source, base=found.ref))

    def path(self, variant: str) -> Path:
        """Returns the folder of a variant, which may not exist."""
        return self.exported / self.model / variant

    @property
    def cache(self) -> Path:
        """Returns the folder of results that this machine computes once; all models share it."""
        return self.exported / ".cache" / str(hardware.machine()["id"])

    def load(self, variant: str) -> Artifact | None:
        """Returns the existing artifact of a variant, fresh or not; see `store.load` for the errors."""
        return store.load(self.path(variant))

    def lineage(self, name: str, asked: Container[str] = ()) -> list[Variant]:
        """Returns the variant's ancestors from the root on, and the variant itself last.

        The parent of a labelled variant is the parent in its manifest, if there is one. Otherwise the method tries the
        label and the labels that it extends, longest first. It takes the first known variant, else the unlabelled one.
        A variant is known if `asked` contains it or if it is built. An exported or optimised graph is also known if its
        parent with the same label is known.

        Args:
            name: Name of the variant.
            asked: Names of the variants that the command builds.

        Raises:
            UnknownVariantError: No variant has this name, or the labelled variant is not known.
        """
        variant = variants.get(name)
        label = variant.name.parts.label
        if label:
            parent = self._recorded_parent(name)
            if not self._known(name, asked):
                raise UnknownVariantError(f"{name} was never built.", "--name gives what is built a label.")
            assert variant.parent is not None
            if parent is None:
                labelled = (variant.parent.with_parts(label=each) for each in label_prefixes(label) if each)
                parent = next((name for name in labelled if self._known(name, asked)), variant.parent)
            variant = dataclasses.replace(variant, parent=parent)
        return [*(self.lineage(variant.parent, asked) if variant.parent else []), variant]

    def _known(self, name: str, asked: Container[str]) -> bool:
        """Returns whether a variant is known; see `lineage`. A graph counts because it needs no settings."""
        if not variants.is_variant(name):
            return False
        if name in asked or self._recorded_parent(name) is not None:
            return True
        variant = variants.get(name)
        label = variant.name.parts.label
        if not label or variant.parent is None or not isinstance(variant.step, Export | Optimize):
            return False
        return self._known(variant.parent.with_parts(label=label), asked)

    def _recorded_parent(self, name: str) -> VariantName | None:
        try:
            artifact = self.load(name)
        except ArtifactError:
            return None  # the code that uses the artifact reports the error
        return artifact.manifest.parent if artifact else None
