"""What one runtime can do on this machine at most, measured in a process of its own: a line of JSON on its output.

A stack of square linear layers, together larger than the L2 caches, answers tall batches and single rows through the
operators and the call that answer sentences.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

WIDTH = 2048  # of a layer: its operator's own costs vanish beside its weights
TALL = (128, 1024)  # rows at which arithmetic is what takes the time; which is faster differs by kernel
PASSES, LEAST = 2, 3  # over all measures, and answers in each: a neighbour's burst is not there both times
APART_S = 0.05  # a runtime's threads spin for some 20 ms after an answer, and would take the next stack's cores
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}

Answer = Callable[[], object]


def measure(runtime: str, precisions: Sequence[str], threads: int, seconds: float, mebibytes: int) -> dict[str, float]:
    """``<precision>_gmacs``: 10⁹ multiply-accumulates a second of tall products; ``<precision>_gb_s``: 10⁹ bytes of
    weights a second at one row.

    Each is of the fastest answer, not of the median one: it is a ceiling. A measure takes about `seconds` a pass and
    height, on stacks of about so many `mebibytes` of weights.
    """
    build = {"torch": _torch, "onnx": _onnx}[runtime]
    layers = {p: max(1, (mebibytes << 20) // (WEIGHT_BYTES[p] * WIDTH**2)) for p in precisions}
    answers: dict[tuple[str, int], Answer] = {}
    for precision in precisions:
        at = build(precision, layers[precision], threads)
        answers |= {(precision, rows): at(rows) for rows in (1, *TALL)}
    spent = dict.fromkeys(answers, math.inf)
    for _ in range(PASSES):
        for key, answer in answers.items():
            time.sleep(APART_S)
            spent[key] = min(spent[key], _fastest(answer, seconds))
    found = {}
    for precision in precisions:
        weights = layers[precision] * WIDTH**2
        found[f"{precision}_gmacs"] = max(rows * weights / spent[precision, rows] for rows in TALL) / 1e9
        found[f"{precision}_gb_s"] = WEIGHT_BYTES[precision] * weights / spent[precision, 1] / 1e9
    return found


def _fastest(answer: Answer, seconds: float) -> float:
    """Seconds of the fastest answer, after one that is not counted."""
    answer()
    spent: list[float] = []
    until = time.perf_counter() + seconds
    while len(spent) < LEAST or time.perf_counter() < until:
        started = time.perf_counter()
        answer()
        spent.append(time.perf_counter() - started)
    return min(spent)


def _torch(precision: str, layers: int, threads: int) -> Callable[[int], Answer]:
    """Rows → the call of PyTorch that answers so many."""
    import torch

    from toolchain.backends import reduced

    torch.set_num_threads(threads)
    stack: Any = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    if precision != "fp32":
        stack, _ = reduced.reduce(stack, precision)

    def at(rows: int) -> Answer:
        batch = torch.rand(rows, WIDTH, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

        def answer() -> object:
            with torch.inference_mode():
                return stack(batch)

        return answer

    return at


def _onnx(precision: str, layers: int, threads: int) -> Callable[[int], Answer]:
    """Rows → the call of ONNX Runtime that answers so many."""
    import numpy as np

    from toolchain import passes
    from toolchain.backends import Place, open_session

    with tempfile.TemporaryDirectory() as scratch:
        passes.write(graph(precision, layers), Path(scratch) / "model.onnx")
        session = open_session(Path(scratch), "onnx", Place("cpu", threads))

    def at(rows: int) -> Answer:
        batch = {"rows": np.random.default_rng(0).random((rows, WIDTH), np.float32)}
        return lambda: session.run(batch)

    return at


def graph(precision: str, layers: int) -> ir.Model:
    """``rows`` [rows, WIDTH] through all the layers, of which the first row is read, as a head does."""
    import numpy as np
    import onnx_ir as ir
    from onnx import TensorProto, helper, numpy_helper

    from toolchain import passes

    rng = np.random.default_rng(0)
    nodes, tensors, last = [], [numpy_helper.from_array(np.array(0, np.int64), "first")], "rows"
    for number in range(layers):
        weight = (rng.random((WIDTH, WIDTH), np.float32) - 0.5) * np.float32(2 / math.sqrt(WIDTH))
        tensors.append(numpy_helper.from_array(weight, f"weight_{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"weight_{number}"], [f"layer_{number}"]))
        last = f"layer_{number}"
    nodes.append(helper.make_node("Gather", [last, "first"], ["row"], axis=0))
    taken = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["rows", WIDTH])
    given = helper.make_tensor_value_info("row", TensorProto.FLOAT, [WIDTH])
    body = helper.make_graph(nodes, "layers", [taken], [given], tensors)
    model = ir.from_proto(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    if precision == "int8":
        model, _ = passes.rewrite(model, ["quantize-linear"], passes.Context(1, WIDTH))
    return model


def main() -> None:
    """Takes the arguments of `measure`, the precisions joined by commas."""
    runtime, precisions, threads, seconds, mebibytes = sys.argv[1:]
    print(json.dumps(measure(runtime, precisions.split(","), int(threads), float(seconds), int(mebibytes))))


if __name__ == "__main__":
    main()
