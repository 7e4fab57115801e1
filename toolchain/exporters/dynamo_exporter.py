"""Export with PyTorch's exporter "dynamo", which translates the operators that ``torch.export`` records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.exporters import INPUT_AXES
from toolchain.exporters.dynamo_graph import simplify
from toolchain.exporters.preparation import OUTPUT, example_inputs, prepare

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def write_onnx(model: PreTrainedModel, target: Path, opset: int, names: Sequence[str]) -> None:
    """Records the operators of an example batch and writes the graph to `target`; see `exporters.to_onnx`."""
    import torch

    with (
        prepare(model, "PyTorch's dynamo exporter", "Use --exporter torch."),
        _short_masks(),
        _separate_attention_operators(),
    ):
        program = torch.onnx.export(
            model,
            (),
            kwargs=example_inputs(names),
            input_names=list(names),
            output_names=[OUTPUT],
            dynamic_shapes=dict.fromkeys(names, INPUT_AXES),
            opset_version=opset,
            dynamo=True,
            optimize=False,  # `simplify` chooses the optimisations itself, because the passes must recognise the result
            verbose=False,
        )
        assert program is not None  # only the tracing exporter returns None
        simplify(program.model)
    program.save(target)  # like the tracing exporter, writes a second file if the model exceeds 2 GB


@contextlib.contextmanager
def _short_masks() -> Iterator[None]:
    """While the context is open, transformers 5 computes masks of full attention with few operators.

    The exporter records all operators of a mask. By default, transformers 5 looks up the mask of each pair of tokens by
    its position, and ONNX Runtime does not recognise such masks. transformers 4 computes short masks by itself.
    """
    from transformers import masking_utils

    if not hasattr(masking_utils, "bidirectional_mask_function"):
        yield
        return
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    long_mask = masks["eager"]

    def mask(*, mask_function: Any, attention_mask: torch.Tensor | None, **settings: Any) -> Any:
        if mask_function is masking_utils.bidirectional_mask_function and attention_mask is not None:
            return _full_attention_mask(attention_mask, **settings)
        return long_mask(mask_function=mask_function, attention_mask=attention_mask, **settings)

    masks["eager"] = mask
    try:
        yield
    finally:
        del masks["eager"]


def _full_attention_mask(
    mask: torch.Tensor, batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype, **settings: Any
) -> torch.Tensor:
    """Returns a mask of shape [batch, 1, queries, keys]: the lowest float for padding, and 0 for other tokens.

    ONNX Runtime recognises exactly these operators, because transformers 4 uses them.

    Args:
        mask: The attention mask of shape [batch, keys], which is 0 for padding.
        batch_size: Number of rows.
        q_length: Number of queries.
        kv_length: Number of keys.
        dtype: Type of the result.
        **settings: Other settings of transformers, which do not change the mask.
    """
    import torch

    row = mask.unsqueeze(1).unsqueeze(2)
    is_padding = 1 - row.expand(batch_size, 1, q_length, kv_length).to(dtype)
    return is_padding.masked_fill(is_padding.to(torch.bool), torch.finfo(dtype).min)


@contextlib.contextmanager
def _separate_attention_operators() -> Iterator[None]:
    """While the context is open, PyTorch's function for attention computes attention by separate operators.

    transformers 4 chooses this function when it creates the model, and keeps it even if a caller requests eager
    attention later. ONNX Runtime does not recognise the operators that the exporter writes for this function.
    """
    from torch.nn import functional

    joint_operator = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = joint_operator


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **settings: Any
) -> torch.Tensor:
    """Returns the attention of an encoder, without dropout.

    Args:
        query: The queries, of shape [batch, heads, tokens, head size].
        key: The keys, of the same shape.
        value: The values, of the same shape.
        attn_mask: Addends of the scores, which broadcast to [batch, heads, tokens, tokens].
        **settings: `scale` is the factor of the scores. Other settings do not change the result in an encoder.
    """
    import torch

    scale = settings.get("scale") or query.shape[-1] ** -0.5
    scores = query @ key.transpose(-2, -1) * scale
    weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
    return torch.matmul(weights, value)
