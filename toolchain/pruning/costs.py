"""What heads and FFN neurons cost: parameters, multiply-accumulates, or milliseconds of this machine."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts.variants import CPU_PASSES, QUANTIZE_PASSES
from toolchain.errors import PruningError
from toolchain.models.architectures import LayerShape, head_size, reshape, shapes_of
from toolchain.system import files, hardware

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 25  # a sentence of the validation set, on average
ROUNDS, ANSWERS = 16, 30
APART_S = 0.05  # ONNX Runtime's threads spin for some 20 ms after an answer, and would take the next session's cores
SCHEMA = 2
PASSES = (*CPU_PASSES, *QUANTIZE_PASSES["dynamic"])


@dataclass(frozen=True)
class EncoderSizes:
    """The sizes all layers of a model share: `width` of the states, of one head, and each layer's shape."""

    width: int
    head: int
    shapes: tuple[LayerShape, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> EncoderSizes:
        """The model's encoder as it is now."""
        return cls(model.config.hidden_size, head_size(model), tuple(shapes_of(model)))

    def of_units(self, kind: str, count: int) -> int:
        """Linear parameters, biases included, of a sub-block of so many heads or neurons."""
        each = self.head * (4 * self.width + 3) if kind == "heads" else 2 * self.width + 1
        return count * each + (self.width if count else 0)

    @property
    def parameters(self) -> int:
        """Of all linear layers of the encoder."""
        return sum(self.of_units("heads", s.heads) + self.of_units("neurons", s.ffn) for s in self.shapes)

    @property
    def multiply_accumulates(self) -> int:
        """Of the encoder for one sentence of `TOKENS` tokens: its linear layers and attention's own products."""
        linear = sum(s.heads * 4 * self.width * self.head + s.ffn * 2 * self.width for s in self.shapes)
        return TOKENS * linear + sum(s.heads * 2 * TOKENS**2 * self.head for s in self.shapes)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of an int8 sentence in ONNX Runtime at batch 1: `base_ms` for what pruning does not touch, and what
    a layer adds by its number of heads and of FFN neurons."""

    base_ms: float
    heads_ms: dict[int, float]
    neurons_ms: dict[int, float]

    def price(self, kind: str, count: int) -> float:
        """Milliseconds a layer spends on that many, between measured counts on a straight line."""
        import numpy as np

        table = self.heads_ms if kind == "heads" else self.neurons_ms
        counts = sorted(table)
        return float(np.interp(count, counts, [table[n] for n in counts]))

    def sentence_ms(self, shapes: Sequence[LayerShape]) -> float:
        """What a model of these layers is predicted to take."""
        layers = sum(self.price("heads", shape.heads) + self.price("neurons", shape.ffn) for shape in shapes)
        return self.base_ms + layers


def latency_table(model: PreTrainedModel, folder: Path, progress: Callable[[int, int, str], None]) -> LatencyTable:
    """The model's latency table of this machine, from `folder` or else measured and kept there.

    Random models of the same widths, every layer alike, go through export and int8 as any model does and answer the
    same sentence in rounds of random order. Raises `PruningError` for a table of another machine, or one that cannot
    be read.
    """
    encoder = EncoderSizes.of(model)
    what = {
        "machine": hardware.machine()["id"],
        "threads": hardware.cores(),
        "onnxruntime": hardware.versions().get("onnxruntime") or hardware.versions().get("onnxruntime-gpu"),
        "passes": list(PASSES),
        "model_type": model.config.model_type,
        "width": encoder.width,
        "head": encoder.head,
        "layers": [vars(shape) for shape in encoder.shapes],
    }
    name = hashlib.sha256(json.dumps({k: v for k, v in what.items() if k != "machine"}).encode()).hexdigest()[:12]
    file = folder / f"latency-{name}.json"
    if file.is_file():
        return _read(file, what)
    table = _measure(model, encoder, progress)
    body = {"schema": SCHEMA, **what, **vars(table)}
    files.write_whole(file, json.dumps(body, indent=1) + "\n")
    return table


def _read(file: Path, what: dict[str, Any]) -> LatencyTable:
    mend = f"Delete {file} to measure this machine."
    try:
        body = json.loads(file.read_text())
        if body["schema"] != SCHEMA:
            raise ValueError(f"schema {body['schema']} instead of {SCHEMA}")
        found = {key: body[key] for key in what}
        heads, neurons = ({int(n): float(ms) for n, ms in body[key].items()} for key in ("heads_ms", "neurons_ms"))
        table = LatencyTable(float(body["base_ms"]), heads, neurons)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningError(f"{file} is no latency table: {error}.", mend) from error
    if found["machine"] != what["machine"]:
        raise PruningError(f"{file} was measured on another machine ({found['machine']}).", mend)
    if found != what:
        raise PruningError(f"{file} is of another model or runtime than it is named for.", mend)
    return table


def _measure(model: PreTrainedModel, encoder: EncoderSizes, progress: Callable[[int, int, str], None]) -> LatencyTable:
    """Medians over rounds of models whose layers are all alike; what a count adds is the difference to none."""
    heads, neurons, layers = encoder.shapes[0].heads, encoder.shapes[0].ffn, len(encoder.shapes)
    some_heads = sorted({0, 1, heads, *(round(heads * share) for share in (0.25, 0.5, 0.75))})
    some_neurons = sorted(
        {0, min(32, neurons), neurons, *(round(neurons * s / 32) * 32 for s in (0.125, 0.25, 0.5, 0.75))}
    )
    points = [("heads", n) for n in some_heads] + [("neurons", n) for n in some_neurons]
    times: dict[tuple[str, int], list[float]] = {point: [] for point in points}
    with tempfile.TemporaryDirectory() as scratch:
        sessions = {}
        for number, (kind, count) in enumerate(points):
            progress(number, len(points), f"latency table: {count} {kind}")
            shape = LayerShape(count, neurons) if kind == "heads" else LayerShape(heads, count)
            sessions[kind, count] = _session(model, [shape] * layers, Path(scratch) / f"{kind}-{count}")
        for number in range(ROUNDS):
            progress(number, ROUNDS, "latency table: rounds")
            for point in random.Random(number).sample(points, len(points)):
                times[point].append(_time(sessions[point]))
    median = {point: statistics.median(values) for point, values in times.items()}
    dense = (median["heads", heads] + median["neurons", neurons]) / 2
    added = {
        kind: {n: max(0.0, median[kind, n] - median[kind, 0]) / layers for k, n in points if k == kind}
        for kind in ("heads", "neurons")
    }
    base = max(0.0, dense - layers * (added["heads"][heads] + added["neurons"][neurons]))
    return LatencyTable(base, added["heads"], added["neurons"])


def _session(model: PreTrainedModel, shapes: Sequence[LayerShape], folder: Path) -> Any:
    """An int8 session of a random model of these shapes, with a small vocabulary: look-ups cost nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from toolchain import passes
    from toolchain.backends import Place
    from toolchain.backends.ort import OrtSession
    from toolchain.exporters.optimum_exporter import to_onnx

    settings = {**model.config.to_dict(), "vocab_size": 128}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(config).eval()
    reshape(made, shapes)
    folder.mkdir()
    to_onnx(made, folder / "model.onnx", 18, ("input_ids", "attention_mask"))
    attention = passes.Context(config.num_attention_heads, config.hidden_size)
    graph, _ = passes.rewrite(passes.read(folder / "model.onnx"), PASSES, attention)
    passes.write(graph, folder / "model.onnx")
    return OrtSession(folder, Place("cpu", hardware.cores())), [spec.name for spec in graph.graph.inputs]


def _time(session: Any) -> float:
    """Median milliseconds of an answer in one round."""
    import numpy as np

    opened, names = session
    time.sleep(APART_S)
    batch = {name: np.ones((1, TOKENS), np.int64) for name in names}
    spent = []
    for number in range(ANSWERS + 2):
        started = time.perf_counter()
        opened.run(batch)
        if number >= 2:
            spent.append(time.perf_counter() - started)
    return 1000 * statistics.median(spent)
