"""Classifies texts with onnxruntime, tokenizers and numpy, for example: python classify.py "a charming film".

The script prints one line for each text: label, probability and text. For a regression model, the line holds score and
text. Without arguments, the script reads the texts from standard input, one text per line.
"""

import os
import sys

if __name__ == "__main__":
    # Python searches the script's folder for libraries first. The script removes its folder from the search path, so
    # that no file of the bundle can replace a library.
    _script_folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _script_folder]

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

# x86 without VNNI adds two 8-bit products in 16 bits, and the sum can saturate. `EXACT_PRODUCTS` is a session option
# that makes sums of 8-bit products exact on x86 without VNNI. On processors whose 8-bit products do not saturate,
# `EXACT_PRODUCTS` only makes int8 models slower.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")
# `PRODUCT` is a serialised ONNX model with one MatMulInteger node. The node multiplies uint8 activations of shape
# [1, 4] by int8 weights of shape [4, 1]. The four weights of the node are all 127.
PRODUCT = base64.b64decode(
    "CAg63gEKTQoLYWN0aXZhdGlvbnMKB3dlaWdodHMKCnplcm9fcG9pbnQKEXdlaWdodF96ZXJvX3BvaW50Egdwcm9kdWN0Ig1NYXRNdWxJbnRl"
    "Z2VyEg9leHRyZW1lX3Byb2R1Y3QqFQgECAEQA0IHd2VpZ2h0c0oEf39/fyoREAJCCnplcm9fcG9pbnRKAQAqGBADQhF3ZWlnaHRfemVyb19w"
    "b2ludEoBAFodCgthY3RpdmF0aW9ucxIOCgwIAhIICgIIAQoCCARiGQoHcHJvZHVjdBIOCgwIBhIICgIIAQoCCAFCBAoAEA0="
)


CGROUP = Path("/sys/fs/cgroup")  # where Linux states the CPU quota of a container


def count_threads() -> int:
    """Returns the number of threads for the model; 0 lets ONNX Runtime choose.

    ONNX Runtime counts the cores of the machine, but a container may use only some of them. The environment variable
    TOOLCHAIN_THREADS sets the number of threads.
    """
    if "TOOLCHAIN_THREADS" in os.environ:
        return int(os.environ["TOOLCHAIN_THREADS"])
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        if quota > 0:
            return max(1, min(quota // period, os.cpu_count() or 1))
    return 0


def session_options() -> ort.SessionOptions:
    """Returns session options that make 8-bit products exact on this processor, with the number of threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = count_threads()
    session = ort.InferenceSession(PRODUCT, providers=["CPUExecutionProvider"])
    product = session.run(None, {"activations": np.full((1, 4), 255, np.uint8)})[0]
    if int(product[0, 0]) != 4 * 255 * 127:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    return options


class Classifier:
    """A text classifier that runs one model of a bundle.

    Args:
        folder: Folder of the bundle.
        variant: Name of the model's variant; None for the first model of the bundle.
        release_memory: Whether each call returns the memory of its batch to the system. Calls then take longer.
            Otherwise the process keeps as much memory as its largest batch needed.
    """

    def __init__(
        self, folder: str | Path = Path(__file__).parent, variant: str | None = None, release_memory: bool = False
    ) -> None:
        bundle = json.loads((Path(folder) / "bundle.json").read_text(encoding="utf-8"))
        model = next(m for m in bundle["models"] if variant in (None, m["variant"]))
        self.labels: list[str] = bundle["labels"]
        self.task: str = bundle["task"]
        self._inputs = [spec["name"] for spec in model["inputs"]]
        options = session_options()
        file = str(Path(folder) / model["file"])
        self._session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._run_options = ort.RunOptions()
        if release_memory:
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._tokenizer.enable_truncation(bundle["max_length"])
        self._tokenizer.enable_padding(pad_id=bundle["pad_id"])

    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Returns the probability of every label for each text; for a regression model, the score.

        All texts run in one batch, so pass only a few texts per call. If a text can have several labels, each
        probability is independent of the others.
        """
        rows = self._tokenizer.encode_batch(list(texts))
        arrays = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        inputs = {name: np.array(arrays[name], np.int64) for name in self._inputs}
        logits = self._session.run(None, inputs, self._run_options)[0]
        if self.task == "regression":
            values = logits
        elif self.task == "multi_label_classification":
            values = 1 / (1 + np.exp(-logits))
        else:
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            values = odds / odds.sum(axis=1, keepdims=True)
        return [dict(zip(self.labels, map(float, row), strict=True)) for row in values]


if __name__ == "__main__":
    classify = Classifier()
    for line in sys.argv[1:] or map(str.rstrip, sys.stdin):
        scores = classify([line])[0]
        if classify.task == "regression":
            print(f"{scores[classify.labels[0]]:.4f}\t{line}")
            continue
        best = max(scores, key=lambda label: scores[label])
        predicted = (
            [label for label in scores if scores[label] > 0.5]
            if classify.task == "multi_label_classification"
            else [best]
        )
        print(f"{'|'.join(predicted)}\t{','.join(f'{scores[label]:.4f}' for label in predicted)}\t{line}")
