"""The module paths of attention heads and FFN neurons in each architecture, and the removal of heads and neurons.

Only `LAYOUTS` contains an architecture's module names. To support another architecture, add an entry to `LAYOUTS`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError, PruningError
from toolchain.models.checkpoints import SHAPES
from toolchain.system.decoding import Count, decode, read_bytes, strict

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from toolchain.models.low_rank import LowRankEmbedding


@dataclass(frozen=True)
class Layout:
    """The module paths of an architecture.

    The path in `layers` starts at the model, and every other path starts at a layer.

    Attributes:
        layers: The list of encoder layers.
        attention: The attention module, which returns a tuple.
        query: Linear layer of the queries.
        key: Linear layer of the keys.
        value: Linear layer of the values.
        output: Last linear layer of the attention sub-block.
        attention_norm: LayerNorm after the residual addition of the attention sub-block.
        up: First linear layer of the feed-forward sub-block.
        down: Last linear layer of the feed-forward sub-block.
        output_norm: LayerNorm after the residual addition of the feed-forward sub-block.
        counts: Names of two attributes of `attention`: the number of heads and their total width.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    output_norm: str
    counts: tuple[str, str]


_BERT = Layout(
    layers="bert.encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    output_norm="output.LayerNorm",
    counts=("num_attention_heads", "all_head_size"),
)
LAYOUTS = {
    "distilbert": Layout(
        layers="distilbert.transformer.layer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        output_norm="output_layer_norm",
        counts=("n_heads", "dim"),
    ),
    "bert": _BERT,
    "roberta": replace(_BERT, layers="roberta.encoder.layer"),
    "xlm-roberta": replace(_BERT, layers="roberta.encoder.layer"),
    "electra": replace(_BERT, layers="electra.encoder.layer"),
}
LAYER_SHARING = {"albert"}  # Architectures that store one layer and run it several times.
# Maps each architecture that cannot be pruned to the sentence that gives the user the reason.
UNPRUNABLE = {
    "albert": "{model} uses the same weights in all layers, so no layer can be pruned separately.",
    "deberta-v2": "{model} attends to words and to positions with the same weights, so no head can be removed.",
    "eurobert": "{model} has gates in its feed-forward parts, so it cannot be pruned.",
    "modernbert": "{model} computes queries, keys and values in one layer and has gates, so it cannot be pruned.",
    "mpnet": "{model} has one table of position biases for the heads of all layers, so no head can be removed.",
    "mobilebert": "{model} has bottleneck layers and several feed-forward parts in each layer, so it cannot be pruned.",
}

# Maps each architecture whose exported graph ONNX Runtime cannot run to the sentence that gives the user the reason.
UNEXPORTABLE = {
    "longformer": "{model} splits a text into windows, and no exported graph works for every number of windows.",
}


@strict
@dataclass(frozen=True)
class LayerShape:
    """The numbers of attention heads and FFN neurons of one layer; 0 if pruning removed the attention or the FFN."""

    heads: Count
    ffn: Count

    @property
    def is_empty(self) -> bool:
        """Returns whether the layer has no heads and no neurons, so that it returns its input unchanged."""
        return not self.heads and not self.ffn


@strict
@dataclass(frozen=True)
class PrunedShapes:
    """The content of the file `SHAPES`: the sizes of a pruned model that its config does not state.

    Attributes:
        layers: Shape of every layer, first to last.
        embedding_rank: Width of the table of a `LowRankEmbedding`; None if the model has a plain embedding table.
    """

    layers: tuple[LayerShape, ...]
    embedding_rank: Count | None = None


def layout_of(model: PreTrainedModel) -> Layout:
    """Returns the layout of the model's architecture.

    Raises:
        PruningError: The architecture is unknown or cannot be pruned.
    """
    kind = model.config.model_type
    if kind in UNPRUNABLE:
        raise PruningError(
            UNPRUNABLE[kind].format(model=type(model).__name__),
            f"Quantise it instead. Pruning supports {', '.join(LAYOUTS)}.",
        )
    if kind not in LAYOUTS:
        raise PruningError(
            f"Pruning does not support {type(model).__name__}.",
            f"Pruning supports {', '.join(LAYOUTS)}.",
        )
    return LAYOUTS[kind]


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the encoder's layers, first to last."""
    stack: Any = model.get_submodule(layout_of(model).layers)
    return list(stack)


def head_size(model: PreTrainedModel) -> int:
    """Returns the width of one attention head; pruning does not change it."""
    return int(model.config.hidden_size // model.config.num_attention_heads)


def shapes_of(model: PreTrainedModel) -> list[LayerShape]:
    """Returns the current shape of every layer, first to last."""
    layout, size = layout_of(model), head_size(model)
    shapes = []
    for layer in layers_of(model):
        output, down = layer.get_submodule(layout.output), layer.get_submodule(layout.down)
        shapes.append(LayerShape(getattr(output, "in_features", 0) // size, getattr(down, "in_features", 0)))
    return shapes


def matched_layers(model: PreTrainedModel) -> list[int]:
    """Returns the indices at which the hidden states of the pruned model and the unpruned model correspond.

    Index i stands for the hidden state after i layers. A layer without heads and neurons is empty: its output is its
    input. Pruning refits the LayerNorm before an empty layer, so that this LayerNorm's output approximates the output
    of the unpruned layer. The hidden state before an empty layer therefore corresponds to the unpruned model's hidden
    state after that layer. The function omits the index of the hidden state before an empty layer.
    """
    shapes = shapes_of(model)
    return [count for count in range(1, len(shapes) + 1) if count == len(shapes) or not shapes[count].is_empty]


def keep_units(model: PreTrainedModel, index: int, heads: Sequence[int], neurons: Sequence[int]) -> None:
    """Removes all heads and FFN neurons of one layer except `heads` and `neurons`, in place.

    If `heads` (or `neurons`) is empty, the function replaces the attention (or the FFN) and its LayerNorm by the
    identity.

    Args:
        model: A model of an architecture in `LAYOUTS`.
        index: Index of the layer.
        heads: Indices of the heads that stay.
        neurons: Indices of the FFN neurons that stay.
    """
    import torch

    from toolchain.models.skipped_blocks import Absent, Skipped

    layout, size = layout_of(model), head_size(model)
    layer = layers_of(model)[index]
    columns = torch.tensor([head * size + i for head in heads for i in range(size)], dtype=torch.long)
    neuron_indices = torch.tensor(list(neurons), dtype=torch.long)
    output: Any = layer.get_submodule(layout.output)
    down: Any = layer.get_submodule(layout.down)
    if len(heads):
        attention = layer.get_submodule(layout.attention)
        for path in (layout.query, layout.key, layout.value):
            _replace_module(layer, path, _slice_linear(layer.get_submodule(path), rows=columns))
        _replace_module(layer, layout.output, _slice_linear(output, columns=columns))
        for name, value in zip(layout.counts, (len(heads), len(heads) * size), strict=True):
            setattr(attention, name, value)
    else:
        inner = layout.output.removeprefix(f"{layout.attention}.")
        if inner == layout.output:  # the output layer is not a submodule of the attention module
            _replace_module(layer, layout.attention, Skipped())
            _replace_module(layer, layout.output, Absent())
        else:
            _replace_module(layer, layout.attention, Skipped(inner, Absent()))
        _replace_module(layer, layout.attention_norm, torch.nn.Identity())
    if len(neurons):
        _replace_module(layer, layout.up, _slice_linear(layer.get_submodule(layout.up), rows=neuron_indices))
        _replace_module(layer, layout.down, _slice_linear(down, columns=neuron_indices))
    else:
        _replace_module(layer, layout.up, torch.nn.Identity())
        _replace_module(layer, layout.down, Absent())
        _replace_module(layer, layout.output_norm, torch.nn.Identity())


def embedding_rank_of(model: PreTrainedModel) -> int | None:
    """Returns the width of the table of the model's `LowRankEmbedding`; None if the embedding table is plain."""
    from toolchain.models.low_rank import LowRankEmbedding

    words = model.get_input_embeddings()
    return words.rank if isinstance(words, LowRankEmbedding) else None


def require_embedding_rank(model: PreTrainedModel, rank: int) -> None:
    """Checks that a `LowRankEmbedding` of this rank is smaller than the model's plain table of word embeddings.

    Raises:
        PruningError: The model has no plain table of word embeddings, or the factors have as many parameters as the
            table or more.
    """
    import torch

    from toolchain.models.low_rank import factor_parameters

    words = model.get_input_embeddings()
    if type(words) is not torch.nn.Embedding:
        raise PruningError(
            f"{type(model).__name__} has no plain table of word embeddings, so no table of low rank can replace it.",
            "Leave --embedding-rank out.",
        )
    tokens, width = words.num_embeddings, words.embedding_dim
    largest = (tokens * width - 1 - width) // (tokens + width)
    if not 1 <= rank <= largest:
        raise PruningError(
            f"An embedding rank of {rank} does not make this model smaller: its embedding table has {tokens:,} tokens "
            f"× {width} values, and the factors would have {factor_parameters(tokens, width, rank):,} parameters.",
            f"Give --embedding-rank a number from 1 to {largest}." if largest > 0 else "Leave --embedding-rank out.",
        )


def replace_embedding(model: PreTrainedModel, rank: int) -> LowRankEmbedding:
    """Replaces the model's table of word embeddings by a `LowRankEmbedding` with random weights; returns the new one.

    Raises:
        PruningError: `require_embedding_rank` raises it.
    """
    from toolchain.models.low_rank import LowRankEmbedding

    require_embedding_rank(model, rank)
    table: Any = model.get_input_embeddings()
    embedding = LowRankEmbedding(table.num_embeddings, table.embedding_dim, rank, table.padding_idx)
    model.set_input_embeddings(embedding)
    return embedding


def reshape(model: PreTrainedModel, shapes: Sequence[LayerShape], embedding_rank: int | None = None) -> None:
    """Gives every layer its shape in `shapes`, in place, so that the weights of a pruned model can be loaded.

    It does not matter which heads and neurons the function keeps, because loading replaces their weights.

    Args:
        model: The unpruned model.
        shapes: Shape of every layer, first to last.
        embedding_rank: Rank of a `LowRankEmbedding` that replaces the table of word embeddings; None keeps the table.

    Raises:
        CheckpointError: The model and `shapes` have different numbers of layers, or a layer has fewer heads or neurons
            than `shapes` states, or the embedding rank does not fit the model.
    """
    old_shapes = shapes_of(model)
    has_same_count = len(old_shapes) == len(shapes)
    if not has_same_count or any(
        new.heads > old.heads or new.ffn > old.ffn for new, old in zip(shapes, old_shapes, strict=True)
    ):
        raise CheckpointError(f"{SHAPES} does not fit the model's config.", "Prune the model again.")
    for index, shape in enumerate(shapes):
        keep_units(model, index, range(shape.heads), range(shape.ffn))
    if embedding_rank is not None:
        try:
            replace_embedding(model, embedding_rank)
        except PruningError as error:
            raise CheckpointError(
                f"{SHAPES} does not fit the model: {error.cause}", "Prune the model again."
            ) from error


def write_shapes(model: PreTrainedModel, folder: Path) -> None:
    """Writes the file `SHAPES` to `folder`: the shapes of the model's layers, and the rank of its embeddings."""
    body: dict[str, Any] = {"layers": [asdict(shape) for shape in shapes_of(model)]}
    if (rank := embedding_rank_of(model)) is not None:
        body["embedding_rank"] = rank
    (folder / SHAPES).write_text(json.dumps(body, indent=1) + "\n")


def read_shapes(folder: Path) -> PrunedShapes | None:
    """Returns the shapes stored in `folder`; None for an unpruned model, which has no file `SHAPES`.

    Raises:
        CheckpointError: The file `SHAPES` is unreadable or has an unknown format.
    """
    file = folder / SHAPES
    if not file.is_file():
        return None
    try:
        return decode(PrunedShapes, read_bytes(file))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", "Prune the model again.") from error


def _slice_linear(layer: nn.Module, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> nn.Linear:
    """Returns a copy of the linear `layer` with only the chosen outputs (`rows`) or inputs (`columns`)."""
    import torch

    assert isinstance(layer, torch.nn.Linear)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if rows is not None:
        weight, bias = weight[rows], bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    result = torch.nn.Linear(weight.shape[1], weight.shape[0])
    result.weight = torch.nn.Parameter(weight.clone())
    result.bias = torch.nn.Parameter(bias.clone())
    return result


def _replace_module(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)
