"""Tokenizers of checkpoints: loading with the checks that transformers omits, and saving as tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolchain.errors import CheckpointError, first_line
from toolchain.models.checkpoints import SENTENCEPIECE_FILES
from toolchain.system.decoding import decode_object, read_bytes
from toolchain.system.extras import install_hint, unmet_requirement
from toolchain.system.files import writing_in_rust
from toolchain.system.panics import convert_panics

TOKENIZER_JSON = "tokenizer.json"
# transformers 5 writes the class name `TokenizersBackend` for a tokenizer that tokenizer.json describes completely.
# transformers 4 refuses the class name `TokenizersBackend`. Both releases know the other name of this class.
_GENERIC_CLASS, _PORTABLE_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a checkpoint with the installed release of transformers.

    If the folder has no tokenizer.json, transformers converts the vocabulary files of the tokenizer's class.

    Raises:
        CheckpointError: A file of the tokenizer is missing or unreadable, or a package that reads it is not installed.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_converted = not (folder / TOKENIZER_JSON).is_file()
    if is_converted:
        _check_sentencepiece(folder)
    tokenizer_class = PreTrainedTokenizerFast if _class_name(folder) == _GENERIC_CLASS else AutoTokenizer
    try:
        with convert_panics():
            tokenizer = tokenizer_class.from_pretrained(
                folder, use_fast=True, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # tokenizers and transformers raise errors of many classes
        raise _loading_error(folder, error) from error
    if is_converted:
        _require_vocabulary_files(folder, tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves a tokenizer in `folder`, with a class name that transformers 4 and 5 know.

    Raises:
        CheckpointError: The tokenizer's class cannot write tokenizer.json.
        OSError: The disk refuses a file.
    """
    with writing_in_rust(folder):
        tokenizer.save_pretrained(folder)
    if _class_name(folder) == _GENERIC_CLASS:
        file = folder / "tokenizer_config.json"
        config = {**decode_object(read_bytes(file)), "tokenizer_class": _PORTABLE_CLASS}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not (folder / TOKENIZER_JSON).is_file():
        raise CheckpointError(
            f"The tokenizer class {type(tokenizer).__name__} cannot write {TOKENIZER_JSON}.",
            "Convert the tokenizer to a fast tokenizer.",
        )


def _check_sentencepiece(folder: Path) -> None:
    """Checks the folder's SentencePiece model, if there is one, and the package that reads it.

    Without these checks, transformers 5 reads the file as another format, and its error names another package.
    """
    file = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    if file is None:
        return
    if cause := unmet_requirement("sentencepiece"):
        raise CheckpointError(
            f"The tokenizer in {folder} is a SentencePiece model ({file.name}), and {cause}.",
            install_hint("sentencepiece"),
        )
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file} is not a SentencePiece model.", "Download the checkpoint again.") from error


def _loading_error(folder: Path, error: Exception) -> CheckpointError:
    """Returns the error for a tokenizer that transformers cannot load; `error` is the error of transformers."""
    from transformers import __version__
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = _class_name(folder)
    if name not in (None, _GENERIC_CLASS) and not (isinstance(name, str) and tokenizer_class_from_name(name)):
        return CheckpointError(
            f"The tokenizer in {folder} has the class {name!r}, which transformers {__version__} does not know.",
            f"Save the tokenizer as {TOKENIZER_JSON}, and set tokenizer_class in tokenizer_config.json to "
            f"{_PORTABLE_CLASS}.",
        )
    problem = f"{folder} has no {TOKENIZER_JSON}, and transformers cannot convert its other tokenizer files"
    if (folder / TOKENIZER_JSON).is_file():
        problem = f"The tokenizer in {folder} cannot be loaded"
    cause = first_line(error).rstrip(".:")
    return CheckpointError(f"{problem}: {cause}.", "Save the tokenizer beside the model again.")


def _require_vocabulary_files(folder: Path, tokenizer: Any) -> None:
    """Checks that the folder has every vocabulary file of the tokenizer's class.

    Without its vocabulary file, a class of transformers 5 gives a tokenizer that knows only the special tokens.
    """
    names = [name for key, name in tokenizer.vocab_files_names.items() if key != "tokenizer_file"]
    if missing_names := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_JSON}, and no {missing_names[0]}, which {type(tokenizer).__name__} needs "
            "instead.",
            "Save the tokenizer beside the model again.",
        )


def _class_name(folder: Path) -> Any:
    """Returns the name of the tokenizer's class in `folder`; None if the folder states no class."""
    try:
        return decode_object(read_bytes(folder / "tokenizer_config.json")).get("tokenizer_class")
    except (OSError, ValueError):  # transformers itself reports a damaged file
        return None
