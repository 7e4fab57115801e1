"""Golden sentences: texts whose logits another machine can repeat, and the content of golden.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain import passes
from toolchain.artifacts.store import Artifact
from toolchain.backends import Place
from toolchain.backends.ort import OrtSession, saturates
from toolchain.data.encoding import Encoder, pad
from toolchain.errors import ShippingError
from toolchain.exits.use import find_exits
from toolchain.passes.exits import change_confidence
from toolchain.ship.process import GOLDEN_ROWS

if TYPE_CHECKING:
    import numpy as np

# A golden sentence must keep its exit if the log-odds of the confidence threshold change by this amount. The value is
# the largest difference of int8 logits that `TOLERANCES` allows.
MARGIN = 0.5


def select_stable_sentences(artifacts: Sequence[Artifact], sentences: Sequence[str]) -> list[str]:
    """Returns the sentences that use the same exit on every machine.

    Machines round differently. If the confidence of a sentence is near the threshold, one machine could use an exit and
    another machine the next layers. The logits of the two machines would then be very different.

    Raises:
        ShippingError: No sentence is left.
    """
    kept = list(sentences)
    for artifact in artifacts:
        if artifact.manifest.variant.parts.exits:
            lower, upper = (_exits(artifact, kept, shift) for shift in (-MARGIN, MARGIN))
            kept = [text for text, a, b in zip(kept, lower, upper, strict=True) if a == b]
    if not kept:
        raise ShippingError(
            "The confidence of every golden sentence is near the threshold of an exit.",
            "Use another --exit-confidence, or ship a variant without exits.",
        )
    return kept


def _exits(artifact: Artifact, sentences: Sequence[str], shift: float) -> list[int]:
    """Returns the exit of each sentence at batch 1, with shifted log-odds of the confidence threshold."""
    graph = passes.read(artifact.onnx_path)
    change_confidence(graph, lambda confidence: 1 / (1 + (1 - confidence) / confidence * math.exp(-shift)))
    encoder = Encoder.open(
        artifact.path, [spec.name for spec in artifact.manifest.inputs], artifact.manifest.max_length
    )
    return find_exits(graph, encoder.encode(sentences), encoder, threads=1)


def golden_content(artifacts: Sequence[Artifact], sentences: Sequence[str], encoder: Encoder) -> dict[str, Any]:
    """Returns golden.json: golden sentences with token ids, padded batches, and the exact logits of each variant.

    Raises:
        ShippingError: This runtime saturates the int8 products of a variant even with the option `EXACT_PRODUCTS`.
    """
    rows = encoder.encode(sentences)
    batch_rows = [index for index, row in enumerate(rows) if len(row) < encoder.max_length][:GOLDEN_ROWS]
    batches = [{"padding": side, "sentences": batch_rows} for side in encoder.padding_sides]
    single_batches = [pad([row], encoder.names, encoder.pad_id) for row in rows]
    padded_batches = [
        pad([rows[i] for i in batch_rows], encoder.names, encoder.pad_id, side == "left")
        for side in encoder.padding_sides
    ]
    logits, batch_logits = {}, {}
    for artifact in artifacts:
        name = artifact.manifest.variant
        if artifact.manifest.facts.get("int8_headroom", 1) < 1 and saturates(exact=True):
            raise ShippingError(
                f"This runtime saturates 8-bit products, so the recorded logits of {name} would be wrong.",
                "Install the newest onnxruntime, or ship a -portable variant.",
            )
        session = OrtSession(artifact.path, Place("cpu", 1))
        logits[name] = [_round_logits(session.run(batch), batch)[0] for batch in single_batches]
        batch_logits[name] = [_round_logits(session.run(batch), batch) for batch in padded_batches]
        session.close()
    entries = [{"text": text, "input_ids": row} for text, row in zip(sentences, rows, strict=True)]
    return {"sentences": entries, "logits": logits, "batches": batches, "batch_logits": batch_logits}


def _round_logits(logits: np.ndarray, batch: Mapping[str, np.ndarray]) -> list[list[float]]:
    """Returns the logits of each row; in token classification, the logits of all its tokens, without padding."""
    masks = batch["attention_mask"].astype(bool)
    rows = [row[mask].ravel() if row.ndim == 2 else row for row, mask in zip(logits, masks, strict=True)]
    return [[round(float(x), 6) for x in row] for row in rows]
