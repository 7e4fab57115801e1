"""Decodes JSON that another program may have written (a file, or a line of a file) into typed values.

`decode` converts JSON to a frozen dataclass that has the decorator `strict`. The dataclass's fields state which values
the JSON must hold, and `__post_init__` raises `ValueError` for values that contradict each other. So the code that
calls `decode` can use the decoded value without further checks.

Every function here has bounds: a file has at most `MAX_BYTES` bytes, lists and objects nest at most 200 deep (the limit
of pydantic's parser), and an integer has at most `MAX_DIGITS` digits. The annotated types `Line`, `Note`, `Count` and
`Plain` add bounds to the fields of a dataclass or of a typed dict.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from toolchain.system.escaping import DIRECTION

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import CoreSchema

T = TypeVar("T")
SHOWN = 80  # an error message shows at most this many characters of a wrong value
MAX_BYTES = 256 << 20
MAX_DIGITS = 300  # every integer of `MAX_DIGITS` digits fits into a float
_LONG_DIGITS = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))
# A string that does not end matches as well: if it did not, the search would begin again at each of its quotes.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.?)*+"?|\d{%d}' % (MAX_DIGITS + 1), re.S)
# Control characters, and the characters that change the direction of text or end a line
_CONTROL = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029{DIRECTION}]")


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


@dataclass(frozen=True)
class Check:
    """A check of a decoded field, for use in `Annotated`: pydantic calls it with the value after its own checks."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.function, handler(source))


@dataclass(frozen=True)
class _PlainCheck:
    """Checks a value with its type and with `_check_plain`, and returns it with the keys in the order of the file."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        from pydantic_core import core_schema

        def check(value: Any, check_type: Callable[[Any], Any]) -> Any:
            _check_plain(value)
            check_type(value)
            return value

        return core_schema.no_info_wrap_validator_function(check, handler(source))


def check_line(text: str) -> str:
    """Returns a text that has at most 1000 characters and no control character.

    Raises:
        ValueError: The text is longer, or has a control character.
    """
    if len(text) > 1000 or _CONTROL.search(text):
        raise ValueError("the text has more than 1000 characters, or a control character")
    return text


def _check_name(text: str) -> str:
    if not 0 < len(text) <= 200 or text in (".", "..") or "/" in text or "\\" in text or _CONTROL.search(text):
        raise ValueError("the name is empty, is longer than 200 characters, or has a character that no name has")
    return text


def _clean_note(text: str) -> str:
    if len(text) > 100_000:
        raise ValueError("the text has more than 100000 characters")
    return _CONTROL.sub(lambda match: match[0] if match[0] in "\n\t" else "\ufffd", text)


def _check_count(number: int) -> int:
    if not 0 <= number < 1 << 63:
        raise ValueError("the number is negative, or has more than 63 bits")
    return number


def _check_amount(number: float) -> float:
    # A quotient of two amounts, or of a count and an amount, is finite.
    if number and not 1e-9 <= number <= 1e15:
        raise ValueError("the number is not 0, and outside the range from 1e-9 to 1e15")
    return number


def _check_plain(value: Any) -> None:
    """Requires that a value has at most 6 levels and 200,000 parts, and that its texts and numbers are harmless."""
    level, count = [value], 0
    for _ in range(7):
        count += len(level)
        if count > 200_000:
            raise ValueError("the value has more than 200000 parts")
        parts: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                parts += [*part, *part.values()]
            elif isinstance(part, list | tuple):
                parts += part
            elif isinstance(part, str):
                check_line(part)
            elif not isinstance(part, float | int | None) or abs(part or 0) >= 1 << 63 or not math.isfinite(part or 0):
                raise ValueError("a number is infinite, or has more than 64 bits")
        if not parts:
            return
        level = parts
    raise ValueError("the value has more than 6 levels")


Name = Annotated[str, Check(_check_name)]  # the name of a folder: no path separator, at most 200 characters
Line = Annotated[str, Check(check_line)]  # a name: at most 1000 characters, and no control character
Note = Annotated[str, Check(_clean_note)]  # a message: at most 100,000 characters; replaces control characters
Count = Annotated[int, Check(_check_count)]  # 0 to 2^63 - 1
Amount = Annotated[float, Check(_check_amount)]  # 0, or from 10^-9 to 10^15
# For a typed dict with unknown keys, and for open dicts: bounds for levels, parts, texts and numbers.
Plain = _PlainCheck()


def open_record(kind: type[T]) -> type[T]:
    """Decorates a typed dict so that `decode` checks its known keys as `strict` does, and keeps unknown keys.

    Annotate a field of this type with `Plain`, which checks the values of unknown keys.
    """
    settings = {"extra": "allow", "strict": True, "allow_inf_nan": False}
    kind.__pydantic_config__ = settings  # type: ignore[attr-defined]
    return kind


def decode(kind: type[T], text: str | bytes) -> T:
    """Converts JSON text to a value of the type `kind`.

    Raises:
        ValueError: The text is not JSON, or does not fit the type. The error message names the first wrong field.
    """
    from pydantic import ValidationError

    _check_text(text)
    try:
        return _adapter(kind).validate_json(text)  # type: ignore[arg-type, no-any-return]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))[: 2 * SHOWN]
        shown = "" if first["type"] in ("missing", "json_invalid") else f" (it is {str(first['input'])[:SHOWN]!r})"
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{field}: {message}{shown}" if field else f"{message}{shown}") from None
    except (RecursionError, MemoryError) as error:
        raise ValueError("the JSON text is too large, or nests too deep") from error


def decode_object(text: str | bytes) -> dict[str, Any]:
    """Converts JSON text to a dict, for files of other programs whose keys are not known, such as config.json.

    Raises:
        ValueError: The text is not JSON, or not an object.
    """
    from pydantic_core import from_json

    _check_text(text)
    try:
        value = from_json(text)
    except (RecursionError, MemoryError) as error:
        raise ValueError("the JSON text is too large, or nests too deep") from error
    if not isinstance(value, dict):
        raise ValueError("the JSON value is not an object")
    return value


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file.

    Raises:
        ValueError: The file has more than `MAX_BYTES` bytes.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"the file has more than {MAX_BYTES >> 20} MiB")
    return content


def _check_text(text: str | bytes) -> None:
    if len(text) > MAX_BYTES:
        raise ValueError(f"the JSON text has more than {MAX_BYTES >> 20} MiB")
    content = text.encode(errors="replace") if isinstance(text, str) else text
    if _LONG_DIGITS.search(content) and any(match[0][0] != ord('"') for match in _TOKEN.finditer(content)):
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")


def convert(kind: type[T], value: Any) -> T:
    """Converts a value of JSON types, such as a dict, to a value of the type `kind`, with the checks of `decode`."""
    return decode(kind, json.dumps(value))


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)  # type: ignore[arg-type]
