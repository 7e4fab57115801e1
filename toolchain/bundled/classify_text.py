"""Text → label and probabilities, with onnxruntime and its extensions: `python classify.py "a charming film"`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import onnxruntime_extensions


class Classifier:
    """The model of this folder; of several, the one of that variant. Its graph has the tokenizer in it."""

    def __init__(self, folder: str | Path = Path(__file__).parent, variant: str | None = None) -> None:
        bundle = json.loads((Path(folder) / "bundle.json").read_text(encoding="utf-8"))
        model = next(m for m in bundle["models"] if variant in (None, m["variant"]))
        self.labels: list[str] = bundle["labels"]
        self.multi_label: bool = bundle["multi_label"]
        options = ort.SessionOptions()
        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
        file = str(Path(folder) / model["file"])
        self._session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text the probability of every label, each for itself where a text can have several; as one batch, so
        keep batches small."""
        rows = self._session.run(["probabilities"], {"text": np.array(texts, dtype=object)})[0]
        return [dict(zip(self.labels, map(float, row), strict=True)) for row in rows]


if __name__ == "__main__":
    classify = Classifier()
    for line in sys.argv[1:] or map(str.rstrip, sys.stdin):
        shares = classify([line])[0]
        best = max(shares, key=lambda label: shares[label])
        told = [label for label in shares if shares[label] > 0.5] if classify.multi_label else [best]
        print(f"{'|'.join(told)}\t{','.join(f'{shares[label]:.4f}' for label in told)}\t{line}")
