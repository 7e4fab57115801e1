"""Neural Compressor: a dynamic and a static int8 model, which the toolchain's ONNX Runtime runs.

Neural Compressor quantises the graph that optimum-cli exports, because its ONNX release does not accept `onnx-std`.
By default, Neural Compressor treats the model as a transformer and fuses operators before it quantises them. For static
quantisation, the script uses SmoothQuant and keeps the outputs of matrix products in fp32, as in Neural Compressor's
DistilBERT example. Without SmoothQuant and fp32 outputs of matrix products, static quantisation loses several points of
accuracy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.sources import Sources, new_folder, run

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


def build(sources: Sources, out: Path) -> None:
    """Writes the dynamic and the static int8 model."""
    from neural_compressor import PostTrainingQuantConfig, quantization

    rows = sources.read_calibration()
    graph = str(sources.export_with_optimum(out / "exported"))
    for approach in ("dynamic", "static"):
        recipes = RECIPES if approach == "static" else {}
        config = PostTrainingQuantConfig(approach=approach, recipes=recipes, calibration_sampling_size=[len(rows)])
        quantized = quantization.fit(graph, config, calib_dataloader=Sentences(rows))
        if quantized is None:
            sys.exit(f"Neural Compressor could not quantise the graph ({approach}).")
        quantized.save(str(new_folder(out, f"neural-compressor-{approach}") / "model.onnx"))


if __name__ == "__main__":
    run(build)
