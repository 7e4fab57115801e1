"""Neural Compressor as a peer: its int8 for ONNX Runtime, dynamic and static.

    python neural_compressor_peer.py MODEL.onnx TOKENS.json OUT.onnx dynamic|static

makes the int8 model, in an environment that has `PACKAGES`: post-training quantisation by its own defaults, which take
the model for a transformer and fuse it first. Static is calibrated on the given sentences, with SmoothQuant, and leaves
the products' results in fp32, as its DistilBERT example does: by its bare defaults accuracy drops by several points.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The last of the 2.x line, which has the whole of its ONNX Runtime side; its file is opened by ours. It needs six and
# transformers without asking for them, and an ONNX and ONNX Runtime of its time.
PACKAGES = (
    "neural-compressor==2.6",
    "onnx==1.16.2",
    "onnxruntime==1.18.1",
    "numpy==1.26.4",
    "transformers==4.44.2",
    "six==1.17.0",
    "setuptools==80.9.0",
)
RECIPES = {
    "optypes_to_exclude_output_quant": ["MatMul", "Gemm", "Attention", "FusedGemm"],
    "smooth_quant": True,
    "smooth_quant_args": {"alpha": 0.5},  # its default, without which nothing is smoothed
}


class Sentences:
    """Calibration data as it reads them: one sentence at a time with a label, which is not asked for. All are padded
    to one length, since its SmoothQuant takes no others."""

    batch_size = 1

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int]]:
        import numpy as np

        longest = max(map(len, self._rows))
        for ids in self._rows:
            padded = np.zeros((2, 1, longest), np.int64)
            padded[0, 0, : len(ids)] = ids
            padded[1, 0, : len(ids)] = 1
            yield {"input_ids": padded[0], "attention_mask": padded[1]}, 0


def main(model: str, tokens: str, out: str, approach: str) -> None:
    """Calibrates, quantises, saves."""
    from neural_compressor import PostTrainingQuantConfig, quantization

    rows = json.loads(Path(tokens).read_text())
    recipes = RECIPES if approach == "static" else {}
    config = PostTrainingQuantConfig(approach=approach, recipes=recipes, calibration_sampling_size=[len(rows)])
    quantized = quantization.fit(model, config, calib_dataloader=Sentences(rows))
    if quantized is None:
        sys.exit(f"Neural Compressor made no {approach} model of {model}.")
    quantized.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
