"""Costs of heads and FFN neurons: parameters, multiply-accumulates, or measured milliseconds on this machine."""

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

TOKENS = 25  # average length of a sentence of the validation set
ROUNDS, ANSWERS = 16, 30
APART_S = 0.05  # ONNX Runtime's threads spin for about 20 ms after a run and would take the next session's cores
SCHEMA = 2
PASSES = (*CPU_PASSES, *QUANTIZE_PASSES["dynamic"])


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of an encoder's layers.

    Attributes:
        width: Width of the hidden states, equal in all layers.
        head: Width of one head, equal in all layers.
        shapes: Numbers of heads and FFN neurons of each layer.
    """

    width: int
    head: int
    shapes: tuple[LayerShape, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> EncoderSizes:
        """Reads the current sizes of the model's encoder."""
        return cls(model.config.hidden_size, head_size(model), tuple(shapes_of(model)))

    def of_units(self, kind: str, count: int) -> int:
        """Returns the number of linear parameters, biases included, of a sub-block of one layer.

        Args:
            kind: ``heads`` or ``neurons``.
            count: Number of heads or neurons. With 0 the sub-block has no parameters.
        """
        each = self.head * (4 * self.width + 3) if kind == "heads" else 2 * self.width + 1
        return count * each + (self.width if count else 0)

    @property
    def parameters(self) -> int:
        """Returns the number of parameters of all linear layers of the encoder."""
        return sum(self.of_units("heads", s.heads) + self.of_units("neurons", s.ffn) for s in self.shapes)

    @property
    def multiply_accumulates(self) -> int:
        """Returns the encoder's multiply-accumulates for one sentence of `TOKENS` tokens.

        The number covers the linear layers and the two matrix products of attention.
        """
        linear = sum(s.heads * 4 * self.width * self.head + s.ffn * 2 * self.width for s in self.shapes)
        return TOKENS * linear + sum(s.heads * 2 * TOKENS**2 * self.head for s in self.shapes)


@dataclass(frozen=True)
class LatencyTable:
    """Latency of the int8 model in ONNX Runtime for one sentence at batch 1, in milliseconds.

    Attributes:
        base_ms: Time of the parts that pruning does not change.
        heads_ms: Time that one layer adds, by its number of heads.
        neurons_ms: Time that one layer adds, by its number of FFN neurons.
    """

    base_ms: float
    heads_ms: dict[int, float]
    neurons_ms: dict[int, float]

    def price(self, kind: str, count: int) -> float:
        """Returns the milliseconds that one layer spends on `count` heads or neurons.

        The method interpolates linearly between measured counts.

        Args:
            kind: ``heads`` or ``neurons``.
            count: Number of heads or neurons.
        """
        import numpy as np

        table = self.heads_ms if kind == "heads" else self.neurons_ms
        counts = sorted(table)
        return float(np.interp(count, counts, [table[n] for n in counts]))

    def sentence_ms(self, shapes: Sequence[LayerShape]) -> float:
        """Returns the predicted milliseconds per sentence of a model with these layers."""
        layers = sum(self.price("heads", shape.heads) + self.price("neurons", shape.ffn) for shape in shapes)
        return self.base_ms + layers


def latency_table(model: PreTrainedModel, folder: Path, progress: Callable[[int, int, str], None]) -> LatencyTable:
    """Returns the model's latency table for this machine; reads it from `folder`, or measures it and writes it there.

    The measurement uses random models of the same widths, in which all layers have the same shape. They go through the
    usual export and int8 quantisation. All models run the same sentence, in rounds of random order.

    Args:
        model: The unpruned model.
        folder: Folder of the stored tables.
        progress: Called with the number of finished parts, their total and a text.

    Raises:
        PruningError: The stored table cannot be read, or belongs to another machine, model or runtime.
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
    hint = f"Delete {file} to measure this machine."
    try:
        body = json.loads(file.read_text())
        if body["schema"] != SCHEMA:
            raise ValueError(f"schema {body['schema']} instead of {SCHEMA}")
        found = {key: body[key] for key in what}
        heads, neurons = ({int(n): float(ms) for n, ms in body[key].items()} for key in ("heads_ms", "neurons_ms"))
        table = LatencyTable(float(body["base_ms"]), heads, neurons)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningError(f"{file} is no latency table: {error}.", hint) from error
    if found["machine"] != what["machine"]:
        raise PruningError(f"{file} was measured on another machine ({found['machine']}).", hint)
    if found != what:
        raise PruningError(f"{file} is of another model or runtime than it is named for.", hint)
    return table


def _measure(model: PreTrainedModel, encoder: EncoderSizes, progress: Callable[[int, int, str], None]) -> LatencyTable:
    """Measures medians over rounds; a count adds, per layer, the difference to the model without those units."""
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
    """Returns an int8 session of a random model of these shapes, and its input names."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from toolchain import passes
    from toolchain.backends import Place
    from toolchain.backends.ort import OrtSession
    from toolchain.exporters.optimum_exporter import to_onnx

    # A small vocabulary is enough, since embedding look-ups cost almost no time.
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
    """Runs the session for one round and returns the median time of a run in milliseconds."""
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
