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
# ONNX Runtime reports its use to Microsoft by default. It reads this variable once, when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def cpu_quota() -> int:
    """Returns the number of whole CPUs in the quota of this container, at least 1; 0 without a quota."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        if quota > 0:
            return max(1, min(quota // period, os.cpu_count() or 1))
    return 0


def bound_threads(count: int) -> int:
    """Returns `count`, but at most the number of CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, cpu_quota() or cpus)


def count_threads(best: int = 0) -> int:
    """Returns the number of threads for the model; 0 lets ONNX Runtime choose.

    ONNX Runtime counts the cores of the machine, but a container may use only some of them. The environment variable
    TOOLCHAIN_THREADS sets the number of threads.

    Args:
        best: The best number on the machine that measured the settings in bundle.json; 0 without such settings.
    """
    if "TOOLCHAIN_THREADS" in os.environ:
        return int(os.environ["TOOLCHAIN_THREADS"])
    return bound_threads(best) if best else cpu_quota()


def session_options(settings: Mapping[str, Any] | None = None) -> ort.SessionOptions:
    """Returns session options that make 8-bit products exact on this processor, with the number of threads.

    Args:
        settings: The entry ``app_settings`` of a model in bundle.json; None without one.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = count_threads(settings["threads"] if settings else 0)
    if settings:
        session = settings["session"]
        options.inter_op_num_threads = bound_threads(session["inter_op_threads"])
        options.execution_mode = getattr(ort.ExecutionMode, f"ORT_{session['execution_mode'].upper()}")
        level = f"ORT_ENABLE_{session['graph_optimization'].upper()}"
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.enable_cpu_mem_arena = session["memory_arena"]
        options.enable_mem_pattern = session["memory_pattern"]
        for pool in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{pool}.allow_spinning", str(int(session["spinning"])))
    probe = ort.InferenceSession(PRODUCT, providers=["CPUExecutionProvider"])
    product = probe.run(None, {"activations": np.full((1, 4), 255, np.uint8)})[0]
    if int(product[0, 0]) != 4 * 255 * 127:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    return options


def split(lengths: Sequence[int], batch_size: int | None) -> list[list[int]]:
    """Returns batches as lists of indices, shortest texts first; a single batch of all texts without a batch size.

    A batch of several texts has at most 64 tokens for each of its `batch_size` texts, padding included.

    Args:
        lengths: Number of tokens of each text.
        batch_size: Largest number of texts in a batch, from bundle.json; None without such settings.
    """
    if batch_size is None:
        return [list(range(len(lengths)))] if lengths else []
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        size = len(batches[-1]) + 1 if batches else batch_size + 1
        if size <= batch_size and size * lengths[index] <= 64 * batch_size:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


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
        settings = model.get("app_settings")
        options = session_options(settings)
        self._batch_size: int | None = settings["batch_size"] if settings else None
        # Only a memory arena can release memory, so the argument wins over the settings of bundle.json.
        options.enable_cpu_mem_arena |= release_memory
        file = str(Path(folder) / model["file"])
        self._session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._run_options = ort.RunOptions()
        if release_memory:
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._max_length, self._pad_id = bundle["max_length"], bundle["pad_id"]
        self._fixed_lengths = bool(settings) and settings["padding"] == "fixed"
        self._tokenizer.enable_truncation(self._max_length)
        self._tokenizer.no_padding()  # `_run` pads each batch

    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Returns the probability of every label for each text; for a regression model, the score.

        Without a batch size in bundle.json, all texts run in one batch, so pass only a few texts per call. If a text
        can have several labels, each probability is independent of the others.
        """
        rows = self._tokenizer.encode_batch_fast(list(texts))
        scores: dict[int, dict[str, float]] = {}
        for batch in split([len(row.ids) for row in rows], self._batch_size):
            values = self._scores(self._run([rows[index] for index in batch]))
            scores.update(
                (i, dict(zip(self.labels, map(float, row), strict=True))) for i, row in zip(batch, values, strict=True)
            )
        return [scores[index] for index in range(len(rows))]

    def _run(self, rows: Sequence[Any]) -> np.ndarray:
        """Returns the logits of one batch; pads its rows to the longest one, or to a fixed length."""
        width = max(len(row.ids) for row in rows)
        if self._fixed_lengths:  # the next power of two
            width = max(width, min(self._max_length, max(16, 1 << (width - 1).bit_length())))
        for row in rows:
            row.pad(width, pad_id=self._pad_id)
        arrays = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        inputs = {name: np.array(arrays[name], np.int64) for name in self._inputs}
        logits: np.ndarray = self._session.run(None, inputs, self._run_options)[0]
        return logits

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        """Returns the probability of every label for each row of logits; for a regression model, the score."""
        values: np.ndarray = logits
        if self.task == "multi_label_classification":
            values = 1 / (1 + np.exp(-logits))
        elif self.task != "regression":
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            values = odds / odds.sum(axis=1, keepdims=True)
        return values


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
