"""Trains the heads of exits on hidden states and logits that the graph computes for training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Artifact
from toolchain.backends import open_graph
from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import MULTI, label_probabilities
from toolchain.passes import read
from toolchain.passes.exits import hidden_states, pool
from toolchain.progress import Progress
from toolchain.system import hardware

if TYPE_CHECKING:
    import numpy as np

UNITS = 64  # of the hidden layer of a head
EPOCHS = 12
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
DROPOUT = 0.1
WEIGHT_DECAY = 1e-2
# Divisors of a head's logits that `calibrate` tries.
TEMPERATURES = tuple(2 ** (step / 20) for step in range(-40, 61))


@dataclass(frozen=True)
class Observations:
    """Hidden states and logits that the graph computes for texts.

    Attributes:
        means: The mean of each hidden state over the tokens of each text, of shape [texts, width]. The hidden states
            are those of `toolchain.passes.exits.hidden_states`.
        logits: Logits of shape [texts, labels].
    """

    means: tuple[np.ndarray, ...]
    logits: np.ndarray


@dataclass(frozen=True)
class Network:
    """The weights of a head, as in `toolchain.passes.exits.ExitHead`."""

    weights: tuple[np.ndarray, np.ndarray]
    biases: tuple[np.ndarray, np.ndarray]

    def run(self, means: np.ndarray) -> np.ndarray:
        """Returns the logits for means of hidden states, of shape [texts, labels]."""
        import numpy as np

        hidden = np.maximum(means @ self.weights[0] + self.biases[0], 0)
        return np.asarray(hidden @ self.weights[1] + self.biases[1])

    def divide_logits(self, temperature: float) -> Network:
        """Returns the head whose logits are divided by `temperature`."""
        import numpy as np

        divisor = np.float32(temperature)
        return Network((self.weights[0], self.weights[1] / divisor), (self.biases[0], self.biases[1] / divisor))


def observe(
    artifact: Artifact, rows: Sequence[Sequence[int]], encoder: Encoder, batch_size: int, progress: Progress
) -> Observations:
    """Runs the graph of the artifact on texts, in batches of texts of similar lengths.

    Args:
        artifact: The artifact.
        rows: Token ids of each text.
        encoder: The `Encoder` of the artifact.
        batch_size: Number of texts in a batch.
        progress: Called with the number of texts done.

    Raises:
        GraphError: The function `hidden_states` finds no hidden states.
    """
    import numpy as np

    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    graph = read(artifact.onnx_path)
    logits_name = graph.graph.outputs[0].name or ""
    names = [*pool(graph, hidden_states(graph)), logits_name]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with open_graph(graph, hardware.cores()) as session:
        for start in range(0, len(order), batch_size):
            progress(start, len(order), "running the graph on rows of the training data")
            batch = pad([rows[index] for index in order[start : start + batch_size]], encoder.names, encoder.pad_id)
            outputs = session.outputs(batch)
            for name in names:
                parts[name].append(outputs[name])
    place = np.argsort(order)
    *means, logits = (np.concatenate(parts[name])[place] for name in names)
    return Observations(tuple(means), logits)


def train(means: np.ndarray, logits: np.ndarray, task: str, seed: int) -> Network:
    """Trains a head on the probabilities of the graph's own logits (distillation).

    Args:
        means: Means of a hidden state, of shape [texts, width].
        logits: The graph's logits, of shape [texts, labels].
        task: Task of the model: one or several labels of a text.
        seed: Random seed of the first weights, of the order of the texts, and of the dropout.
    """
    import numpy as np
    import torch
    from torch.nn import functional

    center, spread = means.mean(axis=0), means.std(axis=0) + 1e-6
    inputs = torch.from_numpy((means - center) / spread)
    targets = torch.from_numpy(label_probabilities(logits, task).astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = torch.nn.Linear(inputs.shape[1], UNITS), torch.nn.Linear(UNITS, targets.shape[1])
        network = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Dropout(DROPOUT), last)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * -(-len(inputs) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(inputs)).split(BATCH_SIZE):
                output = network(inputs[rows])
                if task == MULTI:
                    loss = functional.binary_cross_entropy_with_logits(output, targets[rows])
                else:
                    loss = functional.cross_entropy(output, targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    weight = first.weight.detach().numpy().T / spread[:, None]
    bias = first.bias.detach().numpy() - center @ weight
    return Network(
        (weight.astype(np.float32), last.weight.detach().numpy().T.copy()),
        (bias.astype(np.float32), last.bias.detach().numpy()),
    )


def calibrate(network: Network, means: np.ndarray, targets: np.ndarray, task: str) -> Network:
    """Divides the logits of a head by the temperature that makes its probabilities fit the labels best.

    The method is temperature scaling (https://arxiv.org/abs/1706.04599).

    Args:
        network: The head.
        means: Means of the hidden state of held-out texts, of shape [texts, width].
        targets: 1 for each label of a text and 0 for every other label, of shape [texts, labels].
        task: Task of the model.
    """
    import numpy as np

    logits = network.run(means)

    def misfit(temperature: float) -> float:
        probabilities = np.clip(label_probabilities(logits / temperature, task), 1e-12, 1 - 1e-12)
        likelihood = targets * np.log(probabilities)
        if task == MULTI:
            likelihood = likelihood + (1 - targets) * np.log(1 - probabilities)
        return -float(likelihood.sum())

    return network.divide_logits(min(TEMPERATURES, key=misfit))
