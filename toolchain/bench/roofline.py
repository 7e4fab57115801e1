"""Floors: lower bounds on the time of a sentence, from the model's size and the runtime's rates on this machine.

The floor, a lower bound on the time of a sentence, is the larger of the arithmetic time and the reading time. The
arithmetic time is the number of multiply-accumulates divided by the rate of arithmetic. The reading time is the size of
the encoder and the head in bytes, divided by the rate of reading weights. The machine probe measures the rate of
arithmetic with large batches and the rate of reading weights with batches of one row.
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
from toolchain.models.architectures import LAYER_SHARING, LAYOUTS
from toolchain.system import files, hardware
from toolchain.system.decoding import decode_object, read_bytes

SCHEMA = 1
SECONDS, MEBIBYTES = 0.15, 32  # arguments of `machine_probe.measure`
TIMEOUT_S = 300.0
# Without AVX-512 BF16 or AMX BF16, PyTorch has no fast bf16 kernel, so a measured rate would not be an upper limit.
BF16_FEATURES = {"avx512_bf16", "amx_bf16"}
# Names of embedding modules, whose weights a model looks up and does not multiply.
_EMBEDDING = re.compile(r"(.*_)?embed(ding|dings)?|embed_(tokens|positions)|wte|wpe|shared|relative_attention_bias")

Rates = dict[str, dict[str, float]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Work:
    """The parameter counts that determine the multiply-accumulates of a model for one sentence.

    Attributes:
        linear_parameters: Number of parameters that the model multiplies with every token.
        attention_widths: Total width of the attention heads in each layer with attention; empty if the model's layout
            is unknown.
        head_parameters: Number of parameters that the model multiplies with one token only.
        tail_parameters: Number of linear parameters after the last attention; the pass ``first-token`` makes the model
            multiply them with a single token.
        query_parameters: Number of linear parameters of the query layer in the last attention; the pass ``first-query``
            makes the model multiply them with a single token.
        parameters_before: For each layer with attention, the number of linear parameters before it: those of all
            layers before it, and those of the embeddings; empty if the model's layout is unknown.
    """

    linear_parameters: int
    attention_widths: tuple[int, ...]
    head_parameters: int
    tail_parameters: int = 0
    query_parameters: int = 0
    parameters_before: tuple[int, ...] = ()

    def macs(self, tokens: int, first_token: bool = False, first_query: bool = False) -> int:
        """Returns the number of multiply-accumulates for one sentence.

        Args:
            tokens: Number of tokens of the sentence.
            first_token: Whether the pass ``first-token`` changed the graph.
            first_query: Whether the pass ``first-query`` changed the graph.
        """
        linear = self.linear_parameters * tokens
        attention = 2 * tokens**2 * sum(self.attention_widths)
        if first_token:
            linear -= self.tail_parameters * (tokens - 1)
        if first_query and self.attention_widths:
            linear -= self.query_parameters * (tokens - 1)
            attention -= 2 * tokens * (tokens - 1) * self.attention_widths[-1]
        return linear + attention + self.head_parameters

    def macs_before_exit(self, layer: int, tokens: int) -> int | None:
        """Returns the number of multiply-accumulates that a sentence needs before an exit.

        The function does not count the network of the exit itself. It returns None if the model's layout is unknown.

        Args:
            layer: Number of layers with attention before the exit.
            tokens: Number of tokens of the sentence.
        """
        if layer >= len(self.parameters_before):
            return None
        return self.parameters_before[layer] * tokens + 2 * tokens**2 * sum(self.attention_widths[:layer])


def read_work(folder: Path) -> Work | None:
    """Returns the parameter counts of the unquantised PyTorch model in `folder`.

    The function reads only the header of the weights file.

    Returns:
        The parameter counts; None if the folder has no weights or if layers share weights. The file stores shared
        weights once, but every layer multiplies with them. If layers share weights, the stored shapes do not determine
        the number of multiply-accumulates.

    Raises:
        CheckpointError: The weights file cannot be read.
    """
    weights = checkpoints.weights_of(folder)
    if not weights.is_file():
        return None
    kind = checkpoints.config_of(folder).get("model_type")
    if kind in LAYER_SHARING:
        return None
    shapes = _shapes(weights)
    parameters_by_prefix = Counter[str]()
    for name, shape in shapes.items():
        parameters_by_prefix[name.partition(".")[0]] += math.prod(shape)
    # The name of each weight begins with a part of the model, such as `bert` or `classifier`. The part with the most
    # parameters contains the embeddings and the encoder, because word embeddings alone are larger than any
    # classification head.
    encoder = max(parameters_by_prefix, key=lambda name: parameters_by_prefix[name], default="")
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not _EMBEDDING.fullmatch(name.split(".")[-2])
    }
    head = {name for name in matrices if name.partition(".")[0] != encoder or "pooler" in name.split(".")}
    sizes = {name: math.prod(shape) for name, shape in matrices.items()}
    queries_by_layer = _query_shapes(str(kind), matrices)
    queries = list(queries_by_layer.values())
    sizes_by_layer = _sizes_by_layer(str(kind), sizes)
    linear_parameters = sum(size for name, size in sizes.items() if name not in head)
    embedding_parameters = linear_parameters - sizes_by_layer.total()
    return Work(
        linear_parameters=linear_parameters,
        attention_widths=tuple(shape[0] for shape in queries),
        head_parameters=sum(sizes[name] for name in head),
        tail_parameters=_count_tail_parameters(str(kind), sizes),
        query_parameters=math.prod(queries[-1]) if queries else 0,
        parameters_before=tuple(
            embedding_parameters + sum(size for other, size in sizes_by_layer.items() if other < number)
            for number in queries_by_layer
        ),
    )


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}.", "Delete the file's folder and build the variant again."
        ) from error


def _query_shapes(kind: str, matrices: Mapping[str, Sequence[int]]) -> dict[int, Sequence[int]]:
    """Returns the shape of the query weights, by number of the layer; empty if the model's layout is unknown."""
    if kind not in LAYOUTS:
        return {}
    query = re.compile(rf"{re.escape(LAYOUTS[kind].layers)}\.(\d+)\.{re.escape(LAYOUTS[kind].query)}")
    shapes = {int(match[1]): shape for name, shape in matrices.items() if (match := query.fullmatch(name))}
    return {number: shapes[number] for number in sorted(shapes)}


def _sizes_by_layer(kind: str, sizes: Mapping[str, int]) -> Counter[int]:
    """Returns the number of linear parameters, by number of the layer; empty if the model's layout is unknown."""
    counts = Counter[int]()
    if kind in LAYOUTS:
        for name, size in sizes.items():
            if match := re.match(rf"{re.escape(LAYOUTS[kind].layers)}\.(\d+)\.", name):
                counts[int(match[1])] += size
    return counts


def _count_tail_parameters(kind: str, sizes: Mapping[str, int]) -> int:
    """Returns the number of linear parameters after the last attention; 0 if the model's layout is unknown.

    The last attention may not be in the last layer, because pruning can remove the attention of a layer.
    """
    if kind not in LAYOUTS:
        return 0
    layout = LAYOUTS[kind]
    total = 0
    for number in sorted(_sizes_by_layer(kind, sizes), reverse=True):
        layer = f"{layout.layers}.{number}."
        total += sum(sizes.get(layer + path, 0) for path in (layout.output, layout.up, layout.down))
        if layer + layout.query in sizes:
            break
    return total


def weight_bytes(facts: Mapping[str, object]) -> int | None:
    """Returns the bytes of the encoder's and the head's weights, which a model reads for each sentence.

    Embedding tables do not count, because the model reads only a few of their rows for a sentence.

    Args:
        facts: Facts of the artifact.

    Returns:
        The number of bytes of weights; None if `facts` lacks the bytes of the encoder or of the head.
    """
    parts = facts.get("bytes_by_part")
    if not isinstance(parts, Mapping) or not {"encoder", "head"} <= set(parts):
        return None
    return int(parts["encoder"]) + int(parts["head"])


def floor_ms(macs: float, weight_bytes: float, rates: Mapping[str, float], precision: str) -> float | None:
    """Returns the floor, in milliseconds: the lower bound on the time of one answer.

    A real model takes longer than the lower bound, because the measured rates are best cases. The lower bound uses the
    rate of `precision` for all multiply-accumulates, although attention in an int8 model computes in fp32.

    Args:
        macs: Number of multiply-accumulates for one sentence.
        weight_bytes: Bytes of weights that the model reads for one sentence.
        rates: Rates of the runtime, as the function `rates` returns them.
        precision: Precision of the weights, such as ``int8``.

    Returns:
        The lower bound in milliseconds; None if the runtime has no measured rate for the precision.
    """
    if f"{precision}_gmacs" not in rates:
        return None
    return max(macs / rates[f"{precision}_gmacs"], weight_bytes / rates[f"{precision}_gb_s"]) / 1e6


def rates(cache: Path, threads: int, progress: Progress) -> Rates:
    """Returns each runtime's highest rates of arithmetic and of reading weights, from the cache or a new measurement.

    The function measures again if the cached rates are invalid, or if the package versions or the number of cores have
    changed. Each rate is a ceiling: it comes from the fastest of several calls.

    Args:
        cache: Folder of the cache.
        threads: Number of threads.
        progress: Callback with the number of measured runtimes, the number of all runtimes, and a text.

    Returns:
        Maps each runtime to its rates, as `machine_probe.measure` returns them.

    Raises:
        BenchError: The rates of a runtime cannot be measured.
    """
    versions = hardware.versions()
    head = {
        "schema": SCHEMA,
        "threads": threads,
        "cores": hardware.cores(),  # runtimes choose kernels by the number of cores, even with one thread
        "torch": versions.get("torch"),
        "onnxruntime": versions.get("onnxruntime") or versions.get("onnxruntime-gpu"),
    }
    bf16 = ["bf16"] if BF16_FEATURES & set(hardware.processor()["isa"]) else []
    precisions = {"torch": ["fp32", *bf16, "int8"], "onnx": ["fp32", "int8"]}
    file = cache / f"roofline-{threads}.json"
    if cached := _read_cached(file, head, precisions):
        return cached
    measured_rates = {}
    for number, (runtime, runtime_precisions) in enumerate(precisions.items()):
        progress(number, len(precisions), f"machine probe of {runtime}")
        measured_rates[runtime] = _run_probe(runtime, runtime_precisions, threads, SECONDS, MEBIBYTES)
    files.write_cache(file, json.dumps({**head, "rates": measured_rates}, indent=1) + "\n")
    return measured_rates


def _read_cached(file: Path, head: Mapping[str, object], precisions: Mapping[str, Sequence[str]]) -> Rates | None:
    """Returns the rates in `file`; None if the file's settings differ from `head`, or a rate is missing or invalid."""
    try:
        body = decode_object(read_bytes(file))
        cached: Rates = body.pop("rates")
        for runtime, runtime_precisions in precisions.items():
            if set(cached[runtime]) != {
                f"{precision}_{unit}" for precision in runtime_precisions for unit in ("gmacs", "gb_s")
            }:
                return None
        values = [value for runtime_rates in cached.values() for value in runtime_rates.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    is_complete = body == head and set(cached) == set(precisions)
    return cached if is_complete and all(type(v) is float and 0 < v < math.inf for v in values) else None


def _run_probe(
    runtime: str, precisions: Sequence[str], threads: int, seconds: float, mebibytes: int
) -> dict[str, float]:
    """Measures a runtime's rates in a new process with the environment variables of a cell's process."""
    arguments = [runtime, ",".join(precisions), str(threads), str(seconds), str(mebibytes)]
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "toolchain.bench.machine_probe", *arguments],
            env={**os.environ, **process.environment(threads)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"The machine probe of {runtime} did not end within {TIMEOUT_S:.0f} s.") from error
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["none"])[-1]
        raise BenchError(
            f"The machine probe of {runtime} failed. Last line of the output: {last_line}.",
            "`toolchain doctor` lists missing packages.",
        )
    # The rates are in the last line of the output, because libraries may print other lines first.
    rates: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return rates
