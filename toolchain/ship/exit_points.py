"""Another point of the measured curve of a variant with exits: more speed or fewer wrong labels, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from toolchain import passes
from toolchain.artifacts.store import Artifact, copy_companions, list_files
from toolchain.errors import ShippingError
from toolchain.passes.exits import change_confidence


def at_confidence(artifact: Artifact, confidence: float, folder: Path) -> Artifact:
    """Returns a copy of the artifact in `folder`, in which texts exit from another confidence.

    The copy has another id, so no benchmark figures belong to it.

    Raises:
        ShippingError: The artifact has no exits, or their curve has no such confidence.
    """
    name, facts = artifact.manifest.variant, artifact.manifest.facts
    if "exits" not in facts:
        raise ShippingError(f"{name} has no exits.", "Leave --exit-confidence out, or ship a variant with exits.")
    curve = {point["confidence"]: point for point in facts["exits"]["curve"]}
    if confidence not in curve:
        raise ShippingError(
            f"The exits of {name} were not measured with the confidence {confidence:g}.",
            f"Use one of {', '.join(f'{each:g}' for each in curve)}.",
        )
    graph = passes.read(artifact.onnx_path)
    change_confidence(graph, lambda _: confidence)
    folder.mkdir()
    copy_companions(artifact, folder)
    passes.write(graph, folder / artifact.onnx_path.name)
    exits = {**facts["exits"], **curve[confidence]}
    return Artifact(folder, replace(artifact.manifest, files=list_files(folder), facts={**facts, "exits": exits}))
