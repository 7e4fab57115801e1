"""Changes the confidence threshold of a variant with exits to another threshold that the build measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from toolchain import passes
from toolchain.artifacts.store import Artifact, copy_companions, list_files
from toolchain.errors import ShippingError
from toolchain.passes.exits import change_confidence


def with_exit_confidence(artifact: Artifact, confidence: float, folder: Path) -> Artifact:
    """Returns a copy of the artifact in `folder` with another confidence threshold.

    The copy has a new id, so a bundle states no benchmark figures for it.

    Raises:
        ShippingError: The artifact has no exits, or its build did not measure this threshold.
    """
    name, facts = artifact.manifest.variant, artifact.manifest.facts
    if "exits" not in facts:
        raise ShippingError(f"{name} has no exits.", "Leave --exit-confidence out, or ship a variant with exits.")
    curve = {point["confidence"]: point for point in facts["exits"]["curve"]}
    if confidence not in curve:
        raise ShippingError(
            f"The build of {name} did not measure the exit confidence {confidence:g}.",
            f"Use one of {', '.join(f'{each:g}' for each in curve)}.",
        )
    graph = passes.read(artifact.onnx_path)
    change_confidence(graph, lambda _: confidence)
    folder.mkdir()
    copy_companions(artifact, folder)
    passes.write(graph, folder / artifact.onnx_path.name)
    exits = {**facts["exits"], **curve[confidence]}
    return Artifact(folder, replace(artifact.manifest, files=list_files(folder), facts={**facts, "exits": exits}))
