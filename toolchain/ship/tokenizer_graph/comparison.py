"""Compares a tokenizer graph with the checkpoint's tokenizer on difficult texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolchain import passes
from toolchain.data.encoding import Encoder
from toolchain.errors import ShippingError
from toolchain.ship.tokenizer_graph import token_model
from toolchain.ship.tokenizer_graph.characters import SHIP_WITHOUT_HINT
from toolchain.ship.tokenizer_graph.difficult_texts import texts as difficult_texts
from toolchain.ship.tokenizer_graph.session import TextSession
from toolchain.system.files import temporary_folder

BATCH = 32
EXAMPLES = 3  # an error message quotes at most this many texts


def compare(encoder: Encoder, texts: Sequence[str], file: Path | None = None, multiple: int = 1) -> int:
    """Builds the tokenizer graph and compares it with the checkpoint's tokenizer on difficult texts and on `texts`.

    Args:
        encoder: The checkpoint's tokenizer.
        texts: Additional texts.
        file: Path for the tokenizer graph; None to delete the graph after the comparison.
        multiple: The graph rounds the inputs' width up to a multiple of this number, at most to `max_length`.

    Returns:
        Number of compared texts.

    Raises:
        ShippingError: An ONNX graph cannot express the tokenizer, or splits a text differently from the tokenizer.
    """
    with temporary_folder() as scratch:
        path = file or scratch / "tokenizer.onnx"
        passes.write(token_model(encoder, multiple), path)
        return _compare_tokens(encoder, [*difficult_texts(), *texts], path)


def _compare_tokens(encoder: Encoder, texts: Sequence[str], file: Path) -> int:
    session = TextSession(file, 1)
    actual: list[list[int]] = []
    for start in range(0, len(texts), BATCH):
        arrays = session.run(texts[start : start + BATCH])
        rows = zip(arrays["input_ids"], arrays["attention_mask"], strict=True)
        actual += [ids[mask == 1].tolist() for ids, mask in rows]
    session.close()
    expected = encoder.encode(texts)
    differing = [i for i, ids in enumerate(actual) if ids != list(expected[i])]
    if differing:
        examples = [_describe_difference(encoder, texts[i], expected[i], actual[i]) for i in differing[:EXAMPLES]]
        raise ShippingError(
            f"The tokenizer in the graph splits {len(differing)} of {len(texts)} texts differently from the "
            f"checkpoint's tokenizer: {'; '.join(examples)}.",
            SHIP_WITHOUT_HINT,
        )
    return len(texts)


def _describe_difference(encoder: Encoder, text: str, expected: Sequence[int], actual: Sequence[int]) -> str:
    """Returns the text with the first tokens that differ between the checkpoint's tokenizer and the graph."""
    splits = [[encoder.tokenizer.id_to_token(token) or f"id {token}" for token in ids] for ids in (expected, actual)]
    first = next((i for i, pair in enumerate(zip(*splits, strict=False)) if pair[0] != pair[1]), min(map(len, splits)))
    start = max(0, first - 1)
    original, graph = (" ".join(tokens[start : first + 4]) or "nothing" for tokens in splits)
    return f"{text[:60]!r}, split into {original!r} by the checkpoint's tokenizer and into {graph!r} by the graph"
