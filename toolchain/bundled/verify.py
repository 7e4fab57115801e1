"""Whether this bundle is whole and answers here as where it was made; needs onnxruntime, tokenizers and numpy, and
onnxruntime-extensions where the tokenizer is in the graph.

`python verify.py` looks at every file's sha256, then asks every model the golden sentences: the tokens must be the
recorded ones, no logit may be further from the recorded one than the model's tolerance, and half of the sentences must
be much nearer, which they are not on a processor that saturates. Exit code 0: it holds; 3: it does not; 1: there is
nothing to look at.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

SCHEMA = 1
BUNDLE, GOLDEN = "bundle.json", "golden.json"
TEXT, LOGITS = "text", "logits"


class Broken(Exception):
    """What is wrong with a bundle."""


def canonical_id(body: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of everything in bundle.json but its id."""
    sealed = {key: value for key, value in body.items() if key != "id"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def files_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a model of bundle.json is called and its file; a second time for phones, in ONNX Runtime's own format."""
    phones = [(f"{model['variant']}.ort", str(model["ort"]["file"]))] if "ort" in model else []
    return [(str(model["variant"]), str(model["file"])), *phones]


def sealed(folder: Path) -> dict[str, Any]:
    """bundle.json, its files found whole; `Broken` for a file that differs, is missing, added, a link or outside.

    Raises `FileNotFoundError` where the folder holds no bundle.
    """
    file = folder / BUNDLE
    if file.is_symlink():
        raise Broken(f"{BUNDLE} is a link")
    try:
        body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if body["schema"] != SCHEMA:
            raise Broken(f"{BUNDLE} has schema {body['schema']}, this reads {SCHEMA}")
        listed = {str(entry["path"]): (int(entry["bytes"]), str(entry["sha256"])) for entry in body["files"]}
        named = [file for model in body["models"] for _, file in files_of(model)]
        named += [str(apart)] if (apart := (body.get("tokenizer_in_graph") or {}).get("file")) else []
    except FileNotFoundError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise Broken(f"{BUNDLE} cannot be read: {error!r}") from error
    if canonical_id(body) != body.get("id"):
        raise Broken(f"{BUNDLE} does not add up to its own id")
    for path in listed:
        parts = PurePosixPath(path)
        if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path or "\0" in path:
            raise Broken(f"the path {path!r} leaves the folder")
    missing = [path for path in (*named, GOLDEN, "tokenizer.json", "config.json") if path not in listed]
    if missing:
        raise Broken(f"{missing[0]} is not listed")
    for path, (size, digest) in listed.items():
        _check_file(folder, path, size, digest)
    for found in sorted(folder.rglob("*")):
        name = found.relative_to(folder).as_posix()
        # Hidden files and Python's caches are the system's, not the bundle's.
        system = any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)
        if not system and name not in listed and name != BUNDLE and (found.is_symlink() or not found.is_dir()):
            raise Broken(f"{name} is not listed in {BUNDLE}")
    return body


def _check_file(folder: Path, path: str, size: int, digest: str) -> None:
    place = folder
    for part in PurePosixPath(path).parts:
        place = place / part
        if place.is_symlink():
            raise Broken(f"{path} is a link")
    if not place.is_file():
        raise Broken(f"{path} is missing")
    if place.stat().st_size != size:
        raise Broken(f"{path} has {place.stat().st_size} bytes instead of {size}")
    found = hashlib.sha256()
    with place.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    if found.hexdigest() != digest:
        raise Broken(f"{path} has another sha256 than {BUNDLE} says")


def answers(folder: Path, body: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """For every file of a model (what it is called, largest |Δlogit| over the golden sentences, tolerance); `Broken`
    where one is beyond it or a sentence has other tokens here."""
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer

    try:
        golden = json.loads((folder / GOLDEN).read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(int(body["max_length"]))
        rows = [(str(each["text"]), [int(i) for i in each["input_ids"]]) for each in golden["sentences"]]
        recorded = {name: np.array(logits, np.float32) for name, logits in golden["logits"].items()}
        models = [
            (name, file, recorded.get(m["variant"], ()), m["tolerance"], [t["name"] for t in m["inputs"]])
            for m in body["models"]
            for name, file in files_of(m)
        ]
    except Exception as error:  # tokenizers raises plain Exception
        raise Broken(f"{GOLDEN} or tokenizer.json cannot be read: {error!r}") from error
    if not rows:
        raise Broken(f"{GOLDEN} holds no sentence")
    for text, ids in rows:
        if tokenizer.encode(text).ids != ids:
            raise Broken(f"the tokenizer splits {text[:60]!r} otherwise than where the bundle was made")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if in_graph := body.get("tokenizer_in_graph"):
        import onnxruntime_extensions

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    if in_graph and "file" in in_graph:
        _check_tokenizer(folder / in_graph["file"], options, rows)
    for name, file, wanted, tolerance, inputs in models:
        if len(wanted) != len(rows):
            raise Broken(f"{GOLDEN} does not hold the answers of {name}")
        deltas = []
        try:
            session = ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
            for (text, ids), want in zip(rows, wanted, strict=True):
                given = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
                if inputs == [TEXT]:
                    logits = session.run([LOGITS], {TEXT: np.array([text], dtype=object)})[0]
                else:
                    logits = session.run([LOGITS], {each: np.array([given[each]], np.int64) for each in inputs})[0]
                delta = np.abs(logits[0] - want).max()
                deltas.append(float(delta) if np.isfinite(delta) else float("inf"))
        except Exception as error:  # onnxruntime raises a class for every status
            raise Broken(f"{file} does not run here: {error}") from error
        largest, middle = max(deltas), sorted(deltas)[len(deltas) // 2]
        if largest > tolerance["largest"]:
            raise Broken(f"{name} is up to {largest:.3g} from its recorded logits, ≤ {tolerance['largest']:g} allowed")
        if middle > tolerance["median"]:
            raise Broken(
                f"{name} is {middle:.3g} or more from its recorded logits in half of the sentences, "
                f"≤ {tolerance['median']:g} allowed: if this processor saturates 8-bit products, use a -portable file"
            )
        yield name, largest, tolerance["largest"]


def _check_tokenizer(file: Path, options: Any, rows: Sequence[tuple[str, list[int]]]) -> None:
    """Raises `Broken` where a graph that makes tokens of texts makes others than the golden ones."""
    import numpy as np
    import onnxruntime as ort

    names = ["input_ids", "attention_mask"]
    try:
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found = [session.run(names, {TEXT: np.array([text], dtype=object)}) for text, _ in rows]
    except Exception as error:  # onnxruntime raises a class for every status
        raise Broken(f"the graph of the tokenizer does not run here: {error}") from error
    for (text, ids), (tokens, mask) in zip(rows, found, strict=True):
        if tokens[0][mask[0] == 1].tolist() != ids:
            raise Broken(f"the graph of the tokenizer splits {text[:60]!r} otherwise than where the bundle was made")


def main(folder: Path) -> int:
    """Prints what was found; the exit code."""
    try:
        body = sealed(folder)
        print(f"{len(body['files'])} files as listed, bundle {body['id'][:12]}")
        for name, largest, tolerance in answers(folder, body):
            print(f"{name}: golden sentences answered, largest |Δlogit| {largest:.2g}, ≤ {tolerance:g} allowed")
    except FileNotFoundError:
        print(f"{folder} holds no {BUNDLE}", file=sys.stderr)
        return 1
    except Broken as error:
        print(f"NOT as it was made: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
