"""The machine probe measures one runtime's highest rates of arithmetic and of reading weights, and prints them as JSON.

The probe runs in a separate process. The probe times square linear layers whose weights are larger than the L2 caches.
The probe runs the linear layers on large batches and on batches of one input row. The probe multiplies matrices with
the same operators as the linear layers of a real model.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

# Width of a layer; at this width, the fixed cost of a matrix product is small compared with its arithmetic.
WIDTH = 2048
# Two large batch sizes, at which arithmetic takes most of the time. The machine probe measures both, because some
# kernels are faster with the smaller size and others with the larger size.
LARGE_BATCHES = (128, 1024)
# Number of repetitions of all measurements, and minimum number of timed calls in each measurement. The probe measures
# each rate twice, so another process that is busy for a short time disturbs only one of the two measurements.
PASSES, MIN_ANSWERS = 2, 3
SETTLE_S = 0.05  # a runtime's threads spin for about 20 ms after a call and would slow the next measurement
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}

Answer = Callable[[], object]


def measure(runtime: str, precisions: Sequence[str], threads: int, seconds: float, mebibytes: int) -> dict[str, float]:
    """Measures a runtime's highest rates of arithmetic and of reading weights.

    Each rate comes from the fastest call, because the rate must be a ceiling: no model may exceed it.

    Args:
        runtime: The runtime, ``torch`` or ``onnx``.
        precisions: Precisions to measure: ``fp32``, ``int8`` and, with PyTorch only, ``bf16``.
        threads: Number of threads.
        seconds: Measuring time in seconds, for each repetition, precision and batch size.
        mebibytes: Approximate size of all layers' weights for each precision, in MiB.

    Returns:
        ``<precision>_gmacs`` is the rate of arithmetic in large batches, in 10⁹ multiply-accumulates per second.
        ``<precision>_gb_s`` is the rate of reading weights in batches of one row, in 10⁹ bytes per second.
    """
    build = {"torch": _build_torch, "onnx": _build_onnx}[runtime]
    layers = {p: max(1, (mebibytes << 20) // (WEIGHT_BYTES[p] * WIDTH**2)) for p in precisions}
    answers: dict[tuple[str, int], Answer] = {}
    for precision in precisions:
        answer_for = build(precision, layers[precision], threads)
        answers |= {(precision, rows): answer_for(rows) for rows in (1, *LARGE_BATCHES)}
    fastest_s = dict.fromkeys(answers, math.inf)
    for _ in range(PASSES):
        for key, answer in answers.items():
            time.sleep(SETTLE_S)
            fastest_s[key] = min(fastest_s[key], _time_fastest(answer, seconds))
    rates = {}
    for precision in precisions:
        weights = layers[precision] * WIDTH**2
        rates[f"{precision}_gmacs"] = max(rows * weights / fastest_s[precision, rows] for rows in LARGE_BATCHES) / 1e9
        rates[f"{precision}_gb_s"] = WEIGHT_BYTES[precision] * weights / fastest_s[precision, 1] / 1e9
    return rates


def _time_fastest(answer: Answer, seconds: float) -> float:
    """Calls `answer` repeatedly, after one untimed call, and returns the seconds of the fastest call."""
    answer()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < MIN_ANSWERS or time.perf_counter() < deadline:
        started = time.perf_counter()
        answer()
        times.append(time.perf_counter() - started)
    return min(times)


def _build_torch(precision: str, layers: int, threads: int) -> Callable[[int], Answer]:
    """Builds linear layers in PyTorch.

    Returns:
        A function that takes a batch size and returns a function that runs the linear layers on a batch of this size.
    """
    import torch

    from toolchain.backends import reduced

    torch.set_num_threads(threads)
    stack: Any = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    if precision != "fp32":
        stack, _ = reduced.reduce(stack, precision)

    def make_answer(rows: int) -> Answer:
        batch = torch.rand(rows, WIDTH, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

        def answer() -> object:
            with torch.inference_mode():
                return stack(batch)

        return answer

    return make_answer


def _build_onnx(precision: str, layers: int, threads: int) -> Callable[[int], Answer]:
    """Builds linear layers in ONNX Runtime.

    Returns:
        A function that takes a batch size and returns a function that runs the linear layers on a batch of this size.
    """
    import numpy as np

    from toolchain import passes
    from toolchain.backends import Place, open_session
    from toolchain.system.files import temporary_folder

    with temporary_folder() as scratch:
        passes.write(build_graph(precision, layers), scratch / "model.onnx")
        session = open_session(scratch, "onnx", Place("cpu", threads))

    def make_answer(rows: int) -> Answer:
        batch = {"rows": np.random.default_rng(0).random((rows, WIDTH), np.float32)}
        return lambda: session.run(batch)

    return make_answer


def build_graph(precision: str, layers: int) -> ir.Model:
    """Returns a graph of linear layers that outputs only the first row, as a classifier uses only the first token.

    Args:
        precision: Precision of the weights, ``fp32`` or ``int8``.
        layers: Number of layers.

    Returns:
        A model with the float input ``rows`` of shape [rows, WIDTH] and the output ``row`` of shape [WIDTH].
    """
    import numpy as np
    import onnx_ir as ir
    from onnx import TensorProto, helper, numpy_helper

    from toolchain import passes

    rng = np.random.default_rng(0)
    nodes, tensors, last_output = [], [numpy_helper.from_array(np.array(0, np.int64), "first")], "rows"
    for number in range(layers):
        weight = (rng.random((WIDTH, WIDTH), np.float32) - 0.5) * np.float32(2 / math.sqrt(WIDTH))
        tensors.append(numpy_helper.from_array(weight, f"weight_{number}"))
        nodes.append(helper.make_node("MatMul", [last_output, f"weight_{number}"], [f"layer_{number}"]))
        last_output = f"layer_{number}"
    nodes.append(helper.make_node("Gather", [last_output, "first"], ["row"], axis=0))
    graph_input = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["rows", WIDTH])
    graph_output = helper.make_tensor_value_info("row", TensorProto.FLOAT, [WIDTH])
    body = helper.make_graph(nodes, "layers", [graph_input], [graph_output], tensors)
    model = ir.from_proto(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    if precision == "int8":
        model, _ = passes.rewrite(model, ["quantize-linear"], passes.Context(1, WIDTH))
    return model


def main() -> None:
    """Prints the rates. The command line holds the arguments of `measure` in order, with comma-separated precisions."""
    runtime, precisions, threads, seconds, mebibytes = sys.argv[1:]
    print(json.dumps(measure(runtime, precisions.split(","), int(threads), float(seconds), int(mebibytes))))


if __name__ == "__main__":
    main()
