"""Token arrays: the conversion of texts to the inputs of a session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data.entities import kind_of_entity
from toolchain.data.files import WORD, Text, group_texts
from toolchain.data.labels import SINGLE, TOKENS, Tokens, task_of
from toolchain.errors import CheckpointError, first_line
from toolchain.system.decoding import decode_object, read_bytes
from toolchain.system.panics import convert_panics

if TYPE_CHECKING:
    import numpy as np

REQUIRED, TOKEN_TYPES = ("input_ids", "attention_mask"), "token_type_ids"
# `Encoder` first tokenises a prefix of a long text, with at most `CHARACTERS_PER_TOKEN` × `max_length` characters.
CHARACTERS_PER_TOKEN = 64
# `Encoder` tokenises about this number of characters at a time, because an encoding has hundreds of bytes per token.
BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Encoder:
    """Converts texts to token ids with a checkpoint's tokenizer.

    Attributes:
        folder: Folder of the tokenizer.
        tokenizer: The tokenizer, without padding, with truncation to `max_length`.
        names: Names of the model's inputs.
        pad_id: Token id for padding.
        max_length: Largest number of tokens of a text or pair.
        task: Task of the model, one of `toolchain.data.labels.TASKS`.
        padding_sides: Sides on which the model supports padding: ``right`` and, for most models, ``left``. A model with
            local attention (ModernBERT) supports only ``right``. With padding on the left, the first position of a row
            holds padding. With local attention, this position cannot attend to a text that is far away, and the
            classifier may read this position.
        outside: Index of the label for a word outside of all entities, in token classification.
    """

    folder: Path
    tokenizer: Any
    names: tuple[str, ...]
    pad_id: int
    max_length: int
    task: str = SINGLE
    padding_sides: tuple[str, ...] = ("right", "left")
    outside: int = 0

    @classmethod
    def open(cls, folder: Path, names: Sequence[str], max_length: int) -> Encoder:
        """Reads tokenizer.json and config.json of an artifact.

        Args:
            folder: Folder of the artifact.
            names: Names of the model's inputs.
            max_length: Largest number of tokens of a text or pair; the encoder truncates longer texts.

        Raises:
            CheckpointError: tokenizer.json is unreadable.
        """
        tokenizer = open_tokenizer(folder / "tokenizer.json", max_length)
        try:
            config = decode_object(read_bytes(folder / "config.json"))
            pad, task, outside = _pad_id(config), task_of(config), _outside(config)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'} cannot be read: {error}.", "Import the model again."
            ) from error
        sides = ("right",) if config.get("local_attention") else ("right", "left")
        return cls(folder, tokenizer, tuple(names), pad, max_length, task, sides, outside)

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Returns the token ids of each text or pair, with special tokens.

        Truncation shortens the longer text of a pair first.

        Raises:
            CheckpointError: The tokenizer fails on a text.
        """
        with _translate_errors(f"The tokenizer in {self.folder} fails on a text"):
            encodings = self._encodings(texts)
            return [self._tokens_of(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _tokens_of(self, text: Text, encoding: Any) -> Tokens:
        tokens = Tokens(encoding.ids)
        if any(encoding.type_ids):
            tokens.types = encoding.type_ids
        if self.task == TOKENS:
            first_text = text if isinstance(text, str) else text[0]
            tokens.spans = _find_spans(first_text, encoding)
            tokens.words = _find_words(first_text, tokens.spans)
            tokens.outside = self.outside
        return tokens

    def _encodings(self, texts: Sequence[Text]) -> Iterator[Any]:
        """Yields the encoding of each text or pair, and holds the encodings of only a few texts in memory."""
        cut_texts = (
            self._cut_text(text) if isinstance(text, str) else (self._cut_text(text[0]), self._cut_text(text[1]))
            for text in texts
        )
        # Only token classification needs the places of the tokens in the text, and `encode_batch_fast` leaves them out.
        encode_batch = self.tokenizer.encode_batch if self.task == TOKENS else self.tokenizer.encode_batch_fast
        for group in group_texts(cut_texts, len(texts), BATCH_CHARACTERS):
            yield from encode_batch(group)

    def _cut_text(self, text: str) -> str:
        """Returns the text, or a shorter prefix of the text that gives the same first `max_length` tokens.

        The prefix saves memory: a tokenizer tokenises a complete text before truncation, and needs hundreds of bytes
        per token. A cut at the end of the prefix can change the tokens of the last word, but not of earlier words.
        A prefix is long enough if truncation splits its tokens into at least three parts. Only the first part is
        used. The second part is a safety margin between the first part and the cut.
        """
        size = CHARACTERS_PER_TOKEN * self.max_length
        while size < len(text):
            space = max(
                text.rfind(" ", size - CHARACTERS_PER_TOKEN, size), text.rfind("\n", size - CHARACTERS_PER_TOKEN, size)
            )
            cut_text = text[: space if space > 0 else size]
            encoding = self.tokenizer.encode(cut_text)
            if len(encoding.overflowing) > 1:
                return cut_text
            size *= 4
        return text


def open_tokenizer(file: Path, max_length: int) -> Any:
    """Returns the tokenizer of a tokenizer.json, without padding and with truncation to `max_length` tokens.

    Raises:
        CheckpointError: The file is unreadable.
    """
    from tokenizers import Tokenizer

    with _translate_errors(f"{file} cannot be read"):
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
    return tokenizer


@contextmanager
def _translate_errors(problem: str) -> Iterator[None]:
    """Converts the errors and panics of the package tokenizers to `CheckpointError`; `problem` begins its sentence."""
    try:
        with convert_panics():
            yield
    except Exception as error:  # the package tokenizers raises plain Exception objects
        raise CheckpointError(f"{problem}: {first_line(error)}.", "Import the model again.") from error


def _pad_id(config: Mapping[str, Any]) -> int:
    """Returns the token id for padding; raises `ValueError` if it is no token id."""
    pad_id = config.get("pad_token_id") or 0
    if type(pad_id) is not int or not 0 <= pad_id < 1 << 31:
        raise ValueError(f"the pad_token_id {pad_id!r} is not a token id")
    return pad_id


def _outside(config: Mapping[str, Any]) -> int:
    """Returns the index of the first label that marks no entity; 0 without such a label.

    Raises `ValueError` if `id2label` does not map indices to names.
    """
    names = config.get("id2label") or {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("id2label does not map indices to names")
    return next((int(index) for index, name in names.items() if kind_of_entity(name) is None), 0)


def _find_spans(text: str, encoding: Any) -> list[tuple[int, int, int]]:
    """Returns the words of the tokenizer as in `Tokens.spans`.

    A word begins at a token with another word id than the token before, or after a space. Some tokenizers have a token
    for the space before a word; that token is then the first token of the word.

    Args:
        text: The text.
        encoding: The text's `tokenizers.Encoding`, with special tokens.
    """
    spans: list[list[int]] = []
    last_word, last_end = None, 0
    for position, (start, end) in enumerate(encoding.offsets):
        if encoding.sequence_ids[position] != 0:
            continue
        begin = end - len(text[start:end].lstrip())
        word = encoding.word_ids[position]
        if not spans or word != last_word or text[last_end:begin].strip() != text[last_end:begin]:
            spans.append([position, begin, end])
        elif spans[-1][1] == spans[-1][2]:  # so far, the word has only the token of the space before it
            spans[-1][1:] = [begin, end]
        else:
            spans[-1][2] = end
        last_word, last_end = word, end
    return [(position, begin, end) for position, begin, end in spans if begin < end]


def _find_words(text: str, spans: Sequence[tuple[int, int, int]]) -> list[int | None]:
    """Returns the position of the first token of each word between spaces; None for a word without a token.

    Args:
        text: The text.
        spans: The words of the tokenizer, as in `Tokens.spans`.
    """
    words: list[int | None] = []
    index = 0
    for match in WORD.finditer(text):
        while index < len(spans) and spans[index][2] <= match.start():
            index += 1
        is_found = index < len(spans) and spans[index][1] < match.end()
        words.append(spans[index][0] if is_found else None)
    return words


def pad(
    ids: Sequence[Sequence[int]], names: Sequence[str], pad_id: int, left_padding: bool = False, width: int = 0
) -> dict[str, np.ndarray]:
    """Pads the token ids of several rows to one batch.

    Args:
        ids: Token ids of each row. Rows of type `Tokens` may also have token types.
        names: Names of the arrays to return.
        pad_id: Token id for padding.
        left_padding: Whether to pad on the left instead of the right.
        width: Smallest width of the arrays; a longer row widens them.

    Returns:
        Arrays by name, of dtype int64 and shape [batch, width]: token ids, attention mask and, if in `names`, token
        types. The token types are 0 in rows without token types.
    """
    import numpy as np

    width = max(width, *(len(row) for row in ids))
    arrays = {name: np.zeros((len(ids), width), np.int64) for name in names}
    arrays["input_ids"][:] = pad_id
    for index, row in enumerate(ids):
        span = slice(width - len(row), width) if left_padding else slice(0, len(row))
        arrays["input_ids"][index, span] = row
        arrays["attention_mask"][index, span] = 1
        if isinstance(row, Tokens) and row.types and TOKEN_TYPES in arrays:
            arrays[TOKEN_TYPES][index, span] = row.types
    return arrays
