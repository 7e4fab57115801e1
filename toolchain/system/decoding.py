"""Decodes JSON that another program may have written (a file, or a line of a file) into typed values.

`decode` converts JSON to a frozen dataclass that has the decorator `strict`. The dataclass's fields state which values
the JSON must hold, and `__post_init__` raises `ValueError` for values that contradict each other. So the code that
calls `decode` can use the decoded value without further checks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
SHOWN = 80  # an error message shows at most this many characters of a wrong value


def strict(kind: type[T]) -> type[T]:
    """Decorates a dataclass so that `decode` refuses unknown fields, values of the wrong type, infinities and NaN."""
    settings = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
    kind.__pydantic_config__ = settings  # type: ignore[attr-defined]
    return kind


def partial(kind: type[T]) -> type[T]:
    """Decorates a dataclass as `strict` does, but `decode` leaves out fields of the JSON that the dataclass lacks."""
    settings = {"extra": "ignore", "strict": True, "allow_inf_nan": False}
    kind.__pydantic_config__ = settings  # type: ignore[attr-defined]
    return kind


def decode(kind: type[T], text: str | bytes) -> T:
    """Converts JSON text to a value of the type `kind`.

    Raises:
        ValueError: The text is not JSON, or does not fit the type. The error message names the first wrong field.
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
    """Converts a value of JSON types, such as a dict, to a value of the type `kind`, with the checks of `decode`."""
    return decode(kind, json.dumps(value))


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)  # type: ignore[arg-type]
