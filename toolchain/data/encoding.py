"""Token arrays: the conversion of texts to the inputs of a session."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data.files import Text
from toolchain.data.labels import MULTI
from toolchain.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

TOKEN_TYPES = "token_type_ids"
LONG = 64  # characters per token of the limit; `Encoder` tokenises only the start of longer texts


class Tokens(list[int]):
    """The token ids of a text or pair.

    Attributes:
        types: The text, 0 or 1, that each token belongs to; empty if the tokenizer gives only zeros.
    """

    types: Sequence[int] = ()


@dataclass(frozen=True)
class Encoder:
    """Converts texts to token ids with a checkpoint's tokenizer.

    Attributes:
        folder: Folder of the tokenizer.
        tokenizer: The tokenizer, without padding, with truncation to `max_length`.
        names: Names of the model's inputs.
        pad_id: Token id for padding.
        max_length: Largest number of tokens of a text or pair.
        multi_label: Whether the model answers with sets of labels.
    """

    folder: Path
    tokenizer: Any
    names: tuple[str, ...]
    pad_id: int
    max_length: int
    multi_label: bool = False

    @classmethod
    def open(cls, folder: Path, names: Sequence[str], max_length: int) -> Encoder:
        """Reads tokenizer.json and config.json of an artifact.

        Args:
            folder: Folder of the artifact.
            names: Names of the model's inputs.
            max_length: Number of tokens to truncate to.

        Raises:
            CheckpointError: tokenizer.json is unreadable.
        """
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} cannot be read: {error}.", "Import the model again."
            ) from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        config = json.loads((folder / "config.json").read_text())
        pad, multi = config.get("pad_token_id") or 0, config.get("problem_type") == MULTI
        return cls(folder, tokenizer, tuple(names), pad, max_length, multi)

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Returns the token ids of each text or pair, with special tokens.

        Truncation shortens the longer text of a pair first.
        """
        starts = [self._start(text) if isinstance(text, str) else tuple(map(self._start, text)) for text in texts]
        found = []
        for encoding in self.tokenizer.encode_batch(starts):
            found.append(row := Tokens(encoding.ids))
            if any(encoding.type_ids):
                row.types = encoding.type_ids
        return found

    def _start(self, text: str) -> str:
        """Returns a start of the text that has the same first `max_length` tokens; the complete text if it is short.

        A tokenizer tokenises the complete text before it truncates, and needs hundreds of bytes per token. The tokens
        before a word do not depend on later words. So a start of more than 2 × `max_length` tokens is sufficient.
        """
        size = LONG * self.max_length
        while size < len(text):
            space = max(text.rfind(" ", size - LONG, size), text.rfind("\n", size - LONG, size))
            start = text[: space if space > 0 else size]
            encoding = self.tokenizer.encode(start)
            if len(encoding.overflowing) > 1:
                return start
            size *= 4
        return text


def pad(
    ids: Sequence[Sequence[int]], names: Sequence[str], pad_id: int, left: bool = False, width: int = 0
) -> dict[str, np.ndarray]:
    """Pads token ids to one batch.

    Args:
        ids: Token ids of each row. Rows of type `Tokens` may also have token types.
        names: Names of the arrays to return.
        pad_id: Token id for padding.
        left: Whether to pad on the left instead of the right.
        width: Smallest width of the arrays; a longer row widens them.

    Returns:
        Arrays by name, int64 [batch, width]: ids, attention mask and, if in `names`, token types. Rows without token
        types have zeros.
    """
    import numpy as np

    width = max(width, *(len(row) for row in ids))
    arrays = {name: np.zeros((len(ids), width), np.int64) for name in names}
    arrays["input_ids"][:] = pad_id
    for index, row in enumerate(ids):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        arrays["input_ids"][index, where] = row
        arrays["attention_mask"][index, where] = 1
        if isinstance(row, Tokens) and row.types and TOKEN_TYPES in arrays:
            arrays[TOKEN_TYPES][index, where] = row.types
    return arrays
