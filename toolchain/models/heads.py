"""The class of transformers that loads a model with its kind of head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.data.labels import TOKEN_HEAD


def auto_class(architectures: Sequence[str] | None) -> Any:
    """Returns the auto class of transformers that loads a model with these `architectures` of its config.json."""
    import transformers

    has_token_head = any(str(name).endswith(TOKEN_HEAD) for name in architectures or ())
    return (
        transformers.AutoModelForTokenClassification
        if has_token_head
        else transformers.AutoModelForSequenceClassification
    )
