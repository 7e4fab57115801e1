"""Training examples of encoded rows, and longer texts: two training rows joined, with masked tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.system.decoding import decode_object, read_bytes
from toolchain.training.loop import Examples


def encode_rows(data: Data, rows: Sequence[int], encoder: Encoder) -> Examples:
    """Returns rows of the data with their token ids and labels."""
    selection = data.select(rows)
    ids = encoder.encode(selection.texts)
    return Examples(ids, selection.targets(ids))


@dataclass(frozen=True)
class AugmentedExamples(Examples):
    """Training examples: the original rows and, in each epoch, new random pairs of rows with masked tokens.

    The teacher was trained on the original rows, so it is certain about nearly all of them. The teacher's logits for
    masked and longer texts contain more information than its logits for the original rows. Jiao et al. 2020,
    "TinyBERT", also distil on augmented data.

    Attributes:
        pairs: Number of pairs of rows in each epoch. A pair joins the texts of two rows and has the label of the second
            row.
        mask: Id of the mask token; None to mask no tokens in the pairs of rows.
        mask_share: Probability of masking a token in a pair of rows. The mask token replaces each masked token. The
            first and the last token of a pair of rows always stay unmasked.
        seed: Seed of the random choice of pairs of rows and of masked tokens.
        max_length: Largest number of tokens of a pair of rows.
    """

    pairs: int
    mask: int | None
    mask_share: float
    seed: int
    max_length: int

    def of_epoch(self, epoch: int) -> Examples:
        """Returns the original rows and the random pairs of rows for this epoch."""
        rng = random.Random(f"{self.seed} {epoch}")

        def mask_tokens(ids: list[int]) -> list[int]:
            return [token if self.mask is None or rng.random() >= self.mask_share else self.mask for token in ids]

        count = len(self.ids)
        row_pairs = [(rng.randrange(count), rng.randrange(count)) for _ in range(self.pairs)]
        # The first and the last token are special tokens of the tokenizer, which stay unmasked.
        pair_ids = [
            [first_ids[0], *mask_tokens([*first_ids[1:-1], *second_ids[1:-1]][: self.max_length - 2]), second_ids[-1]]
            for first_ids, second_ids in (
                (self.ids[first_row], self.ids[second_row]) for first_row, second_row in row_pairs
            )
        ]
        labels = [*self.labels, *(self.labels[second_row] for _, second_row in row_pairs)]
        return Examples([*self.ids, *pair_ids], labels)


def mask_token(folder: Path, encoder: Encoder) -> int | None:
    """Returns the id of the mask token; None if the tokenizer has no mask token."""
    file = folder / "tokenizer_config.json"
    token = decode_object(read_bytes(file)).get("mask_token") if file.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    token_id: int | None = encoder.tokenizer.token_to_id(token) if isinstance(token, str) else None
    return token_id
