"""One model's folder, where the model comes from, and what lies there."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.artifacts import store, variants
from toolchain.artifacts.names import parse_name, shorter
from toolchain.artifacts.store import Artifact
from toolchain.artifacts.variants import Export, Optimize, Variant
from toolchain.data.files import Texts
from toolchain.data.inputs import TrainingSource
from toolchain.errors import ArtifactError, UnknownVariantError
from toolchain.models import checkpoints
from toolchain.system import hardware


@dataclass(frozen=True)
class Workspace:
    """One model's folder under `exported`, where the model comes from, the sentences it is trained on, and the `corpus`
    a vocabulary is trimmed to where it is not these."""

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
        """See `checkpoints.resolve`."""
        name, source = checkpoints.resolve(model, exported, slug)
        return cls(exported, name, source, train or TrainingSource(), corpus)

    def on(self, base: str) -> Workspace:
        """The same with `base` for the adapter that the model is; `CheckpointError` where there is none such."""
        found = checkpoints.locate(base)
        return dataclasses.replace(self, source=dataclasses.replace(self.source, base=found.ref))

    def path(self, variant: str) -> Path:
        """Where a variant lies."""
        return self.exported / self.model / variant

    @property
    def cache(self) -> Path:
        """What is measured once on this machine and holds for every model."""
        return self.exported / ".cache" / str(hardware.machine()["id"])

    def load(self, variant: str) -> Artifact | None:
        """The variant as it lies there, whatever its state."""
        return store.load(self.path(variant))

    def lineage(self, name: str, asked: Container[str] = ()) -> list[Variant]:
        """The variant's ancestors from the root on, itself last.

        The parent of a labelled variant is the one it was built from, else the one of its label, or of what that adds
        to, that is `asked` for, lies there or is the graph of one that does, else the one without. Raises
        `UnknownVariantError` for a label of which nothing is known.
        """
        variant = variants.get(name)
        label = parse_name(name).label
        if label:
            parent = self._recorded_parent(name)
            if not self._known(name, asked):
                raise UnknownVariantError(f"{name} was never built.", "--name gives what is built a label.")
            assert variant.parent is not None
            if parent is None:
                labelled = (f"{variant.parent}+{each}" for each in shorter(label) if each)
                parent = next((name for name in labelled if self._known(name, asked)), variant.parent)
            variant = dataclasses.replace(variant, parent=parent)
        return [*(self.lineage(variant.parent, asked) if variant.parent else []), variant]

    def _known(self, name: str, asked: Container[str]) -> bool:
        """Whether it is asked for, lies there, or is the graph, which needs no settings, of one that is known."""
        if not variants.is_variant(name):
            return False
        if name in asked or self._recorded_parent(name) is not None:
            return True
        variant, label = variants.get(name), parse_name(name).label
        graph = isinstance(variant.step, (Export, Optimize))
        return graph and label != "" and self._known(f"{variant.parent}+{label}", asked)

    def _recorded_parent(self, name: str) -> str | None:
        try:
            artifact = self.load(name)
        except ArtifactError:
            return None  # what is wrong with it is told by whoever loads it
        return artifact.manifest.parent if artifact else None
