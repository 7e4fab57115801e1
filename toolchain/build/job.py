"""The interface between pipeline and steps: the job of a step, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from toolchain.artifacts.manifest import Manifest, TensorSpec
from toolchain.artifacts.steps import Step, step_name
from toolchain.artifacts.store import Artifact
from toolchain.data.files import Texts
from toolchain.data.inputs import TrainingSource
from toolchain.errors import ArtifactError
from toolchain.progress import Progress

StepT = TypeVar("StepT", bound=Step, covariant=True)


@dataclass(frozen=True)
class Job(Generic[StepT]):
    """The input of a build step; `StepT` is the class of the step.

    Attributes:
        step: The step with its settings.
        parent: The parent's artifact; None if the step is an import, which has no parent.
        checkpoint: Folder of the checkpoint if the step is an import; None otherwise.
        folder: The scratch folder that the step fills.
        root: The artifact of the imported model; None if the step itself is the import.
        train: Training data.
        cache: Cache folder for results that this machine computes only once.
        resume: Folder for training state; the pipeline keeps it after a killed run and deletes it after publication.
        progress: Callback with the number of finished parts of the work, the number of all parts, and the current
            activity.
        corpus: Texts for vocabulary trimming, which keeps their tokens; None for the texts of the training data.
        base: Folder of the base model if the checkpoint is an adapter; None otherwise.
    """

    step: StepT
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
    def parent_artifact(self) -> Artifact:
        """Returns the artifact of the parent variant.

        Raises:
            ArtifactError: The step has no parent variant.
        """
        if self.parent is None:
            raise ArtifactError(f"The step {step_name(self.step)} needs a parent variant as its input, but has none.")
        return self.parent


@dataclass(frozen=True)
class StepResult:
    """The result of a step: the step with its effective settings, and the values that the step adds to the manifest."""

    step: Step
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    max_length: int
    facts: Mapping[str, Any]

    @classmethod
    def from_parent(cls, job: Job[Step], facts: Mapping[str, Any], **changes: Any) -> StepResult:
        """Returns a result with the parent's inputs, outputs, labels and maximum length.

        Args:
            job: The job of the step.
            facts: Facts about the result. The method adds those `inherited_facts` of the parent that `facts` lacks.
            changes: Replacements for the parent's inputs, outputs, labels or maximum length, by name.
        """
        manifest = job.parent_artifact.manifest
        parent_values = {name: getattr(manifest, name) for name in ("inputs", "outputs", "labels", "max_length")}
        return cls(step=job.step, facts={**inherited_facts(manifest), **facts}, **{**parent_values, **changes})


def inherited_facts(manifest: Manifest) -> dict[str, Any]:
    """Returns the facts of an artifact that also hold for the variants built from it."""
    return {
        name: manifest.facts[name]
        for name in ("parameters", "task", "multi_label", "license", "pruning", "recovery")
        if name in manifest.facts
    }
