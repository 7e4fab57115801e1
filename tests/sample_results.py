"""Result files and result rows with invented figures, for tests of the code that reads result files."""

from toolchain.results.measurements import Measurement, Samples
from toolchain.results.result_file import ResultFile
from toolchain.results.scores import Accuracy

# The fact ``exits`` of a row with two exits, whose curve has one point.
EXIT_POINT = {"confidence": 0.9, "drop": 0.1, "shares": [0.5, 0.25], "work": 0.5}
EXITS = {**EXIT_POINT, "layers": [0, 2], "held_out_rows": 40, "curve": [EXIT_POINT]}


def samples_of(times):
    return Samples.from_rounds(times, [[1] * len(row) for row in times])


def row(**changes):
    latency, batches = samples_of([[900, 1000], [1100]]), Samples.from_rounds([[5000]], [[32]])
    values = {
        "model": "m",
        "variant": "onnx-int8",
        "provider": "cpu",
        "artifact_id": "ab",
        "status": "ok",
        "score": Accuracy(9, 10, 1),
        "latency_ms": latency.milliseconds(),
        "throughput_per_s": batches.per_second(),
        "memory_bytes": {"peak": 10},
        "size_bytes": {"total": 5},
        "latency": latency,
        "batches": batches,
        "predictions": (0, 1),
    }
    return Measurement(**{**values, **changes})


def result(*rows, **changes):
    machine = {"id": "x", "cpu": "c", "cores": 2, "gpu": [], "ram_gib": 1, "isa": []}
    count = next((r.score.count for r in rows if r.score), 10)
    data = {"name": "d", "rows": count, "sha256": "0"}
    values = {"created": "2026-01-01T00:00:00+00:00", "toolchain": "0", "machine": machine, "run": {}, "data": data}
    return ResultFile(**{**values, **changes}, rows=rows)


RUN = {"threads": 2, "batch_size": 32}


def measured_row(variant, ms, provider="cpu", correct=90, **changes):
    latency = Samples.from_rounds([[round(ms * 1000)]], [[1]])
    batches = Samples.from_rounds([[round(ms * 32000)]], [[32]])
    figures = {
        "variant": variant,
        "provider": provider,
        "score": Accuracy(correct, 100, 1),
        "latency": latency,
        "latency_ms": latency.milliseconds(),
        "batches": batches,
        "throughput_per_s": batches.per_second(),
        "memory_bytes": {"peak": round(ms * 1e8)},
        "size_bytes": {"total": round(ms * 1e7)},
        "artifact_id": f"id of {variant}",
    }
    return row(**{**figures, **changes})


FP32, INT8 = measured_row("torch-fp32", 8), measured_row("onnx-int8", 1, correct=89)


NO_GPU = Measurement("m", "onnx-fp32", "cuda", None, "unavailable", "No GPU answers.", "Get one.")


def row_of_cell(rows, cell):
    return next(r for r in rows if r.measurement.cell == cell)
