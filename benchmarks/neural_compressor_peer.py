"""Builds int8 models with Neural Compressor, dynamic or static; `peers.py` compares them with the toolchain's models.

    python neural_compressor_peer.py MODEL.onnx TOKENS.json OUT.onnx dynamic|static

The script needs an environment with the packages in `PACKAGES`. By default, Neural Compressor treats the model as a
transformer and fuses operators before it quantises them. Static quantisation calibrates on the sentences of
TOKENS.json. For static quantisation, the script uses SmoothQuant and keeps the outputs of matrix products in fp32, as
in Neural Compressor's DistilBERT example. Without SmoothQuant and fp32 outputs of matrix products, static quantisation
loses several points of accuracy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Neural Compressor 2.6 is the last 2.x release; 2.x supports ONNX Runtime completely. Neural Compressor 2.6 needs ONNX
# and ONNX Runtime releases of the same age as Neural Compressor 2.6. Neural Compressor needs the packages `six` and
# `transformers`, although its metadata do not declare them. The benchmark runs the quantised model with the
# toolchain's ONNX Runtime, which is newer than the one in `PACKAGES`.
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
    # The script sets alpha to its default, because Neural Compressor skips SmoothQuant if alpha is not set.
    "smooth_quant_args": {"alpha": 0.5},
}


class Sentences:
    """Calibration data in the form that Neural Compressor reads: one sentence at a time, with an unused label.

    SmoothQuant needs inputs of one shape, so all sentences are padded to one length.
    """

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
    """Quantises the ONNX file `model` and saves the int8 model as `out`."""
    from neural_compressor import PostTrainingQuantConfig, quantization

    rows = json.loads(Path(tokens).read_text())
    recipes = RECIPES if approach == "static" else {}
    config = PostTrainingQuantConfig(approach=approach, recipes=recipes, calibration_sampling_size=[len(rows)])
    quantized = quantization.fit(model, config, calib_dataloader=Sentences(rows))
    if quantized is None:
        sys.exit(f"Neural Compressor could not quantise {model} ({approach}).")
    quantized.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
