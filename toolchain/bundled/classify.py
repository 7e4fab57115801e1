"""Text → label and probabilities, with onnxruntime, tokenizers and numpy: `python classify.py "a charming film"`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


class Classifier:
    """The model of this folder; of several, the one of that variant."""

    def __init__(self, folder: str | Path = Path(__file__).parent, variant: str | None = None) -> None:
        bundle = json.loads((Path(folder) / "bundle.json").read_text(encoding="utf-8"))
        model = next(m for m in bundle["models"] if variant in (None, m["variant"]))
        self.labels: list[str] = bundle["labels"]
        self.multi_label: bool = bundle["multi_label"]
        self._inputs = [spec["name"] for spec in model["inputs"]]
        self._session = ort.InferenceSession(str(Path(folder) / model["file"]), providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._tokenizer.enable_truncation(bundle["max_length"])
        self._tokenizer.enable_padding(pad_id=bundle["pad_id"])

    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text the probability of every label, each for itself where a text can have several; as one batch, so
        keep batches small."""
        rows = self._tokenizer.encode_batch(list(texts))
        arrays = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        logits = self._session.run(None, {name: np.array(arrays[name], np.int64) for name in self._inputs})[0]
        if self.multi_label:
            shares = 1 / (1 + np.exp(-logits))
        else:
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares = odds / odds.sum(axis=1, keepdims=True)
        return [dict(zip(self.labels, map(float, row), strict=True)) for row in shares]


if __name__ == "__main__":
    classify = Classifier()
    for line in sys.argv[1:] or map(str.rstrip, sys.stdin):
        shares = classify([line])[0]
        best = max(shares, key=lambda label: shares[label])
        told = [label for label in shares if shares[label] > 0.5] if classify.multi_label else [best]
        print(f"{'|'.join(told)}\t{','.join(f'{shares[label]:.4f}' for label in told)}\t{line}")
