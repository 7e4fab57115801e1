"""Comparison of a tokenizer graph with the checkpoint's tokenizer on difficult texts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from toolchain import passes
from toolchain.data.inputs import Encoder
from toolchain.errors import ShippingError
from toolchain.ship.tokenizer_graph import token_model
from toolchain.ship.tokenizer_graph.characters import WITHOUT
from toolchain.ship.tokenizer_graph.hard import texts as hard_texts
from toolchain.ship.tokenizer_graph.session import TextSession

BATCH = 32
SHOWN = 3  # differing texts that an error quotes


def compare(encoder: Encoder, texts: Sequence[str], file: Path | None = None, multiple: int = 1) -> int:
    """Builds the tokenizer graph and compares its tokens with the checkpoint's on difficult texts and `texts`.

    Args:
        encoder: The checkpoint's tokenizer.
        texts: Additional texts.
        file: Path to write the graph to; None to discard it.
        multiple: The width of the model's inputs is a multiple of this number, or `max_length`.

    Returns:
        Number of compared texts.

    Raises:
        ShippingError: The graph cannot express the tokenizer, or it splits a text differently.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = file or Path(scratch) / "tokenizer.onnx"
        passes.write(token_model(encoder, multiple), place)
        return _compared(encoder, [*hard_texts(), *texts], place)


def _compared(encoder: Encoder, asked: Sequence[str], file: Path) -> int:
    session = TextSession(file, 1)
    found: list[list[int]] = []
    for start in range(0, len(asked), BATCH):
        arrays = session.run(asked[start : start + BATCH])
        rows = zip(arrays["input_ids"], arrays["attention_mask"], strict=True)
        found += [ids[mask == 1].tolist() for ids, mask in rows]
    session.close()
    wanted = encoder.encode(asked)
    differ = [i for i, ids in enumerate(found) if ids != list(wanted[i])]
    if differ:
        shown = "; ".join(_told(encoder, asked[i], wanted[i], found[i]) for i in differ[:SHOWN])
        raise ShippingError(
            f"In the graph, the tokenizer splits {len(differ)} of {len(asked)} texts otherwise than the checkpoint's: "
            f"{shown}.",
            WITHOUT,
        )
    return len(asked)


def _told(encoder: Encoder, text: str, wanted: Sequence[int], found: Sequence[int]) -> str:
    """Returns a summary of the text with both splits around the first token that differs."""
    both = [[encoder.tokenizer.id_to_token(token) or f"id {token}" for token in ids] for ids in (wanted, found)]
    first = next((i for i, pair in enumerate(zip(*both, strict=False)) if pair[0] != pair[1]), min(map(len, both)))
    start = max(0, first - 1)
    want, got = (" ".join(tokens[start : first + 4]) or "nothing" for tokens in both)
    return f"{text[:60]!r}, {want!r} there and {got!r} in the graph"
