"""Trains the heads of exits on hidden states and logits that the graph computes for training rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Artifact
from toolchain.backends import open_graph
from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import MULTI, label_probabilities
from toolchain.passes import read
from toolchain.passes.exits import keep_state
from toolchain.progress import Progress
from toolchain.system import hardware

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

UNITS = 64  # of the hidden layer of a head
EPOCHS = 6
FEWEST_STEPS = 400  # a head that learns from few texts takes more epochs
BATCH_SIZE = 128
GROUP = 50  # number of batches whose texts are sorted by length together
LEARNING_RATE = 2e-3
DROPOUT = 0.2
TOKEN_DROPOUT = 0.1
WEIGHT_DECAY = 1e-2
MOST_BYTES = 2 << 30  # of the hidden states that a head learns from
# Divisors of a head's logits that `calibrate` tries.
TEMPERATURES = tuple(2 ** (step / 20) for step in range(-40, 61))


@dataclass(frozen=True)
class States:
    """One hidden state of several texts.

    Attributes:
        tokens: The hidden states of the tokens of all texts, of shape [tokens, width].
        starts: Index of each text's first token in `tokens`, and the number of tokens of all texts.
    """

    tokens: np.ndarray
    starts: np.ndarray

    def lengths(self) -> np.ndarray:
        """Returns the number of tokens of each text."""
        import numpy as np

        return np.diff(self.starts)

    def text(self, index: int) -> np.ndarray:
        """Returns the hidden states of a text, of shape [tokens, width]."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True)
class Network:
    """The weights of a head, as in `toolchain.passes.exits.ExitHead`."""

    weights: tuple[np.ndarray, np.ndarray]
    biases: tuple[np.ndarray, np.ndarray]

    def run(self, states: States) -> np.ndarray:
        """Returns the logits for the hidden states of texts, of shape [texts, labels]."""
        import numpy as np

        pooled = []
        for index in range(len(states.starts) - 1):
            padded = np.pad(states.text(index).astype(np.float32), ((1, 1), (0, 0)))
            neighbours = np.concatenate([padded[:-2], padded[1:-1], padded[2:]], axis=1)
            units = np.maximum(neighbours @ self.weights[0] + self.biases[0], 0)
            pooled.append(np.concatenate([units.max(axis=0), units.mean(axis=0)]))
        return np.asarray(np.stack(pooled) @ self.weights[1] + self.biases[1])

    def divide_logits(self, temperature: float) -> Network:
        """Returns the head whose logits are divided by `temperature`."""
        import numpy as np

        divisor = np.float32(temperature)
        return Network((self.weights[0], self.weights[1] / divisor), (self.biases[0], self.biases[1] / divisor))


def select_texts(rows: Sequence[Sequence[int]], width: int) -> list[Sequence[int]]:
    """Returns texts whose hidden states together need at most `MOST_BYTES` bytes as float16, evenly over `rows`.

    Args:
        rows: Token ids of each text.
        width: Width of the hidden states.
    """
    step = -(-2 * width * sum(map(len, rows)) // MOST_BYTES)
    return list(rows[:: max(1, step)])


def compute_logits(
    artifact: Artifact, rows: Sequence[Sequence[int]], encoder: Encoder, batch_size: int, progress: Progress
) -> np.ndarray:
    """Runs the graph of the artifact on texts, and returns the logits, of shape [texts, labels].

    Args:
        artifact: The artifact.
        rows: Token ids of each text.
        encoder: The `Encoder` of the artifact.
        batch_size: Number of texts in a batch.
        progress: Called with the number of texts done.
    """
    import numpy as np

    parts = {
        index: logits
        for batch, outputs in _run(read(artifact.onnx_path), rows, encoder, batch_size, progress)
        for index, logits in zip(batch, outputs, strict=True)
    }
    return np.stack([parts[index] for index in range(len(rows))])


def compute_states(
    artifact: Artifact,
    layer: int,
    rows: Sequence[Sequence[int]],
    encoder: Encoder,
    batch_size: int,
    progress: Progress,
    dtype: str = "float32",
) -> States:
    """Runs the first `layer` encoder layers of the graph on texts, and returns their hidden states.

    The other arguments are those of `compute_logits`; `dtype` is the type of the hidden states in memory.

    Raises:
        GraphError: As in `toolchain.passes.exits.hidden_states`.
    """
    import numpy as np

    graph = read(artifact.onnx_path)
    keep_state(graph, layer)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    tokens: np.ndarray | None = None
    for batch, outputs in _run(graph, rows, encoder, batch_size, progress):
        if tokens is None:
            tokens = np.empty((starts[-1], outputs.shape[2]), dtype)
        for index, state in zip(batch, outputs, strict=True):
            tokens[starts[index] : starts[index + 1]] = state[: len(rows[index])]
    assert tokens is not None
    return States(tokens, starts)


def _run(
    graph: ir.Model, rows: Sequence[Sequence[int]], encoder: Encoder, batch_size: int, progress: Progress
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Runs a graph on texts in batches of similar lengths; yields the indices of each batch, and the first output."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with open_graph(graph, hardware.cores()) as session:
        for start in range(0, len(order), batch_size):
            progress(start, len(order), "running the graph on rows of the training data")
            batch = order[start : start + batch_size]
            yield batch, session.run(pad([rows[index] for index in batch], encoder.names, encoder.pad_id))


def train(states: States, logits: np.ndarray, task: str, seed: int) -> Network:
    """Trains a head on the probabilities of the graph's own logits (distillation).

    Args:
        states: The hidden states of the texts.
        logits: The graph's logits for the texts, of shape [texts, labels].
        task: Task of the model: one or several labels of a text.
        seed: Random seed of the first weights, of the order of the texts, and of the dropout.
    """
    import numpy as np
    import torch
    from torch.nn import functional

    torch.set_num_threads(hardware.cores())
    scale = np.sqrt(np.square(states.tokens[: 1 << 16].astype(np.float32)).mean(axis=0)) + np.float32(1e-6)
    targets = torch.from_numpy(label_probabilities(logits, task).astype(np.float32))
    loss_of = functional.binary_cross_entropy_with_logits if task == MULTI else functional.cross_entropy
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = torch.nn.Conv1d(len(scale), UNITS, 3, padding=1)
        last = torch.nn.Linear(2 * UNITS, targets.shape[1])
        assert first.bias is not None
        parameters = [*first.parameters(), *last.parameters()]
        optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY)
        steps = -(-len(targets) // BATCH_SIZE)  # of an epoch
        epochs = max(EPOCHS, -(-FEWEST_STEPS // steps))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
        for _ in range(epochs):
            for texts in _shuffle_batches(states.lengths(), rng):
                tokens, mask = _batch(states, texts, scale)
                tokens = tokens * (torch.rand(mask.shape) >= TOKEN_DROPOUT).unsqueeze(1)
                units = torch.relu(first(tokens)) * mask.unsqueeze(1)
                pooled = torch.cat([units.amax(dim=2), units.sum(dim=2) / mask.sum(dim=1, keepdim=True)], dim=1)
                loss = loss_of(last(functional.dropout(pooled, DROPOUT)), targets[texts])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    filters = first.weight.detach().numpy() / scale[:, None]
    arrays = (
        filters.transpose(2, 1, 0).reshape(-1, UNITS).astype(np.float32),
        *(each.detach().numpy().copy() for each in (last.weight.T, first.bias, last.bias)),
    )
    return Network((arrays[0], arrays[1]), (arrays[2], arrays[3]))


def _shuffle_batches(lengths: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns the indices of the texts as batches in random order; the texts of a batch have similar lengths."""
    import numpy as np

    shuffled = rng.permutation(len(lengths))
    size = GROUP * BATCH_SIZE
    groups = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    batches = [
        group[start : start + BATCH_SIZE]
        for group in (each[np.argsort(lengths[each], kind="stable")] for each in groups)
        for start in range(0, len(group), BATCH_SIZE)
    ]
    return [batches[index] for index in rng.permutation(len(batches))]


def _batch(states: States, texts: np.ndarray, scale: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns hidden states, divided by `scale`, and the mask of real tokens.

    The shapes are [batch, width, sequence] and [batch, sequence]. Padding is 0.
    """
    import numpy as np
    import torch

    lengths = states.lengths()[texts]
    places = np.arange(lengths.max())
    mask = places < lengths[:, None]
    rows = np.minimum(states.starts[texts][:, None] + places, len(states.tokens) - 1)
    tokens = states.tokens[rows].astype(np.float32) / scale * mask[:, :, None]
    return torch.from_numpy(tokens).transpose(1, 2), torch.from_numpy(mask.astype(np.float32))


def calibrate(network: Network, logits: np.ndarray, targets: np.ndarray, task: str) -> tuple[Network, np.ndarray]:
    """Divides the logits of a head by the temperature that makes its probabilities fit the labels best.

    The method is temperature scaling (https://arxiv.org/abs/1706.04599).

    Args:
        network: The head.
        logits: Its logits for held-out texts, of shape [texts, labels].
        targets: 1 for each label of a text and 0 for every other label, of shape [texts, labels].
        task: Task of the model.

    Returns:
        The head with divided logits, and its logits for the held-out texts.
    """
    import numpy as np

    def misfit(temperature: float) -> float:
        probabilities = np.clip(label_probabilities(logits / temperature, task), 1e-12, 1 - 1e-12)
        likelihood = targets * np.log(probabilities)
        if task == MULTI:
            likelihood = likelihood + (1 - targets) * np.log(1 - probabilities)
        return -float(likelihood.sum())

    temperature = min(TEMPERATURES, key=misfit)
    return network.divide_logits(temperature), logits / temperature
