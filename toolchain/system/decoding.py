"""Decodes JSON that another program may have written (a file, or a line of a file) into typed values.

A type that `decode` reads is a frozen dataclass with the decorator `strict`. Its fields state what the JSON must hold,
and its `__post_init__` raises `ValueError` for values that contradict each other. So each decoded value is safe to use.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
SHOWN = 80  # maximum number of characters of a value in a message


def strict(kind: type[T]) -> type[T]:
    """Makes `decode` refuse unknown fields, values of another type, infinities and NaN in a dataclass."""
    settings = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
    kind.__pydantic_config__ = settings  # type: ignore[attr-defined]
    return kind


def decode(kind: type[T], text: str | bytes) -> T:
    """Returns the JSON text as a value of `kind`.

    Raises:
        ValueError: The text is not JSON, or does not fit the type. The message names the first wrong field.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(text)  # type: ignore[arg-type, no-any-return]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        shown = "" if first["type"] in ("missing", "json_invalid") else f" (it is {str(first['input'])[:SHOWN]!r})"
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{field}: {message}{shown}" if field else f"{message}{shown}") from None


def convert(kind: type[T], value: Any) -> T:
    """Returns a value of JSON types as a value of `kind`; see `decode`."""
    return decode(kind, json.dumps(value))


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)  # type: ignore[arg-type]
