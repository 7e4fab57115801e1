"""Validation of an artifact: opens the sessions, chooses the sentences, and compares the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from toolchain.artifacts.steps import Export
from toolchain.artifacts.store import Artifact
from toolchain.artifacts.variants import Variant
from toolchain.backends import Place, Session, open_session
from toolchain.backends.lora import LoraSession
from toolchain.build import trimming
from toolchain.build.reference_logits import ReferenceLogits
from toolchain.build.steps.validate import SEED, SENTENCES, validate
from toolchain.build.workspace import Workspace
from toolchain.data import encoding, inputs
from toolchain.errors import ArtifactError, GraphError
from toolchain.models.sources import ImportFiles
from toolchain.system import hardware


def validate_artifact(
    workspace: Workspace, variant: Variant, artifact: Artifact, origin: ImportFiles | None
) -> dict[str, Any]:
    """Compares the logits of an artifact with those of its nearest PyTorch ancestor.

    An import has no ancestor, so the function compares its logits with those of its checkpoint.

    Args:
        workspace: The workspace of the model.
        variant: The variant of the artifact.
        artifact: The artifact, before or after its publication.
        origin: Files of the checkpoint if the artifact is an import; None otherwise.

    Returns:
        The report of `steps.validate.validate`.

    Raises:
        ArtifactError: The PyTorch ancestor is missing.
        GraphError: ONNX Runtime cannot run the graph.
    """
    manifest, place = artifact.manifest, Place("cpu", hardware.cores())
    names = [spec.name for spec in manifest.inputs]
    encoder = encoding.Encoder.open(artifact.path, names, manifest.max_length)
    data, reference_encoder = inputs.load_embedded(), None
    if getattr(manifest.step, "trim_vocab", None):
        # A trimmed model is validated on its own domain, because sentences of other domains contain removed tokens.
        data = trimming.validation_data(workspace.train, artifact)
        reference_folder = _torch_ancestor(workspace, variant).path
        reference_encoder = encoding.Encoder.open(reference_folder, names, manifest.max_length)
    sentences = data.sample(SENTENCES, SEED)
    with _explain_graph_errors(variant, artifact):
        contender = open_session(artifact.path, variant.runtime, place)
    reference: Session | ReferenceLogits
    if origin and origin.base:
        reference = LoraSession(origin.folder, origin.base, place)
    elif origin:
        reference = open_session(origin.folder, "torch", place)
    else:
        reference = ReferenceLogits(_torch_ancestor(workspace, variant), "torch", place)
    try:
        with _explain_graph_errors(variant, artifact):
            return validate(contender, reference, encoder, sentences, variant.agreement, reference_encoder)
    finally:
        contender.close()
        reference.close()


@contextmanager
def _explain_graph_errors(variant: Variant, artifact: Artifact) -> Iterator[None]:
    """Adds the variant to the error for a graph that ONNX Runtime cannot run, with a hint that fits its step."""
    try:
        yield
    except GraphError as error:
        if isinstance(artifact.manifest.step, Export):
            hint = (
                "The exporter may not support this architecture. Use another one (--exporter), or build variants of "
                "PyTorch (toolchain quantize --backend torch)."
            )
        else:
            hint = f"Leave out a pass with --no-pass, or use {variant.parent}."
        cause = f"the{error.cause[3:]}" if error.cause.startswith("The ") else error.cause
        raise GraphError(f"{variant.name} cannot be validated: {cause}", hint) from error


def _torch_ancestor(workspace: Workspace, variant: Variant) -> Artifact:
    """Returns the nearest PyTorch ancestor of a variant, which is built before the variant."""
    ancestors = workspace.lineage(variant.parent) if variant.parent else []
    name = [ancestor.name for ancestor in ancestors if ancestor.runtime == "torch"][-1]
    artifact = workspace.load(name)
    if artifact is None:
        raise ArtifactError(f"{name} disappeared during a build that reads it.", "Run the command again.")
    return artifact
