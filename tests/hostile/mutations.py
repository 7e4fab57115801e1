"""Mutations of files: each takes a random generator and valid content, and returns hostile content."""

import json
import random
from typing import Any

# Text that replaces a value in JSON; `json.dumps` cannot write most of these.
RAW = {
    "nan": "NaN",
    "infinity": "Infinity",
    "overflow": "1e999",
    "long-integer": "1" + "0" * 400,
    "surrogate": '"\\ud800"',
    "nested": "[" * 100 + "]" * 100,
    "deep": "[" * 2000 + "]" * 2000,
    "deep-objects": '{"a":' * 2000 + "1" + "}" * 2000,
}
# Ordinary numbers, and numbers at the limits of integers of 32 and 64 bits, of floats, and of the decoder
NUMBERS = (0, -1, 1, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**290)
FLOATS = (0.5, -0.5, 1e15, 1e308, -1e308, 5e-324, -0.0, 1e-9, 0.1 + 0.2)
TEXTS = (
    *("", " ", "\x00", "\x1b[2J\x1b]0;title\x07", "\u202e", "\r\n", "a\nb", "=1+1", "<script>", "{0}", "%s", "$(id)"),
    *("../../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "C:\\x", "é" * 150, "x" * 300, "x" * 70_000),
)
VALUES = (None, True, False, [], {}, [[]], [None], {"": ""}, [0] * 3, ["a"], {"a": {"b": 1}})


def mutate_json(rng: random.Random, text: bytes) -> bytes:
    """Changes one part of a JSON text; a text that is no JSON gets a mutation of `mutate_bytes`."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, text)
    raw: dict[str, str] = {}
    holder = [body]
    parent, key = _choose_place(rng, holder)
    rng.choice(_JSON_MUTATIONS)(rng, holder, parent, key, raw)
    result = json.dumps(holder[0])
    for mark, value in raw.items():
        result = result.replace(f'"{mark}"', value)
    return result.encode()


def mutate_lines(rng: random.Random, text: bytes) -> bytes:
    """Changes one line of a file of JSON lines, or removes, repeats or swaps lines."""
    lines = text.split(b"\n")
    index = rng.randrange(len(lines))
    choice = rng.randrange(8)
    if choice == 0:
        del lines[index]
    elif choice == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[index])
    elif choice == 2:
        other = rng.randrange(len(lines))
        lines[index], lines[other] = lines[other], lines[index]
    elif choice == 3:
        return mutate_bytes(rng, text)
    else:
        lines[index] = mutate_json(rng, lines[index])
    return b"\n".join(lines)


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Truncates, flips, inserts, repeats or recodes bytes."""
    position = rng.randrange(len(content) + 1)
    choice = rng.randrange(10)
    if choice == 0:
        return b""
    if choice == 1:
        return content[:position]
    if choice == 2:
        return content[position:]
    if choice in (3, 4) and content:
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 4, 32))):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        return bytes(flipped)
    if choice == 5:
        return content[:position] + rng.randbytes(rng.choice((1, 8, 300))) + content[position:]
    if choice == 6:
        end = min(len(content), position + rng.choice((1, 16, 1000)))
        return content[:end] + content[position:]
    if choice == 7:
        return content.decode("latin-1").encode("utf-16")
    if choice == 8:
        return b"\xef\xbb\xbf" + content
    return content[:position] + rng.choice((b"\x00", b"\n", b'"', b"{", b"\xff\xfe", b"9" * 400)) + content[position:]


def _choose_place(rng: random.Random, holder: list[Any]) -> tuple[Any, Any]:
    """Returns a container and a key or index in it: mostly of a leaf, sometimes of a part above it."""
    places: list[tuple[Any, Any]] = [(holder, 0)]
    while isinstance(child := places[-1][0][places[-1][1]], dict | list) and child:
        places.append((child, rng.choice(list(child)) if isinstance(child, dict) else rng.randrange(len(child))))
    while len(places) > 1 and rng.random() < 0.3:
        places.pop()
    return places[-1]


def _drop(rng: random.Random, holder: Any, parent: Any, key: Any, raw: dict[str, str]) -> None:
    del parent[key]
    if not holder:
        holder.append(None)


def _set_value(values: tuple[Any, ...]) -> Any:
    def change(rng: random.Random, holder: Any, parent: Any, key: Any, raw: dict[str, str]) -> None:
        parent[key] = rng.choice(values)

    return change


def _set_raw(rng: random.Random, holder: Any, parent: Any, key: Any, raw: dict[str, str]) -> None:
    name = rng.choice(list(RAW))
    raw[f"@{name}@"] = RAW[name]
    parent[key] = f"@{name}@"


def _change_type(rng: random.Random, holder: Any, parent: Any, key: Any, raw: dict[str, str]) -> None:
    value = parent[key]
    parent[key] = rng.choice((str(value)[:500], [value], {"a": value}, len(str(value))))


def _keep_type(rng: random.Random, holder: Any, parent: Any, key: Any, raw: dict[str, str]) -> None:
    """Replaces a value by another value of its type, so that the mutation passes the checks of types."""
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int):
        parent[key] = rng.choice((-value, value + 1, value - 1, value * 1000, 0, *NUMBERS))
    elif isinstance(value, float):
        parent[key] = rng.choice((-value, value * 1e9, value / 1e9, value + 1, *FLOATS))
    elif isinstance(value, str):
        parent[key] = rng.choice((value + "x", value[:-1], value * 20, value.upper(), *TEXTS))
    else:
        _change_length(rng, holder, parent, key, raw)


def _change_length(rng: random.Random, holder: Any, parent: Any, key: Any, raw: dict[str, str]) -> None:
    value = parent[key]
    if isinstance(value, list) and value:
        parent[key] = rng.choice((value[:-1], value + value[:1], value * 2, value[:1], value[::-1]))
    elif isinstance(value, dict):
        parent[key] = {**value, rng.choice(TEXTS): rng.choice(VALUES)}
    else:
        parent[key] = [value, value]


def _swap(rng: random.Random, holder: Any, parent: Any, key: Any, raw: dict[str, str]) -> None:
    other, other_key = _choose_place(rng, holder)
    first, second = parent[key], other[other_key]
    if not (_contains(first, other) or _contains(second, parent)):
        parent[key], other[other_key] = second, first


def _contains(value: Any, part: Any) -> bool:
    if value is part:
        return True
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_contains(child, part) for child in children)


def _rename_key(rng: random.Random, holder: Any, parent: Any, key: Any, raw: dict[str, str]) -> None:
    if isinstance(parent, dict):
        parent[rng.choice((*TEXTS, "labels", "id", key + key))] = parent.pop(key)
    else:
        parent.append(parent[key])


_JSON_MUTATIONS = (
    _drop,
    _set_value(NUMBERS),
    _set_value(FLOATS),
    _set_value(TEXTS),
    _set_value(VALUES),
    _set_raw,
    _change_type,
    *[_keep_type] * 6,
    _change_length,
    _change_length,
    _swap,
    _rename_key,
)
