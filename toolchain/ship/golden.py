"""Golden sentences: texts whose logits another machine can repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolchain import passes
from toolchain.artifacts.store import Artifact
from toolchain.backends import Place
from toolchain.backends.ort import OrtSession
from toolchain.data.encoding import Encoder, pad
from toolchain.passes.exits import change_confidence
from toolchain.system.files import temporary_folder

# Shift of the confidence's log-odds under which a golden sentence keeps its exit; the largest difference of logits that
# `TOLERANCES` allows.
MARGIN = 0.5


def steady_sentences(artifacts: Sequence[Artifact], sentences: Sequence[str]) -> list[str]:
    """Returns the sentences whose logits come from the same exit, also if another machine rounds the logits otherwise.

    A sentence near the confidence of an exit could leave there on one machine and go on on another one, which gives
    very different logits.
    """
    kept = list(sentences)
    for artifact in artifacts:
        if artifact.manifest.variant.parts.exits:
            lower, upper = (_logits(artifact, kept, shift) for shift in (-MARGIN, MARGIN))
            kept = [text for text, a, b in zip(kept, lower, upper, strict=True) if a == b]
    return kept


def _logits(artifact: Artifact, sentences: Sequence[str], shift: float) -> list[tuple[float, ...]]:
    """Returns the logits of each sentence alone, with shifted log-odds of the confidence from which a text exits."""
    graph = passes.read(artifact.onnx_path)
    change_confidence(graph, lambda confidence: 1 / (1 + (1 - confidence) / confidence * math.exp(-shift)))
    encoder = Encoder.open(
        artifact.path, [spec.name for spec in artifact.manifest.inputs], artifact.manifest.max_length
    )
    with temporary_folder() as folder:
        passes.write(graph, folder / artifact.onnx_path.name)
        session = OrtSession(folder, Place("cpu", 1))
        try:
            batches = [pad([row], encoder.names, encoder.pad_id) for row in encoder.encode(sentences)]
            return [tuple(session.run(batch)[0].tolist()) for batch in batches]
        finally:
            session.close()
