"""The best low-rank approximation of a table of word embeddings, with each token weighted by its frequency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toolchain.models.architectures import replace_embedding

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROWS = 8192  # rows of a table that become float64 at a time; a table of many languages would fill the memory


def factor_embedding(model: PreTrainedModel, rank: int, counts: Mapping[int, int]) -> None:
    """Replaces the model's table of word embeddings by its best approximation of rank `rank`, in place.

    A `LowRankEmbedding` takes the place of the table, as in ALBERT (Lan et al. 2019), which trains such factors from
    the start. The weight of a token is its number of occurrences plus one, so that tokens without occurrences keep a
    meaning. Weights in a factorisation follow FWSVD (Hsu et al. 2022), which takes the weights from gradients.

    Args:
        model: The model to change; it has a plain table.
        rank: Width of the new table.
        counts: Number of occurrences of each token id in the training data.

    Raises:
        PruningError: The model has no plain table, or the factors are not smaller than the table.
    """
    import torch

    table: Any = model.get_input_embeddings()
    embedding = replace_embedding(model, rank)
    weights = torch.ones(len(table.weight), dtype=torch.float64)
    for token, count in counts.items():
        weights[token] += count
    rows, basis, mean = factor(table.weight.detach(), weights, rank)
    with torch.no_grad():
        embedding.embedding.weight.copy_(rows)
        embedding.linear.weight.copy_(basis)
        embedding.linear.bias.copy_(mean)


def factor(table: torch.Tensor, weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the factors of a table with the least sum of squared errors, in which each row has its weight.

    The columns of the basis are the first principal components of the centred table.

    Args:
        table: The table, of shape [tokens, width].
        weights: Weight of each token, of shape [tokens].
        rank: Number of principal components.

    Returns:
        The rows [tokens, rank], the basis [width, rank] and the mean [width]: table ≈ rows · basisᵀ + mean.
    """
    import torch

    parts = list(zip(table.split(ROWS), weights.double().split(ROWS), strict=True))
    mean = sum(((part.T.double() @ weight) for part, weight in parts), torch.zeros(())) / weights.double().sum()
    covariance = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for part, weight in parts:
        centred = part.double() - mean
        covariance += centred.T @ (centred * weight[:, None])
    _, vectors = torch.linalg.eigh(covariance)  # in ascending order of their share of the squared values
    basis = vectors[:, -rank:]
    rows = torch.cat([(part.double() - mean) @ basis for part, _ in parts])
    return rows.to(table.dtype), basis.to(table.dtype), mean.to(table.dtype)
