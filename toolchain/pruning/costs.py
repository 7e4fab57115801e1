"""Costs of heads and FFN neurons: parameters, multiply-accumulates, or measured milliseconds on this machine."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolchain.artifacts.steps import CPU_PASSES, QUANTIZE_PASSES
from toolchain.errors import PruningError
from toolchain.models.architectures import LayerShape, embedding_rank_of, head_size, reshape, shapes_of
from toolchain.system import files, hardware
from toolchain.system.decoding import Amount, Count, Line, decode, read_bytes, strict
from toolchain.system.files import temporary_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 25  # average number of tokens in a sentence of the validation set
ROUNDS, RUNS = 16, 30
PAUSE_S = 0.05  # after a run, ONNX Runtime's threads spin for about 20 ms on cores that the next session needs
LEAST_MS = 1e-6  # the least predicted time, so that a ratio of two predictions is finite
SCHEMA = 2
PASSES = (*CPU_PASSES, *QUANTIZE_PASSES["dynamic"])


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of an encoder's layers.

    Attributes:
        width: Width of the hidden states, equal in all layers.
        head: Width of one head, equal in all layers.
        shapes: Numbers of heads and FFN neurons of each layer.
        projection: Number of weights of the linear layer in a `LowRankEmbedding`; 0 for a plain embedding table.
    """

    width: int
    head: int
    shapes: tuple[LayerShape, ...]
    projection: int = 0

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> EncoderSizes:
        """Reads the current sizes of the model's encoder."""
        words: Any = model.get_input_embeddings()
        projection = 0 if embedding_rank_of(model) is None else words.linear.weight.numel()
        return cls(model.config.hidden_size, head_size(model), tuple(shapes_of(model)), projection)

    def unit_parameters(self, kind: str, count: int) -> int:
        """Returns the number of linear parameters, biases included, of a layer's attention or feed-forward part.

        Args:
            kind: Kind of the units, ``heads`` or ``neurons``.
            count: Number of heads or neurons; 0 units have 0 parameters.
        """
        per_unit = self.head * (4 * self.width + 3) if kind == "heads" else 2 * self.width + 1
        return count * per_unit + (self.width if count else 0)

    @property
    def parameters(self) -> int:
        """Returns the number of parameters of all linear layers of the encoder."""
        return sum(self.unit_parameters("heads", s.heads) + self.unit_parameters("neurons", s.ffn) for s in self.shapes)

    @property
    def multiply_accumulates(self) -> int:
        """Returns the encoder's multiply-accumulates for one sentence of `TOKENS` tokens.

        The encoder's multiply-accumulates are those of the linear layers and of the two matrix products of attention.
        The linear layer of a `LowRankEmbedding` counts as well.
        """
        linear = self.projection + sum(
            s.heads * 4 * self.width * self.head + s.ffn * 2 * self.width for s in self.shapes
        )
        return TOKENS * linear + sum(s.heads * 2 * TOKENS**2 * self.head for s in self.shapes)


@dataclass(frozen=True)
class LatencyTable:
    """Latency of the int8 model in ONNX Runtime for one sentence at batch 1, in milliseconds.

    Attributes:
        base_ms: Time of the parts of the model that pruning does not change.
        heads_ms: Number of heads in a layer → time that the layer spends on these heads.
        neurons_ms: Number of FFN neurons in a layer → time that the layer spends on these neurons.
    """

    base_ms: float
    heads_ms: dict[int, float]
    neurons_ms: dict[int, float]

    def price(self, kind: str, count: int) -> float:
        """Returns the milliseconds that one layer spends on `count` heads or neurons.

        The method interpolates linearly between the measured numbers of heads or neurons.

        Args:
            kind: Kind of the units, ``heads`` or ``neurons``.
            count: Number of heads or neurons.
        """
        import numpy as np

        table = self.heads_ms if kind == "heads" else self.neurons_ms
        counts = sorted(table)
        return float(np.interp(count, counts, [table[n] for n in counts]))

    def sentence_ms(self, shapes: Sequence[LayerShape]) -> float:
        """Returns the predicted milliseconds per sentence of a model with these layer shapes."""
        layers = sum(self.price("heads", shape.heads) + self.price("neurons", shape.ffn) for shape in shapes)
        return max(LEAST_MS, self.base_ms + layers)


def latency_table(model: PreTrainedModel, folder: Path, progress: Callable[[int, int, str], None]) -> LatencyTable:
    """Returns the model's latency table for this machine; reads it from `folder`, or measures it and writes it there.

    The measurement uses models with random weights and the widths of `model`. All layers of one measured
    model have the same shape. The measured models go through the usual export and int8 quantisation. In each round, all
    measured models run the same sentence, one model after the other in random order.

    Args:
        model: The unpruned model.
        folder: Folder of the stored latency tables.
        progress: Progress callback; receives the number of finished parts, the number of all parts, and a text.

    Raises:
        PruningError: The stored latency table cannot be read, or belongs to another machine, model or runtime.
    """
    encoder = EncoderSizes.from_model(model)
    settings = {
        "machine": hardware.machine()["id"],
        "threads": hardware.cores(),
        "onnxruntime": hardware.versions().get("onnxruntime") or hardware.versions().get("onnxruntime-gpu"),
        "passes": list(PASSES),
        "model_type": model.config.model_type,
        "width": encoder.width,
        "head": encoder.head,
        "layers": [vars(shape) for shape in encoder.shapes],
    }
    name = hashlib.sha256(json.dumps({k: v for k, v in settings.items() if k != "machine"}).encode()).hexdigest()[:12]
    file = folder / f"latency-{name}.json"
    if file.is_file():
        return _read_table(file, settings)
    table = _measure(model, encoder, progress)
    body = {"schema": SCHEMA, **settings, **vars(table)}
    files.write_whole(file, json.dumps(body, indent=1) + "\n")
    return table


def _read_table(file: Path, settings: dict[str, Any]) -> LatencyTable:
    hint = f"Delete {file} to measure again on this machine."
    try:
        stored = decode(_StoredTable, read_bytes(file))
    except (ValueError, OSError) as error:
        raise PruningError(f"{file} is not a valid latency table: {error}.", hint) from error
    if stored.machine != settings["machine"]:
        raise PruningError(f"{file} was measured on another machine ({stored.machine}).", hint)
    if {key: value for key, value in asdict(stored).items() if key in settings} != settings:
        raise PruningError(f"{file} was measured with another model or runtime than its name says.", hint)
    return LatencyTable(stored.base_ms, stored.heads_ms, stored.neurons_ms)


@strict
@dataclass(frozen=True)
class _StoredTable:
    """The file format of a `LatencyTable`, with the settings of its measurement."""

    schema: Literal[2]
    machine: Line
    threads: Count
    onnxruntime: Line | None
    passes: list[Line]
    model_type: Line
    width: Count
    head: Count
    layers: list[dict[Line, Count]]
    base_ms: Amount
    heads_ms: dict[Count, Amount]
    neurons_ms: dict[Count, Amount]

    def __post_init__(self) -> None:
        if not (self.heads_ms and self.neurons_ms):
            raise ValueError("there is no time of heads, or no time of neurons")


def _measure(model: PreTrainedModel, encoder: EncoderSizes, progress: Callable[[int, int, str], None]) -> LatencyTable:
    """Measures the median time of a model for several numbers of heads and of neurons per layer.

    The cost of n units in one layer is (time with n units per layer − time with 0 units) / number of layers.
    """
    heads, neurons, layers = encoder.shapes[0].heads, encoder.shapes[0].ffn, len(encoder.shapes)
    head_counts = sorted({0, 1, heads, *(round(heads * share) for share in (0.25, 0.5, 0.75))})
    neuron_counts = sorted(
        {0, min(32, neurons), neurons, *(round(neurons * s / 32) * 32 for s in (0.125, 0.25, 0.5, 0.75))}
    )
    points = [("heads", n) for n in head_counts] + [("neurons", n) for n in neuron_counts]
    times: dict[tuple[str, int], list[float]] = {point: [] for point in points}
    with temporary_folder() as scratch:
        sessions = {}
        for number, (kind, count) in enumerate(points):
            progress(number, len(points), f"building the latency table: model with {count} {kind} per layer")
            shape = LayerShape(count, neurons) if kind == "heads" else LayerShape(heads, count)
            sessions[kind, count] = _open_session(model, [shape] * layers, scratch / f"{kind}-{count}")
        for number in range(ROUNDS):
            progress(number, ROUNDS, "measuring the latency table")
            for point in random.Random(number).sample(points, len(points)):
                times[point].append(_median_run_ms(sessions[point]))
    medians = {point: statistics.median(values) for point, values in times.items()}
    dense_ms = (medians["heads", heads] + medians["neurons", neurons]) / 2
    layer_ms = {
        kind: {n: max(0.0, medians[kind, n] - medians[kind, 0]) / layers for k, n in points if k == kind}
        for kind in ("heads", "neurons")
    }
    base_ms = max(0.0, dense_ms - layers * (layer_ms["heads"][heads] + layer_ms["neurons"][neurons]))
    return LatencyTable(base_ms, layer_ms["heads"], layer_ms["neurons"])


def _open_session(model: PreTrainedModel, shapes: Sequence[LayerShape], folder: Path) -> Any:
    """Returns an int8 session of a model with random weights and these layer shapes, and the model's input names."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from toolchain import passes
    from toolchain.backends import Place
    from toolchain.backends.ort import OrtSession
    from toolchain.exporters import to_onnx

    # A small vocabulary is enough, since embedding look-ups cost almost no time.
    settings = {**model.config.to_dict(), "vocab_size": 128}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    random_model = AutoModelForSequenceClassification.from_config(config).eval()
    reshape(random_model, shapes)
    folder.mkdir()
    to_onnx(random_model, folder / "model.onnx", 18, ("input_ids", "attention_mask"))
    context = passes.Context(config.num_attention_heads, config.hidden_size)
    graph, _ = passes.rewrite(passes.read(folder / "model.onnx"), PASSES, context)
    passes.write(graph, folder / "model.onnx")
    return OrtSession(folder, Place("cpu", hardware.cores())), [spec.name for spec in graph.graph.inputs]


def _median_run_ms(session_and_names: Any) -> float:
    """Runs the session for one round and returns the median time of a run in milliseconds."""
    import numpy as np

    session, names = session_and_names
    time.sleep(PAUSE_S)
    batch = {name: np.ones((1, TOKENS), np.int64) for name in names}
    durations = []
    for number in range(RUNS + 2):
        start = time.perf_counter()
        session.run(batch)
        if number >= 2:
            durations.append(time.perf_counter() - start)
    return 1000 * statistics.median(durations)
