"""The least a sentence can take on this machine: what a model computes and reads, and how fast a runtime does either.

A floor is the larger of two times: all multiply-accumulates at the measured rate of large products, and all weights
read once at the measured rate of single rows.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.bench import process
from toolchain.errors import BenchError, CheckpointError
from toolchain.models import checkpoints
from toolchain.models.architectures import LAYOUTS, SHARING
from toolchain.system import files, hardware

SCHEMA = 1
SECONDS, MEBIBYTES = 0.15, 32  # of a measure, and of the weights it reads; see `calibration.measure`
TIMEOUT_S = 300.0
BF16 = {"avx512_bf16", "amx_bf16"}  # without either, PyTorch's bf16 has no kernel whose rate would be a ceiling
# What is looked up and not multiplied, by the name of its module.
_TABLE = re.compile(r"(.*_)?embed(ding|dings)?|embed_(tokens|positions)|wte|wpe|shared|relative_attention_bias")

Rates = dict[str, dict[str, float]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Work:
    """What one sentence asks of a model.

    `linear_parameters` are multiplied with every token, `head_parameters` with one; `attention_widths` are those of
    attention's own products, of each layer that has them, none where that is not known. Of the linear parameters,
    `behind` come after the last attention and `asking` make its query: the passes ``first-token`` and ``first-query``
    multiply them with one token only.
    """

    linear_parameters: int
    attention_widths: tuple[int, ...]
    head_parameters: int
    behind: int = 0
    asking: int = 0

    def macs(self, tokens: int, first_token: bool = False, first_query: bool = False) -> int:
        """Multiply-accumulates of one sentence of so many tokens; `first_token` and `first_query`: of a graph that the
        pass applied to."""
        linear = self.linear_parameters * tokens
        attention = 2 * tokens**2 * sum(self.attention_widths)
        if first_token:
            linear -= self.behind * (tokens - 1)
        if first_query and self.attention_widths:
            linear -= self.asking * (tokens - 1)
            attention -= 2 * tokens * (tokens - 1) * self.attention_widths[-1]
        return linear + attention + self.head_parameters


def work(folder: Path) -> Work | None:
    """The work of the unquantised PyTorch model in `folder`, by the header of its weights; no tensor is read.

    None where there are no weights, or layers share them: then they are multiplied more often than they are stored.
    Raises `CheckpointError` for a file that cannot be read.
    """
    weights = checkpoints.weights_of(folder)
    if not weights.is_file():
        return None
    kind = checkpoints.config_of(folder).get("model_type")
    if kind in SHARING:
        return None
    shapes = _shapes(weights)
    base = Counter[str]()
    for name, shape in shapes.items():
        base[name.partition(".")[0]] += math.prod(shape)
    encoder = max(base, key=lambda name: base[name], default="")  # the table of words alone outweighs any head
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not _TABLE.fullmatch(name.split(".")[-2])
    }
    head = {name for name in matrices if name.partition(".")[0] != encoder or "pooler" in name.split(".")}
    sizes = {name: math.prod(shape) for name, shape in matrices.items()}
    queries = _queries(str(kind), matrices)
    return Work(
        linear_parameters=sum(size for name, size in sizes.items() if name not in head),
        attention_widths=tuple(shape[0] for shape in queries),
        head_parameters=sum(sizes[name] for name in head),
        behind=_behind(str(kind), sizes),
        asking=math.prod(queries[-1]) if queries else 0,
    )


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", "Delete its folder and build it again.") from error


def _queries(kind: str, matrices: Mapping[str, Sequence[int]]) -> list[Sequence[int]]:
    """Shapes of the weights that make the queries, of each layer that has attention left; none for an unknown
    layout."""
    if kind not in LAYOUTS:
        return []
    query = re.compile(rf"{re.escape(LAYOUTS[kind].layers)}\.(\d+)\.{re.escape(LAYOUTS[kind].query)}")
    found = {int(match[1]): shape for name, shape in matrices.items() if (match := query.fullmatch(name))}
    return [found[number] for number in sorted(found)]


def _behind(kind: str, sizes: Mapping[str, int]) -> int:
    """Parameters of the linear layers after the last attention, whichever layer has that; 0 for an unknown layout."""
    if kind not in LAYOUTS:
        return 0
    layout = LAYOUTS[kind]
    numbers = {int(match[1]) for name in sizes if (match := re.match(rf"{re.escape(layout.layers)}\.(\d+)\.", name))}
    found = 0
    for number in sorted(numbers, reverse=True):
        layer = f"{layout.layers}.{number}."
        found += sum(sizes.get(layer + path, 0) for path in (layout.output, layout.up, layout.down))
        if layer + layout.query in sizes:
            break
    return found


def weight_bytes(facts: Mapping[str, object]) -> int | None:
    """The bytes of weights a sentence must read, by an artifact's facts: encoder and head, and no table, of which it
    looks up a few rows; None where the facts do not tell."""
    parts = facts.get("bytes_by_part")
    if not isinstance(parts, Mapping) or not {"encoder", "head"} <= set(parts):
        return None
    return int(parts["encoder"]) + int(parts["head"])


def floor_ms(macs: float, weight_bytes: float, rates: Mapping[str, float], precision: str) -> float | None:
    """Milliseconds under which no answer of so many multiply-accumulates and bytes of weights can be, by one runtime's
    `rates`; None where that has no measured rate for the precision.

    All multiply-accumulates are taken at the precision's rate, attention's fp32 products in an int8 model too, and both
    rates are of the best case: a real floor is higher.
    """
    if f"{precision}_gmacs" not in rates:
        return None
    return max(macs / rates[f"{precision}_gmacs"], weight_bytes / rates[f"{precision}_gb_s"]) / 1e6


def rates(cache: Path, threads: int, progress: Progress) -> Rates:
    """Runtime → ``<precision>_gmacs`` (10⁹ multiply-accumulates a second) and ``<precision>_gb_s`` (10⁹ bytes of
    weights a second), of this machine with so many threads, from `cache` or else measured and kept there.

    They are ceilings: of the fastest of several answers each. Kept figures that cannot be, or that are of other
    versions or cores, are measured anew. Raises `BenchError` where a runtime cannot be measured.
    """
    versions = hardware.versions()
    head = {
        "schema": SCHEMA,
        "threads": threads,
        "cores": hardware.cores(),  # kernels are chosen by it: one core less can be another rate of one thread
        "torch": versions.get("torch"),
        "onnxruntime": versions.get("onnxruntime") or versions.get("onnxruntime-gpu"),
    }
    half = ["bf16"] if BF16 & set(hardware.processor()["isa"]) else []
    precisions = {"torch": ["fp32", *half, "int8"], "onnx": ["fp32", "int8"]}
    file = cache / f"roofline-{threads}.json"
    if known := _read(file, head, precisions):
        return known
    found = {}
    for number, (runtime, wanted) in enumerate(precisions.items()):
        progress(number, len(precisions), f"calibration of {runtime}")
        found[runtime] = _measure(runtime, wanted, threads, SECONDS, MEBIBYTES)
    files.write_whole(file, json.dumps({**head, "rates": found}, indent=1) + "\n")
    return found


def _read(file: Path, head: Mapping[str, object], precisions: Mapping[str, Sequence[str]]) -> Rates | None:
    """The rates the file holds; None unless it is of the same `head` and they are all there and can be."""
    try:
        body = json.loads(file.read_text())
        found: Rates = body.pop("rates")
        for runtime, wanted in precisions.items():
            if set(found[runtime]) != {f"{precision}_{unit}" for precision in wanted for unit in ("gmacs", "gb_s")}:
                return None
        values = [value for of_runtime in found.values() for value in of_runtime.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    whole = body == head and set(found) == set(precisions)
    return found if whole and all(type(v) is float and 0 < v < math.inf for v in values) else None


def _measure(runtime: str, precisions: Sequence[str], threads: int, seconds: float, mebibytes: int) -> dict[str, float]:
    """One runtime's rates, from a fresh process under the thread budget of a cell's; see `calibration.measure`."""
    arguments = [runtime, ",".join(precisions), str(threads), str(seconds), str(mebibytes)]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "toolchain.bench.machine_probe", *arguments],
            env={**os.environ, **process.environment(threads)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"The calibration of {runtime} did not end within {TIMEOUT_S:.0f} s.") from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BenchError(
            f"The calibration of {runtime} failed and said: {said}.", "`toolchain doctor` says what is missing."
        )
    # Libraries may print before it does.
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
