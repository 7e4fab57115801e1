"""Recipes: a valid recipe of every table, hostile values in its lines, and the command that reads it."""

import json
import random
from pathlib import Path

from hostile.harness import call
from hostile.models import write_checkpoint
from hostile.mutations import FLOATS, NUMBERS, TEXTS, mutate_bytes

RECIPE = """schema = 1
toolchain = "1"

[releases]
torch = "2.0"

[model]
kind = "folder"
ref = "checkpoint"
name = "m"

[training]
kind = "embedded"
ref = "sst2"
label_column = "label"

[[variants]]
name = "torch-pruned50"
step = "prune"
settings = { method = "fisher", sentences = 100, ratio = 0.5, layers = 1 }

[[variants]]
name = "onnx-std"
step = "export"
version = 2
[variants.settings]
opset = 18
exporter = "torch"

[[variants]]
name = "onnx-fp32"
parent = "onnx-std"
settings = { passes = ["fuse", "first-token"] }

[[variants]]
name = "onnx-int8+a"
parent = "onnx-fp32"
settings = { keep_fp32 = 2, trim_vocab = "train" }

[bench]
variants = ["onnx-fp32"]
providers = ["cpu"]
quick = true
threads = 2
batch_size = 8
kind = "file"
split = "held-out"

[ship]
target = "python"
variants = ["onnx-fp32"]
output = "app"
license = "MIT"
"""
_VALUES = ("[]", "[[]]", "{}", "true", "1979-05-27", "nan", "-inf", "9" * 400, "[" * 300, "{ a = 1 }", "'''x")
_WORDS = ("hub", "file", "folder", "user/name", "onnx-int8", "torch-fp32", "prune", "import", "mask", "checkpoint")


def write_recipe(folder: Path) -> None:
    """Writes a recipe and its checkpoint."""
    write_checkpoint(folder / "checkpoint")
    (folder / "recipe.toml").write_text(RECIPE)


def mutate_recipe(rng: random.Random, content: bytes) -> bytes:
    """Replaces the value or the key of a line, or removes, repeats or moves the line; or changes bytes."""
    lines = content.split(b"\n")
    index = rng.choice([number for number, line in enumerate(lines) if b"=" in line] or [0])
    key, _, _ = lines[index].partition(b" = ")
    texts = [json.dumps(text) for text in (*TEXTS, *_WORDS, *_WORDS)]
    values = (*map(str, NUMBERS), *map(str, FLOATS), *_VALUES, *texts)
    choice = rng.randrange(10)
    if choice == 0:
        return mutate_bytes(rng, content)
    if choice == 1:
        del lines[index]
    elif choice == 2:
        lines.insert(rng.randrange(len(lines) + 1), lines[index])
    elif choice == 3:
        lines[index] = lines[index].replace(key, rng.choice(texts).encode(), 1)
    elif b"{" in lines[index] and rng.random() < 0.7:
        lines[index] = _mutate_inline(rng, lines[index], values)
    else:
        lines[index] = key + b" = " + rng.choice(values).encode()
    return b"\n".join(lines)


def _mutate_inline(rng: random.Random, line: bytes, values: tuple[str, ...]) -> bytes:
    """Replaces one value of an inline table."""
    parts = line.split(b", ")
    index = rng.randrange(len(parts))
    start, _, end = parts[index].rpartition(b" = ")
    parts[index] = start + b" = " + rng.choice(values).encode() + (b" }" if end.endswith(b"}") else b"")
    return b", ".join(parts)


def plan_recipe(folder: Path, rng: random.Random) -> None:
    """Prints the plan of the recipe."""
    call("build", folder / "recipe.toml", "--dry-run", "--exported", folder / "exported")
