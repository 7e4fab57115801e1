"""Ranks layers by their sensitivity: quantises each layer alone and compares the outputs on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Artifact
from toolchain.backends import open_graph
from toolchain.backends.ort import OrtSession
from toolchain.data import inputs
from toolchain.data.encoding import Encoder, pad
from toolchain.data.inputs import Data, TrainingSource
from toolchain.data.labels import REGRESSION, SINGLE, TOKENS, Answer, Tokens, answers, divergence
from toolchain.errors import GraphError
from toolchain.passes import read, rewrite
from toolchain.passes.model_shape import context_of
from toolchain.passes.quantize_linear import layers_of
from toolchain.passes.quantize_static import Activation
from toolchain.progress import Progress
from toolchain.results.scores import score_answers
from toolchain.system import hardware

if TYPE_CHECKING:
    import numpy as np

# Number of held-out rows for the ranking of the layers. The number of layers to keep in fp32 is chosen on all held-out
# rows.
SENTENCES = 300


@dataclass(frozen=True)
class Layer:
    """A linear layer, and the effect of quantising it while all other layers stay fp32.

    Attributes:
        name: Name of the layer.
        divergence: Mean Kullback-Leibler divergence between the outputs of the fp32 graph and of the graph with this
            layer quantised, in nats; see `toolchain.data.labels.divergence`.
        flips: Number of flips in the first `SENTENCES` held-out rows, compared with the fp32 graph; None for
            regression.
    """

    name: str
    divergence: float
    flips: int | None


@dataclass(frozen=True)
class SensitivitySetup:
    """An fp32 graph, the passes that quantise it, and the held-out rows for the measurement.

    Attributes:
        artifact: Artifact with the fp32 graph.
        passes: Passes that quantise the linear layers.
        activations: Fixed quantisation of the layers' inputs, for passes that need it.
        encoder: Tokenizer of the artifact.
        rows: Token ids of the held-out rows.
        labels: Labels of the held-out rows.
    """

    artifact: Artifact
    passes: tuple[str, ...]
    activations: Mapping[str, Activation]
    encoder: Encoder
    rows: Sequence[Tokens]
    labels: Sequence[Answer]

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        passes: tuple[str, ...],
        train: TrainingSource,
        activations: Mapping[str, Activation] = MappingProxyType({}),
    ) -> SensitivitySetup:
        """Loads the held-out rows and encodes them with the artifact's tokenizer.

        Raises:
            DataError: The training data cannot be read, has too few rows, or has a label that the model does not have.
        """
        manifest = artifact.manifest
        data: Data = train.load(artifact.label_set)
        held_out = data.select(inputs.hold_out(data)[1])
        encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
        return cls(artifact, passes, activations, encoder, encoder.encode(held_out.texts), held_out.labels)

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers that `passes` can quantise, in the order of the graph."""
        return layers_of(read(self.artifact.onnx_path))

    @contextmanager
    def session(self, keep: Sequence[str]) -> Iterator[OrtSession]:
        """Opens a CPU session of the graph with every linear layer quantised except those in `keep`."""
        context = replace(context_of(self.artifact.path), keep=frozenset(keep), activations=self.activations)
        graph, _ = rewrite(read(self.artifact.onnx_path), self.passes, context)
        with open_graph(graph, hardware.cores()) as session:
            yield session

    def outputs(self, session: OrtSession, count: int) -> tuple[np.ndarray, list[Answer]]:
        """Runs the first `count` held-out rows; every batch is one row.

        Returns:
            The logits, of shape [rows, labels], and the answer to each row. In token classification, the logits of each
            token are a row of the array.
        """
        import numpy as np

        task = self.encoder.task
        logits, row_answers = [], list[Answer]()
        for row in self.rows[:count]:
            output = session.run(pad([row], self.encoder.names, self.encoder.pad_id))
            row_answers += answers(output, task, [row])
            logits.append(output.reshape(-1, output.shape[-1]))
        return np.concatenate(logits), row_answers


def rank(setup: SensitivitySetup, progress: Progress) -> list[Layer]:
    """Measures the sensitivity of every linear layer and returns the layers by divergence, largest first.

    Raises:
        GraphError: The graph has no linear layer.
    """
    names = setup.layers
    if not names:
        raise GraphError(
            f"{setup.artifact.manifest.variant} has no linear layer left to quantise.",
            "Name its parent instead.",
        )
    with setup.session(names) as session:
        fp32_logits, fp32_answers = setup.outputs(session, SENTENCES)
    task = setup.encoder.task
    layers = []
    for count, name in enumerate(names):
        progress(count, len(names), f"quantising only {name}")
        with setup.session([fp32_answer for fp32_answer in names if fp32_answer != name]) as session:
            logits, row_answers = setup.outputs(session, SENTENCES)
        flips = sum(answer != fp32_answer for answer, fp32_answer in zip(row_answers, fp32_answers, strict=True))
        rounded = float(f"{divergence(fp32_logits, logits, SINGLE if task == TOKENS else task):.3g}")
        layers.append(Layer(name, rounded, None if task == REGRESSION else flips))
    return sorted(layers, key=lambda layer: (-layer.divergence, layer.name))


def fewest_fp32_layers(
    setup: SensitivitySetup, max_drop: float, progress: Progress
) -> tuple[int, list[tuple[int, float]]]:
    """Finds by bisection how many of the most sensitive layers must stay fp32 to meet `max_drop`.

    Args:
        max_drop: Largest allowed accuracy drop on the held-out rows, in percentage points.

    Returns:
        The number of layers to keep in fp32; and for each number that the function tried, the accuracy drop.
    """
    names = [layer.name for layer in rank(setup, progress)]
    with setup.session(names) as session:
        fp32_score = _score(setup, session)
    drops: dict[int, float] = {}
    low, high = -1, len(names)  # if all layers stay fp32, there is no accuracy drop
    while high - low > 1:
        middle = (low + high) // 2
        progress(len(drops), len(names).bit_length() + 1, f"measuring with {middle} layers in fp32")
        with setup.session(names[:middle]) as session:
            drops[middle] = 100 * (fp32_score - _score(setup, session))
        low, high = (low, middle) if drops[middle] <= max_drop else (middle, high)
    return high, sorted(drops.items())


def _score(setup: SensitivitySetup, session: OrtSession) -> float:
    _, row_answers = setup.outputs(session, len(setup.rows))
    return score_answers(row_answers, setup.labels, setup.artifact.label_set).value
