"""Checks this bundle; needs onnxruntime, tokenizers and numpy, and onnxruntime-extensions where the tokenizer is in the
graph.

`python verify.py` compares every file with its sha256 in bundle.json, then runs every model on the golden sentences and
on padded batches of them. The tokens must equal the recorded ones. No logit may differ from the recorded one by more
than the model's `tolerance.largest`, and the median difference may not exceed `tolerance.median`.

Exit codes: 0, the bundle is unmodified and right here; 3, it is not, or this runtime computes wrongly; 1, the folder
holds no bundle.
"""

import os
import sys

if __name__ == "__main__":
    # Python looks for libraries in the script's folder first. No file of the bundle may stand in for one.
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != _here]

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

SCHEMA = 2
BUNDLE, GOLDEN = "bundle.json", "golden.json"
TEXT, LOGITS = "text", "logits"
# x86 without VNNI adds two 8-bit products in 16 bits, which saturates. With this session option they are exact there;
# on other processors it only makes int8 slower.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")
# An ONNX file of one MatMulInteger: uint8 [1, 4] times int8 [4, 1], every weight 127.
PRODUCT = base64.b64decode(
    "CAg63gEKTQoLYWN0aXZhdGlvbnMKB3dlaWdodHMKCnplcm9fcG9pbnQKEXdlaWdodF96ZXJvX3BvaW50Egdwcm9kdWN0Ig1NYXRNdWxJbnRl"
    "Z2VyEg9leHRyZW1lX3Byb2R1Y3QqFQgECAEQA0IHd2VpZ2h0c0oEf39/fyoREAJCCnplcm9fcG9pbnRKAQAqGBADQhF3ZWlnaHRfemVyb19w"
    "b2ludEoBAFodCgthY3RpdmF0aW9ucxIOCgwIAhIICgIIAQoCCARiGQoHcHJvZHVjdBIOCgwIBhIICgIIAQoCCAFCBAoAEA0="
)


class Refused(Exception):
    """Why a bundle is refused: `cause`, and `hint`, which says what to do."""

    def __init__(self, cause: str, hint: str) -> None:
        super().__init__(cause, hint)
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.cause}. {self.hint}"


class Broken(Refused):
    """The bundle is not as it was made."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause, "Do not use it; get it again from its source")


class Unfit(Refused):
    """The bundle is unmodified, and this runtime cannot compute its answers."""


def canonical_id(body: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of everything in bundle.json but its id."""
    sealed = {key: value for key, value in body.items() if key != "id"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def files_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and file of a model in bundle.json; for phones also those of its copy in ONNX Runtime's own format."""
    phones = [(f"{model['variant']}.ort", str(model["ort"]["file"]))] if "ort" in model else []
    return [(str(model["variant"]), str(model["file"])), *phones]


def sealed(folder: Path) -> dict[str, Any]:
    """Returns bundle.json after comparing every file with it.

    Raises `Broken` for a file that differs, is missing, is not listed, is a link or lies outside the folder, and
    `FileNotFoundError` where the folder holds no bundle.
    """
    file = folder / BUNDLE
    if file.is_symlink():
        raise Broken(f"{BUNDLE} is a link")
    try:
        body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if body["schema"] != SCHEMA:
            raise Broken(f"{BUNDLE} has schema {body['schema']}, and this program reads schema {SCHEMA}")
        listed = {str(entry["path"]): (int(entry["bytes"]), str(entry["sha256"])) for entry in body["files"]}
        named = [file for model in body["models"] for _, file in files_of(model)]
        named += [str(apart)] if (apart := (body.get("tokenizer_in_graph") or {}).get("file")) else []
        _release(body["onnxruntime"])
        _saturable(body)
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
        if name not in listed and name != BUNDLE and (found.is_symlink() or not found.is_dir()):
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
        raise Broken(f"{path} has another sha256 than {BUNDLE} states")


def saturates(*, exact: bool = False) -> bool:
    """Whether ONNX Runtime saturates 8-bit products on this processor, by default or even with `EXACT_PRODUCTS`."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    if exact:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    return int(session.run(None, {"activations": np.full((1, 4), 255, np.uint8)})[0][0, 0]) != 4 * 255 * 127


def check_runtime(body: Mapping[str, Any]) -> None:
    """Raises `Unfit` where this ONNX Runtime is older than the bundle states, or saturates its 8-bit products."""
    import onnxruntime as ort

    oldest = body["onnxruntime"]
    if _release(ort.__version__) < _release(oldest):
        raise Unfit(
            f"this is ONNX Runtime {ort.__version__}, and the bundle needs {oldest} or newer",
            f"Install it: pip install 'onnxruntime>={oldest}'",
        )
    models = _saturable(body)
    if models and saturates(exact=True):
        raise Unfit(f"this runtime saturates 8-bit products, so {models[0]} answers wrongly here", _SATURATION_HINT)


def _saturable(body: Mapping[str, Any]) -> list[str]:
    """The models whose 8-bit products can saturate."""
    rooms = {str(model["variant"]): model["int8_headroom"] for model in body["models"]}
    return [variant for variant, room in rooms.items() if room is not None and room < 1]


_SATURATION_HINT = "Install the newest onnxruntime, or use a -portable file, which is exact on every processor"


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def answers(folder: Path, body: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yields the name, the largest |Δlogit| over golden sentences and batches, and the tolerance of every model file.

    Raises `Broken` where a model is outside its tolerance or a sentence has other tokens here, and `Unfit` as
    `check_runtime`.
    """
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer

    try:
        golden = json.loads((folder / GOLDEN).read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(int(body["max_length"]))
        rows = [(str(each["text"]), [int(i) for i in each["input_ids"]]) for each in golden["sentences"]]
        batches = [(str(each["padding"]), [rows[int(i)] for i in each["sentences"]]) for each in golden["batches"]]
        questions = [("right", [row]) for row in rows] + batches
        recorded = {
            name: [np.array([row], np.float32) for row in logits]
            + [np.array(batch, np.float32) for batch in golden["batch_logits"][name]]
            for name, logits in golden["logits"].items()
        }
        models = [
            (m["variant"], name, file, recorded.get(m["variant"], ()), m["tolerance"], [t["name"] for t in m["inputs"]])
            for m in body["models"]
            for name, file in files_of(m)
        ]
        pad_id = int(body["pad_id"])
        in_graph = body.get("tokenizer_in_graph")
    except Exception as error:  # tokenizers raises plain Exception
        raise Broken(f"{GOLDEN}, {BUNDLE} or tokenizer.json cannot be read: {error!r}") from error
    if not rows or not batches:
        raise Broken(f"{GOLDEN} holds no sentence or no batch")
    for text, ids in rows:
        if tokenizer.encode(text).ids != ids:
            raise Broken(f"the tokenizer splits {text[:60]!r} otherwise than where the bundle was made")
    check_runtime(body)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    saturating = saturates()
    if saturating:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    if in_graph:
        import onnxruntime_extensions

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    if in_graph and "file" in in_graph:
        _check_tokenizer(folder / in_graph["file"], options, rows)
    for variant, name, file, wanted, tolerance, inputs in models:
        if len(wanted) != len(questions):
            raise Broken(f"{GOLDEN} does not hold the answers of {name}")
        try:
            session = ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class for every status
            if saturating and variant in _saturable(body):  # weights that layers share cannot be made unsigned
                raise Unfit(
                    f"{file} cannot be loaded on a processor that saturates: {error}", _SATURATION_HINT
                ) from error
            raise Broken(f"{file} cannot be loaded: {error}") from error
        deltas = _deltas(session, file, questions, wanted, inputs, pad_id)
        largest, median = max(deltas), sorted(deltas)[len(deltas) // 2]
        if largest > tolerance["largest"]:
            raise Broken(
                f"{name}: the largest difference from the recorded logits is {largest:.3g} "
                f"(limit {tolerance['largest']:g})"
            )
        if median > tolerance["median"]:
            raise Broken(
                f"{name}: the median difference from the recorded logits is {median:.3g} "
                f"(limit {tolerance['median']:g})"
            )
        yield name, largest, tolerance["largest"]


def _deltas(
    session: Any, file: str, questions: Sequence[Any], wanted: Sequence[Any], inputs: Sequence[str], pad_id: int
) -> list[float]:
    """The largest |Δlogit| of every text of every question."""
    import numpy as np

    found: list[float] = []
    try:
        for (side, rows), want in zip(questions, wanted, strict=True):
            if inputs == [TEXT]:
                if side == "left":
                    continue  # the tokenizer in the graph pads on the right
                given = {TEXT: np.array([text for text, _ in rows], dtype=object)}
            else:
                arrays = padded([ids for _, ids in rows], side, pad_id)
                given = {name: np.array(arrays[name], np.int64) for name in inputs}
            deltas = np.abs(session.run([LOGITS], given)[0] - want).max(axis=1)
            found += [float(delta) if np.isfinite(delta) else float("inf") for delta in deltas]
    except Exception as error:  # onnxruntime raises a class for every status
        raise Broken(f"{file} does not run here: {error}") from error
    return found


def padded(rows: Sequence[Sequence[int]], side: str, pad_id: int) -> dict[str, list[list[int]]]:
    """Token ids, attention mask and token types of a batch, padded on one `side` to its longest row."""
    width = max(map(len, rows))

    def fill(values: Sequence[int], by: int) -> list[int]:
        padding = [by] * (width - len(values))
        return [*padding, *values] if side == "left" else [*values, *padding]

    return {
        "input_ids": [fill(row, pad_id) for row in rows],
        "attention_mask": [fill([1] * len(row), 0) for row in rows],
        "token_type_ids": [[0] * width for _ in rows],
    }


def _check_tokenizer(file: Path, options: Any, rows: Sequence[Any]) -> None:
    """Raises `Broken` where a tokenizer graph makes other tokens than the golden ones."""
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
    """Prints the findings and returns the exit code."""
    try:
        body = sealed(folder)
        print(f"{len(body['files'])} files as listed, bundle {body['id'][:12]}")
        for name, largest, tolerance in answers(folder, body):
            print(f"{name}: golden sentences answered, largest |Δlogit| {largest:.2g}, ≤ {tolerance:g} allowed")
    except FileNotFoundError:
        print(f"{folder} holds no {BUNDLE}", file=sys.stderr)
        return 1
    except Refused as error:
        print(f"FAILED: {error}.", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
