"""Heads that predict the labels from early hidden states, so that training makes exits after early layers accurate.

This module imports torch, so other modules import this module only inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

UNITS = 64  # of the hidden layer of a head


class ExitHeads(torch.nn.Module):
    """One head for each hidden state before the last: a network with one hidden layer on the mean over the tokens.

    The heads exist only during training, as in Lee et al. 2015, "Deeply-Supervised Nets". The step `exits` trains the
    heads of the finished graph.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], seed: int) -> None:
        """Creates heads with random weights.

        Args:
            model: The model under training.
            layers: Indices of the entries of `hidden_states` that get a head.
            seed: Random seed of the weights.
        """
        super().__init__()
        self._layers = tuple(layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._heads = torch.nn.ModuleList(_head(model) for _ in self._layers)

    def forward(self, hidden_states: Sequence[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
        """Returns the logits of each head, each of shape [batch, labels].

        Args:
            hidden_states: Hidden states of the model, each of shape [batch, sequence, width].
            mask: Attention mask of shape [batch, sequence].
        """
        weight = (mask / mask.sum(dim=1, keepdim=True)).unsqueeze(-1)
        means = [(hidden_states[layer].float() * weight).sum(dim=1) for layer in self._layers]
        return [head(mean) for head, mean in zip(self._heads, means, strict=True)]


def _head(model: PreTrainedModel) -> torch.nn.Sequential:
    labels = len(model.config.id2label or ())
    return torch.nn.Sequential(
        torch.nn.Linear(model.config.hidden_size, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, labels)
    )
