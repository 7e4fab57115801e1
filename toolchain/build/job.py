"""What the pipeline gives a step, and what the step gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifacts.store import Artifact, Manifest, TensorSpec
from toolchain.artifacts.variants import Step, step_name
from toolchain.data.files import Texts
from toolchain.data.inputs import TrainingSource
from toolchain.errors import ArtifactError
from toolchain.progress import Progress


@dataclass(frozen=True)
class Job:
    """What a step is given: its settings, the `parent` (None for an import), the `checkpoint`'s folder for an import,
    and the scratch `folder` it fills.

    `root` is the artifact the model was imported to. Of training data there is `train`; `cache` is this machine's
    folder for what is measured once; `resume` a folder that outlives a killed run, and is deleted once the artifact is
    published. `progress` is told (done, total, what is being done). `corpus` are the texts a vocabulary is trimmed to,
    where they are not the training data; `base` is the folder of what an adapter, the checkpoint, is merged into.
    """

    step: Step
    parent: Artifact | None
    checkpoint: Path | None
    folder: Path
    root: Artifact | None
    train: TrainingSource
    cache: Path
    resume: Path
    progress: Progress
    corpus: Texts | None = None
    base: Path | None = None

    @property
    def given(self) -> Artifact:
        """The parent of a step that has one."""
        if self.parent is None:
            raise ArtifactError(f"{step_name(self.step)} needs a parent.")
        return self.parent


@dataclass(frozen=True)
class Built:
    """What a step gives back: the effective settings ("auto" resolved), and what the manifest says of the result."""

    step: Step
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    max_length: int
    facts: Mapping[str, Any]

    @classmethod
    def like(cls, job: Job, facts: Mapping[str, Any], **changed: Any) -> Built:
        """A result with the parent's inputs, outputs, labels and length, where they are not `changed`, and the facts
        of the parent that are about the model and not about its file."""
        manifest = job.given.manifest
        same = {name: getattr(manifest, name) for name in ("inputs", "outputs", "labels", "max_length")}
        return cls(step=job.step, facts={**inherited(manifest), **facts}, **{**same, **changed})


def inherited(manifest: Manifest) -> dict[str, Any]:
    """The facts that hold for everything made of an artifact."""
    return {
        name: manifest.facts[name]
        for name in ("parameters", "multi_label", "license", "pruning", "recovery")
        if name in manifest.facts
    }
