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
from toolchain.models.locations import Source
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
    source: Source
    train: TrainingSource = field(default_factory=TrainingSource)
    corpus: Texts | None = None

    @classmethod
    def open(
        cls,
        model: str,
        exported: Path,
        folder_name: str | None = None,
        train: TrainingSource | None = None,
        corpus: Texts | None = None,
    ) -> Workspace:
        """Opens the workspace that `model` names; `checkpoints.resolve` explains the arguments and errors."""
        name, source = checkpoints.resolve(model, exported, folder_name)
        return cls(exported, name, source, train or TrainingSource(), corpus)

    def with_base(self, base: str) -> Workspace:
        """Returns the same workspace with `base` as the base model of the adapter.

        Args:
            base: Value of `--base`.

        Raises:
            CheckpointError: `base` names no folder or hub model.
        """
        base_source = checkpoints.locate(base)
        return dataclasses.replace(self, source=dataclasses.replace(self.source, base=base_source.ref))

    def path(self, variant: str) -> Path:
        """Returns the path of a variant's folder; the folder need not exist."""
        return self.exported / self.model / variant

    @property
    def cache(self) -> Path:
        """Returns the cache folder for results that this machine computes only once; all models share this folder."""
        return self.exported / ".cache" / str(hardware.machine()["id"])

    def load(self, variant: str) -> Artifact | None:
        """Returns the existing artifact of a variant, fresh or stale; see `store.load` for the errors."""
        return store.load(self.path(variant))

    def lineage(self, name: str, requested_names: Container[str] = ()) -> list[Variant]:
        """Returns the variant and its ancestors, the oldest ancestor first.

        The manifest of a labelled variant names the parent of the variant. If a variant has no manifest, its label
        allows several parents. For example, the parent of a variant with the label ``a-b`` may have the label ``a-b``,
        the label ``a`` or no label. From these possible parents, `lineage` chooses the available parent with the
        longest label. If no labelled parent is available, `lineage` chooses the parent without a label.
        A variant is available if it is built or if `requested_names` contains it. An exported or optimised graph counts
        as available even before it is built, if its parent is available and has the same label.

        Args:
            name: Name of the variant.
            requested_names: Names of the variants that the user's command builds.

        Raises:
            UnknownVariantError: No variant has this name, or the labelled variant is not available.
        """
        variant = variants.get(name)
        label = variant.name.parts.label
        if label:
            parent = self._recorded_parent(name)
            if not self._is_known(name, requested_names):
                raise UnknownVariantError(f"{name} is not built.", f"Build this variant with --name {label}.")
            assert variant.parent is not None
            if parent is None:
                candidates = (variant.parent.with_parts(label=prefix) for prefix in label_prefixes(label) if prefix)
                parent = next((name for name in candidates if self._is_known(name, requested_names)), variant.parent)
            variant = dataclasses.replace(variant, parent=parent)
        return [*(self.lineage(variant.parent, requested_names) if variant.parent else []), variant]

    def _is_known(self, name: str, requested_names: Container[str]) -> bool:
        """Returns whether a variant is available, as `lineage` defines it.

        An exported or optimised graph counts as available even before it is built, if its parent is available and has
        the same label. The toolchain can build such a graph from its parent without settings from the user.
        """
        if not variants.is_variant(name):
            return False
        if name in requested_names or self._recorded_parent(name) is not None:
            return True
        variant = variants.get(name)
        label = variant.name.parts.label
        if not label or variant.parent is None or not isinstance(variant.step, Export | Optimize):
            return False
        return self._is_known(variant.parent.with_parts(label=label), requested_names)

    def _recorded_parent(self, name: str) -> VariantName | None:
        try:
            artifact = self.load(name)
        except ArtifactError:
            # The error of an unreadable artifact is ignored here. Code that later uses the artifact loads the artifact
            # again, and raises the error then.
            return None
        return artifact.manifest.parent if artifact else None
