"""Vocabulary trimming: removes the tokens that a corpus does not need and renumbers the ids in every tokenizer file.

Only WordPiece vocabularies (Schuster and Nakajima 2012) can be trimmed; BERT applies WordPiece as a greedy longest
match. A word whose token is removed splits into shorter pieces. If all pieces of a word stay, the word splits as
before, because the removal of other tokens cannot create a longer match.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.data.encoding import Encoder
from toolchain.data.files import Text
from toolchain.errors import CheckpointError, DataError
from toolchain.system.decoding import decode_object, read_bytes

WORDPIECE = "WordPiece"
TEXTS = 1000  # number of texts tokenised at once

# Maps old token ids to new token ids.
NewIds = Mapping[int, int]


def tokens_to_keep(encoder: Encoder, texts: Iterable[Text]) -> list[int]:
    """Returns the ids of the tokens to keep, in ascending order.

    The function keeps the tokens of `texts`, the special and added tokens, every piece of one character, and every
    token that one-character pieces cannot spell. A word stays tokenisable if the vocabulary has a piece for each of
    its characters.

    Args:
        encoder: Encoder whose folder holds the tokenizer files.
        texts: The corpus.

    Raises:
        CheckpointError: The tokenizer is unreadable or not WordPiece.
        DataError: The texts contain no words.
    """
    tokenizer = _read(encoder.folder / "tokenizer.json")
    required_ids = _required_ids(encoder.folder, tokenizer)
    used_ids: set[int] = set()
    remaining_texts = iter(texts)
    while chunk := list(itertools.islice(remaining_texts, TEXTS)):
        used_ids.update(itertools.chain.from_iterable(encoder.encode(chunk)))
    if not used_ids - _special_ids(encoder.folder, tokenizer):
        raise DataError("The corpus has no words.", "Pass texts like those that the model will classify.")
    return sorted(used_ids | required_ids)


def trim(folder: Path, kept_ids: Sequence[int]) -> None:
    """Rewrites the tokenizer files and the config in `folder` for a smaller vocabulary.

    Args:
        folder: Folder of the tokenizer and the config.
        kept_ids: Ids of all tokens to keep; `kept_ids[i]` gets the new id i.

    Raises:
        CheckpointError: A tokenizer file is unreadable, or the tokenizer files contradict each other.
    """
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    tokenizer = _read(folder / "tokenizer.json")
    vocabulary = {token: new_ids[i] for token, i in tokenizer["model"]["vocab"].items() if i in new_ids}
    try:
        tokenizer["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        for token in tokenizer["added_tokens"]:
            token["id"] = vocabulary[token["content"]] = new_ids[token["id"]]
        tokenizer["post_processor"] = _renumber_post_processor(tokenizer.get("post_processor"), new_ids)
        if tokenizer.get("padding"):
            tokenizer["padding"]["pad_id"] = new_ids[tokenizer["padding"]["pad_id"]]
        _write(folder / "tokenizer.json", tokenizer)
        _renumber_other_files(folder, kept_ids, new_ids)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _contradiction_error(folder, f"{type(error).__name__}: {error}") from error
    loaded_vocabulary = Encoder.open(folder, (), 1).tokenizer.get_vocab()
    if loaded_vocabulary != vocabulary:
        raise _contradiction_error(
            folder, f"the tokenizer has {len(loaded_vocabulary)} tokens instead of {len(vocabulary)}"
        )


def _required_ids(folder: Path, tokenizer: Mapping[str, Any]) -> set[int]:
    """Returns the ids of the tokens that trimming keeps for every corpus."""
    model = tokenizer["model"]
    vocabulary: dict[str, int] = model["vocab"]
    prefix = model.get("continuing_subword_prefix") or ""
    ids = _special_ids(folder, tokenizer)
    for token, token_id in vocabulary.items():
        spellings = [(token[0], *(prefix + c for c in token[1:]))] if token else []
        if prefix and token.startswith(prefix) and token != prefix:
            spellings.append(tuple(prefix + c for c in token.removeprefix(prefix)))
        is_character = any(spelling == (token,) for spelling in spellings)
        if is_character or not all(piece in vocabulary for spelling in spellings for piece in spelling):
            ids.add(token_id)
    return ids


def _special_ids(folder: Path, tokenizer: Mapping[str, Any]) -> set[int]:
    """Returns the ids of tokens with a special role: special and added tokens, [UNK], padding.

    Raises `CheckpointError` if the tokenizer is not WordPiece.
    """
    model = tokenizer["model"]
    if model.get("type") != WORDPIECE:
        raise CheckpointError(
            f"Only {WORDPIECE} vocabularies can be trimmed, and the type of this tokenizer is "
            f"{model.get('type') or 'not stated'}. In a tokenizer of another type than {WORDPIECE}, the removal of a "
            "token also changes how words without that token are split.",
            "Run the command without --trim-vocab.",
        )
    ids = {token["id"] for token in tokenizer["added_tokens"]} | {model["vocab"][model["unk_token"]]}
    known_ids = ids | set(model["vocab"].values())
    for value in _token_ids(_read(folder / "config.json")).values():
        ids.update(i for i in (value if isinstance(value, list) else [value]) if i in known_ids)
    return ids


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}


def _renumber_post_processor(part: Any, new_ids: NewIds) -> Any:
    """Returns the `post_processor` of tokenizer.json, which adds special tokens to a text, with renumbered ids."""
    if part is None:
        return None
    kind = part["type"]
    if kind == "Sequence":
        return {
            **part,
            "processors": [_renumber_post_processor(processor, new_ids) for processor in part["processors"]],
        }
    if kind == "TemplateProcessing":
        special = {
            name: {**token, "ids": [new_ids[i] for i in token["ids"]]} for name, token in part["special_tokens"].items()
        }
        return {**part, "special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**part, **{name: [part[name][0], new_ids[part[name][1]]] for name in ("sep", "cls")}}
    if kind == "ByteLevel":
        return part
    raise ValueError(f"the post-processor has the unknown type {kind}")


def _renumber_other_files(folder: Path, kept_ids: Sequence[int], new_ids: NewIds) -> None:
    """Renumbers the ids in the config and in every tokenizer file except tokenizer.json."""
    config = _read(folder / "config.json")
    for key, value in _token_ids(config).items():
        config[key] = [new_ids[i] for i in value] if isinstance(value, list) else new_ids[value]
    _write(folder / "config.json", {**config, "vocab_size": len(kept_ids)}, indent=2)
    if (file := folder / "tokenizer_config.json").is_file():
        body, key = _read(file), "added_tokens_decoder"
        if key in body:
            body[key] = {str(new_ids[int(number)]): token for number, token in body[key].items()}
        _write(file, body, indent=2)
    if (file := folder / "added_tokens.json").is_file():
        _write(file, {token: new_ids[number] for token, number in _read(file).items()}, indent=2)
    vocabulary_file = folder / "vocab.txt"
    if vocabulary_file.is_file():  # each line holds one token, and the line number, from 0, is the token's id
        tokens = vocabulary_file.read_text(encoding="utf-8").split("\n")
        vocabulary_file.write_text(
            "".join(f"{tokens[i]}\n" for i in kept_ids if i < len(tokens)), encoding="utf-8", newline="\n"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return decode_object(read_bytes(path))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Import the model again.") from error


def _write(path: Path, body: Mapping[str, Any], indent: int | None = None) -> None:
    separators = (",", ":") if indent is None else None
    text = json.dumps(body, ensure_ascii=False, indent=indent, separators=separators)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _contradiction_error(folder: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer files in {folder} contradict each other: {problem}.",
        "Save the tokenizer again with tokenizer.save_pretrained(DIR), and import the model again.",
    )
