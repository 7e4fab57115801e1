"""Result rows with every figure that a report shows, and result rows in which every text is an injection attack."""

import dataclasses

import pytest
from sample_results import NO_GPU, RUN, measured_row, result

from toolchain.compare.report.html import to_html
from toolchain.compare.rows import compare
from toolchain.data import inputs
from toolchain.data.inputs import Data
from toolchain.results.measurements import Measurement, Samples
from toolchain.results.scores import Accuracy

LABELS = [0, 1, 0, 1, 1, 0, 1, 0]
# Maps each variant to its latency in milliseconds and to the indices of the sentences with wrong answers.
ANSWERS = {
    "torch-fp32": (8.0, {7}),
    "torch-pruned50": (5.0, {0, 1}),
    "onnx-int8": (1.0, {1, 7}),
    "onnx-pruned50-int8": (0.7, {1, 2, 7}),
}
DATA = Data("sst2", tuple(f"sentence <b>{i}</b>" for i in range(1, 9)), tuple(LABELS))
HOSTILE = (
    '<script>alert(\'x\')</script>" onload="alert(1)" $\\frac{}$ --> \x00\x1b\x9b\u202e'
    + chr(0xD800)
    + " {{ 7 * 7 }} </style></svg>"
)


def rounds(ms):
    return Samples.from_single([[round(ms * 1000 * (1 + (7 * r + s) % 5 / 50)) for s in range(4)] for r in range(8)])


def rich_row(variant, ms, wrong_rows, **changes):
    answers = tuple(1 - label if i in wrong_rows else label for i, label in enumerate(LABELS))
    latency = rounds(ms)
    pruning = {
        **{"method": "fisher", "achieved": 0.5, "heads": [4], "ffn": [32]},
        **{"encoder_parameters": {"before": 2, "after": 1}, "predicted_speedup": {"value": 2.0, "by": "a table"}},
    }
    return measured_row(
        variant,
        ms,
        score=Accuracy(len(LABELS) - len(wrong_rows), len(LABELS), 1),
        latency=latency,
        latency_ms=latency.milliseconds(),
        predictions=answers,
        probabilities=tuple((9000, 1000) if answer == 0 else (2000, 8000) for answer in answers),
        batch_changed=1,
        server=latency,
        server_ms=latency.milliseconds(),
        by_length={16: rounds(ms), 64: rounds(3 * ms)},
        memory_bytes={"peak": round(ms * 1e8), "method": "VmHWM"},
        noise={"steal_share": 0.3} if variant == "onnx-int8" else {},
        facts={
            "server": {"qps": 400 / ms, "p99_limit_ms": 50.0, "mean_batch": 1.5},
            "roofline": {"macs": 10**6, "weight_bytes": 10**7, "floor_ms": 0.25, "share": 0.5},
            **({"pruning": pruning} if "pruned" in variant else {}),
        },
        **changes,
    )


def rich_result(**changes):
    rows = [rich_row(variant, ms, wrong_rows) for variant, (ms, wrong_rows) in ANSWERS.items()]
    run = {**RUN, "passes": 3, "allow_fallback": False, "rates": {"torch": {"fp32_gmacs": 61.5}}}
    machine = {**result().machine, "versions": {"torch": "2.13.0"}}
    data = {"name": "sst2", "rows": len(LABELS), "sha256": DATA.sha256, "labels": LABELS}
    return result(*rows, NO_GPU, **{"run": run, "machine": machine, "data": data, **changes})


POINTS = ((0.8, 3.0, 0.3, [0.75, 0.25]), (0.95, 0.4, 0.5, [0.5, 0.25]), (0.99, 0.0, 0.8, [0.25, 0.125]))


def exits_row(variant, ms, wrong_rows, chosen, **changes):
    """Returns a row with exits; `chosen` is the index of its point in `POINTS`."""
    curve = [dict(zip(("confidence", "drop", "work", "shares"), point, strict=True)) for point in POINTS]
    row = rich_row(variant, ms, wrong_rows, **changes)
    exits = {**curve[chosen], "layers": [0, 2], "held_out_rows": 40, "curve": curve}
    return dataclasses.replace(row, facts={**row.facts, "exits": exits}, exits=(0, 0, 0, 1, 1, 2, 2, None))


def exits_result():
    """Returns a result with the rows of `rich_result`, and with two variants with exits of one parent."""
    rich = rich_result()
    early = exits_row("onnx-exits-int8+low", 0.5, {1, 2, 7}, 0), exits_row("onnx-exits-int8", 0.75, {1, 7}, 1)
    return dataclasses.replace(rich, rows=(*rich.rows[:-1], *early, rich.rows[-1]))


def hostile_result():
    hostile_row = rich_row(HOSTILE, 2.0, {1})
    hostile_row = dataclasses.replace(hostile_row, facts=exits_row("onnx-exits-int8", 1.0, {1}, 0).facts)
    hostile_row = dataclasses.replace(hostile_row, model=HOSTILE, memory_bytes={"peak": 10**8, "method": HOSTILE})
    failed_row = Measurement(HOSTILE, "onnx-fp32", "cpu", None, "failed", HOSTILE, HOSTILE)
    base_row = rich_row("torch-fp32", 8.0, {7})
    base_row = dataclasses.replace(base_row, model=HOSTILE, facts={"session": {"note": HOSTILE, "fallback": HOSTILE}})
    machine = {**result().machine, "cpu": HOSTILE, "versions": {HOSTILE: HOSTILE}, "isa": [HOSTILE]}
    run = {**RUN, HOSTILE: 1, "rates": {HOSTILE: {HOSTILE: HOSTILE}}}
    data = {**rich_result().data, "name": HOSTILE, "sha256": "another"}
    rows = (hostile_row, base_row, failed_row)
    return result(*rows, machine=machine, run=run, data=data, created=HOSTILE, toolchain=HOSTILE)


def report_html(*runs):
    """Returns the HTML report of the result files `runs`.

    The report takes its sentences from the artificial data `DATA`, not from the validation set inside the package.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "load_embedded", lambda split="validation": DATA)
        return to_html(compare(runs))
