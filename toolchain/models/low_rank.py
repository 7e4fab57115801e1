"""Word embeddings of low rank: a narrow table, and a linear layer that widens the rows of the table.

This module imports torch, so import it inside the functions that use it.
"""

from __future__ import annotations

import torch
from torch import nn


class LowRankEmbedding(nn.Module):
    """A replacement for a table of word embeddings: a table [tokens, rank] and a linear layer [rank → width].

    The benchmark reads from the names of the weights which weights a model multiplies: a weight of a module named
    `embedding` is looked up, and a weight of a module named `linear` is multiplied.

    Args:
        tokens: Number of tokens.
        width: Width of the embeddings.
        rank: Width of the table.
        padding_index: Id of the padding token, whose row gets no gradient; None if the replaced table has none.
    """

    def __init__(self, tokens: int, width: int, rank: int, padding_index: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, rank, padding_index)
        self.linear = nn.Linear(rank, width)

    @property
    def rank(self) -> int:
        """Returns the width of the table."""
        return self.embedding.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of token ids, of shape [batch, sequence, width]."""
        states: torch.Tensor = self.linear(self.embedding(ids))
        return states


def factor_parameters(tokens: int, width: int, rank: int) -> int:
    """Returns the number of parameters of a `LowRankEmbedding`."""
    return (tokens + width) * rank + width
