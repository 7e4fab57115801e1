"""Finds entities with onnxruntime, tokenizers and numpy, for example: python classify.py "Ada lives in Paris".

The script prints one line for each entity: kind, probability, start, end and text of the entity. An empty line follows
each text. Without arguments, the script reads the texts from standard input, one text per line.
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


def find_words(text: str, row: Any) -> list[tuple[int, int, int]]:
    """Returns, for each word of the tokenizer, the position of its first token, and its start and end in the text.

    A word begins at a token with another word id than the token before, or after a space. Some tokenizers have a token
    for the space before a word; that token is then the first token of the word.
    """
    words: list[list[int]] = []
    last_word, last_end = None, 0
    for position, (start, end) in enumerate(row.offsets):
        if row.sequence_ids[position] != 0:
            continue  # a special token
        begin = end - len(text[start:end].lstrip())
        word = row.word_ids[position]
        if not words or word != last_word or text[last_end:begin].strip() != text[last_end:begin]:
            words.append([position, begin, end])
        elif words[-1][1] == words[-1][2]:  # so far, the word has only the token of the space before it
            words[-1][1:] = [begin, end]
        else:
            words[-1][2] = end
        last_word, last_end = word, end
    return [(position, begin, end) for position, begin, end in words if begin < end]


class Classifier:
    """A token classifier that runs one model of a bundle and finds entities.

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

    def __call__(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Returns the entities of each text, in order.

        An entity has its kind as ``label``, its ``text``, its ``start`` and ``end`` in characters, and its ``score``,
        which is the smallest probability of its words. Without a batch size in bundle.json, all texts run in one batch,
        so pass only a few texts per call.
        """
        rows = self._tokenizer.encode_batch(list(texts))
        entities: dict[int, list[dict[str, Any]]] = {}
        for batch in split([len(row.ids) for row in rows], self._batch_size):
            logits = self._run([rows[index] for index in batch])
            odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
            probabilities = odds / odds.sum(axis=-1, keepdims=True)
            for index, shares in zip(batch, probabilities, strict=True):
                entities[index] = self._find_entities(texts[index], rows[index], shares)
        return [entities[index] for index in range(len(rows))]

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

    def _find_entities(self, text: str, row: Any, probabilities: np.ndarray) -> list[dict[str, Any]]:
        """Returns the entities of a text; the label of a word is the label of its first token."""
        entities: list[dict[str, Any]] = []
        open_kind = None  # kind of the entity that the next word can continue
        for position, start, end in find_words(text, row):
            share = probabilities[position]
            prefix, _, kind = self.labels[int(share.argmax())].partition("-")
            if prefix not in ("B", "I") or not kind:
                open_kind = None
                continue
            score = round(float(share.max()), 6)
            if prefix == "I" and kind == open_kind:
                entity = entities[-1]
                entity.update(text=text[entity["start"] : end], end=end, score=min(entity["score"], score))
            else:
                entities.append({"label": kind, "text": text[start:end], "start": start, "end": end, "score": score})
            open_kind = kind
        return entities


if __name__ == "__main__":
    classify = Classifier()
    for line in sys.argv[1:] or map(str.rstrip, sys.stdin):
        for entity in classify([line])[0]:
            print("{label}\t{score:.4f}\t{start}\t{end}\t{text}".format(**entity))
        print()
