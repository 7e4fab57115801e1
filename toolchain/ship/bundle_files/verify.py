"""Checks this bundle.

`python verify.py` compares the sha256 of every file with bundle.json. Then the script runs every model on the golden
sentences, one by one and in padded batches. The file golden.json holds the golden sentences with the recorded tokens
and logits. The tokens of a golden sentence must equal the recorded tokens. No logit may differ from the recorded logit
by more than `tolerance.largest` of the model in bundle.json. The median difference from the recorded logits may not
exceed `tolerance.median`.

The script needs onnxruntime, tokenizers and numpy. The script also needs onnxruntime-extensions if a graph contains the
tokenizer.

Exit codes:
    0: The bundle is unmodified, and its models compute the recorded logits on this machine.
    1: The folder has no bundle.json.
    3: A check failed.
"""

import os
import sys

if __name__ == "__main__":
    # Python searches the script's folder for libraries first. The script removes its folder from the search path, so
    # that no file of the bundle can replace a library.
    _script_folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _script_folder]

import base64
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

SCHEMA = 2
BUNDLE, GOLDEN = "bundle.json", "golden.json"
TEXT, LOGITS = "text", "logits"
# Names of the inputs of a model that takes token ids. The first two are required.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Limits on a bundle. A model file of 2 GiB is the largest that the format ONNX allows.
MAX_RECORD_BYTES = 8 << 20
MAX_FILE_BYTES = 1 << 31
MAX_FILES = 10_000
MAX_MODELS = 100
MAX_LABELS = 100_000
MAX_TOKENS = 1 << 20
MAX_GOLDEN_SENTENCES = 10_000
# x86 without VNNI adds two 8-bit products in 16 bits, and the sum can saturate. `EXACT_PRODUCTS` is a session option
# that makes sums of 8-bit products exact on x86 without VNNI. On processors whose 8-bit products do not saturate,
# `EXACT_PRODUCTS` only makes int8 models slower.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")
# `PRODUCT` is a serialised ONNX model with one MatMulInteger node. The node multiplies uint8 activations of shape
# [1, 4] by int8 weights of shape [4, 1]. The four weights of the node are all 127.
PRODUCT = base64.b64decode(
    "CAg63gEKTQoLYWN0aXZhdGlvbnMKB3dlaWdodHMKCnplcm9fcG9pbnQKEXdlaWdodF96ZXJvX3BvaW50Egdwcm9kdWN0Ig1NYXRNdWxJbnRl"
    "Z2VyEg9leHRyZW1lX3Byb2R1Y3QqFQgECAEQA0IHd2VpZ2h0c0oEf39/fyoREAJCCnplcm9fcG9pbnRKAQAqGBADQhF3ZWlnaHRfemVyb19w"
    "b2ludEoBAFodCgthY3RpdmF0aW9ucxIOCgwIAhIICgIIAQoCCARiGQoHcHJvZHVjdBIOCgwIBhIICgIIAQoCCAFCBAoAEA0="
)


class BundleError(Exception):
    """A check failed.

    Attributes:
        cause: Description of the failure.
        hint: Advice for the user.
    """

    def __init__(self, cause: str, hint: str) -> None:
        super().__init__(cause, hint)
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.cause}. {self.hint}"


class InvalidBundleError(BundleError):
    """The bundle was modified, or a model does not compute the recorded logits."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause, "Do not use this bundle; get it again from its source")


class UnsuitableRuntimeError(BundleError):
    """The bundle is unmodified, but this ONNX Runtime cannot compute the recorded logits."""


def canonical_id(body: Mapping[str, Any]) -> str:
    """Returns the id of a bundle: the sha256 of bundle.json as canonical JSON, without the entry ``id``."""
    content = {key: value for key, value in body.items() if key != "id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def model_files(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the files of one model, each as a pair (name, file).

    The first pair is the variant's name and the .onnx file. In bundles for phones, the model also has a copy in ORT
    format. The second pair is then the variant's name with the suffix ``.ort``, and the file of this copy.

    Args:
        model: Entry of the model in bundle.json.
    """
    ort_format = [(f"{model['variant']}.ort", str(model["ort"]["file"]))] if "ort" in model else []
    return [(str(model["variant"]), str(model["file"])), *ort_format]


def read_bundle(folder: Path) -> dict[str, Any]:
    """Compares every file of the bundle with bundle.json, and returns the content of bundle.json.

    Raises:
        InvalidBundleError: bundle.json is not valid; or a file has a wrong sha256, is missing, is not listed, is a
            link, or is outside the folder.
        FileNotFoundError: The folder has no bundle.json.
    """
    try:
        text = _read_record(folder / BUNDLE)
        body: dict[str, Any] = _parse_json(text)
        if body["schema"] != SCHEMA:
            raise InvalidBundleError(
                f"{BUNDLE} has schema {str(body['schema'])[:20]!r}, but this program reads schema {SCHEMA}"
            )
        if canonical_id(body) != body.get("id"):
            raise InvalidBundleError(f"the content of {BUNDLE} does not match its id")
        required = _check_record(body)
        entries = {str(entry["path"]): (int(entry["bytes"]), str(entry["sha256"])) for entry in body["files"]}
        for path, (size, _) in entries.items():
            _check_entry(path, size)
        missing = [path for path in (*required, GOLDEN, "tokenizer.json", "config.json") if path not in entries]
        if missing:
            raise InvalidBundleError(f"{missing[0]!r} is not listed in {BUNDLE}")
        for path, (size, digest) in entries.items():
            _check_file(folder, path, size, digest)
        for entry in sorted(folder.rglob("*")):
            name = entry.relative_to(folder).as_posix()
            if name not in entries and name != BUNDLE and (entry.is_symlink() or not entry.is_dir()):
                raise InvalidBundleError(f"{name} is not listed in {BUNDLE}")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise InvalidBundleError(f"{BUNDLE} cannot be read: {error!r:.300}") from error
    return body


def _read_record(file: Path) -> str:
    """Returns the text of bundle.json; opens only a regular file, because a named pipe could block forever."""
    mode = file.lstat()
    if stat.S_ISLNK(mode.st_mode):
        raise InvalidBundleError(f"{BUNDLE} is a link")
    if not stat.S_ISREG(mode.st_mode):
        raise InvalidBundleError(f"{BUNDLE} is not a regular file")
    if mode.st_size > MAX_RECORD_BYTES:
        raise InvalidBundleError(f"{BUNDLE} has {mode.st_size} bytes (limit {MAX_RECORD_BYTES})")
    return file.read_text(encoding="utf-8")


def _parse_json(text: str) -> Any:
    """Returns the value of a JSON text; raises ValueError for NaN and infinities, which are no JSON."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not a number")

    return json.loads(text, parse_constant=refuse)


def _check_record(body: Mapping[str, Any]) -> list[str]:
    """Checks the values of bundle.json that `compare_logits` uses; returns the files that bundle.json must list.

    Raises:
        InvalidBundleError: A value is out of bounds.
        ValueError, LookupError, TypeError, AttributeError, ArithmeticError: A value is missing, or has a wrong type.
    """
    models, labels = list(body["models"]), list(body["labels"])
    names = [str(model["variant"]) for model in models]
    sizes = {
        "models": (len(models), MAX_MODELS),
        "labels": (len(labels), MAX_LABELS),
        "files": (len(body["files"]), MAX_FILES),
        "max_length": (int(body["max_length"]), MAX_TOKENS),
    }
    for name, (size, limit) in sizes.items():
        if not 0 < size <= limit:
            raise InvalidBundleError(f"{BUNDLE} states {size} as the size of {name!r}, which is not in 1 … {limit}")
    if len(set(names)) < len(names):
        raise InvalidBundleError(f"{BUNDLE} names a model twice")
    for model in models:
        inputs = [tensor["name"] for tensor in model["inputs"]]
        if inputs != [TEXT] and not set(TOKEN_INPUTS[:2]) <= set(inputs) <= set(TOKEN_INPUTS):
            raise InvalidBundleError(f"{BUNDLE} has a model with the inputs {inputs!s:.80}")
        if LOGITS not in [tensor["name"] for tensor in model["outputs"]]:
            raise InvalidBundleError(f"{BUNDLE} has a model without the output {LOGITS!r}")
        for key in ("largest", "median"):
            if not 0 <= model["tolerance"][key] < float("inf"):
                raise InvalidBundleError(f"{BUNDLE} has a tolerance below 0")
    if not 0 <= int(body["pad_id"]) < 1 << 31:
        raise InvalidBundleError(f"{BUNDLE} has an impossible 'pad_id'")
    _parse_release(body["onnxruntime"])
    _saturable_models(body)
    graph_file = _tokenizer_graph(body)
    return [file for model in models for _, file in model_files(model)] + ([graph_file] if graph_file else [])


def _tokenizer_graph(body: Mapping[str, Any]) -> str | None:
    """Returns the file of the separate tokenizer graph; None without one."""
    file = (body.get("tokenizer_in_graph") or {}).get("file")
    return None if file is None else str(file)


def _check_entry(path: str, size: int) -> None:
    """Raises `InvalidBundleError` if a path in bundle.json leads out of the folder, or a file is too large."""
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path or "\0" in path:
        raise InvalidBundleError(f"the path {path!r} is outside the folder of the bundle")
    if not 0 <= size <= MAX_FILE_BYTES:
        raise InvalidBundleError(f"{path!r} has {size} bytes (limit {MAX_FILE_BYTES})")


def _check_file(folder: Path, path: str, size: int, digest: str) -> None:
    location = folder
    for part in PurePosixPath(path).parts:
        location = location / part
        if location.is_symlink():
            raise InvalidBundleError(f"{path} is a link")
    if not location.exists():
        raise InvalidBundleError(f"{path} is missing")
    if not location.is_file():
        raise InvalidBundleError(f"{path} is not a regular file")
    if location.stat().st_size != size:
        raise InvalidBundleError(f"{path} has {location.stat().st_size} bytes instead of {size}")
    sha256 = hashlib.sha256()
    with location.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    if sha256.hexdigest() != digest:
        raise InvalidBundleError(f"the sha256 of {path} differs from the sha256 in {BUNDLE}")


def saturates(*, exact: bool = False) -> bool:
    """Runs one 8-bit product with ONNX Runtime and returns whether the product saturates on this machine.

    Args:
        exact: Whether to test with the session option `EXACT_PRODUCTS` instead of the default options.
    """
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    if exact:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    return int(session.run(None, {"activations": np.full((1, 4), 255, np.uint8)})[0][0, 0]) != 4 * 255 * 127


def check_runtime(body: Mapping[str, Any]) -> None:
    """Checks that this ONNX Runtime can compute the recorded logits.

    Raises:
        UnsuitableRuntimeError: This ONNX Runtime is too old, or saturates the 8-bit products of a model even with
            `EXACT_PRODUCTS`.
    """
    import onnxruntime as ort

    minimum = body["onnxruntime"]
    if _parse_release(ort.__version__) < _parse_release(minimum):
        raise UnsuitableRuntimeError(
            f"this is ONNX Runtime {ort.__version__}, but the bundle needs {minimum} or newer",
            f"Install a newer release: pip install 'onnxruntime>={minimum}'",
        )
    models = _saturable_models(body)
    if models and saturates(exact=True):
        raise UnsuitableRuntimeError(
            f"this runtime saturates 8-bit products, so the logits of {models[0]} would be wrong", _SATURATION_HINT
        )


def _saturable_models(body: Mapping[str, Any]) -> list[str]:
    """Returns the models whose 8-bit products can saturate."""
    headrooms = {str(model["variant"]): model["int8_headroom"] for model in body["models"]}
    return [variant for variant, headroom in headrooms.items() if headroom is not None and headroom < 1]


_SATURATION_HINT = "Install the newest onnxruntime, or use a -portable model, which is exact on every processor"


def _parse_release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def compare_logits(folder: Path, body: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Runs every model file on the golden sentences and golden batches, and compares its logits with the recorded ones.

    Yields:
        For each model file: the model's name, the largest difference from a recorded logit, and the limit for this
            difference.

    Raises:
        InvalidBundleError: golden.json is not valid, a model fails or exceeds its tolerance, or a sentence does not
            give the recorded tokens.
        UnsuitableRuntimeError: This ONNX Runtime is too old, or cannot compute a model exactly on this processor.
    """
    import onnxruntime as ort

    golden = _read_golden(folder, body)
    _compare_tokens(folder, body, golden.rows)
    in_graph = body.get("tokenizer_in_graph")
    models = [
        (variant, name, file, golden.logits.get(variant, ()), m["tolerance"], [t["name"] for t in m["inputs"]])
        for m in body["models"]
        for variant in [str(m["variant"])]
        for name, file in model_files(m)
    ]
    check_runtime(body)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    option_needed = saturates()
    if option_needed:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    if in_graph:
        import onnxruntime_extensions

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    if graph_file := _tokenizer_graph(body):
        _check_tokenizer(folder / graph_file, options, golden.rows)
    for variant, name, file, expected, tolerance, inputs in models:
        if len(expected) != len(golden.runs):
            raise InvalidBundleError(f"{GOLDEN} does not have the logits of {name}")
        try:
            session = ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # The exception classes of onnxruntime have no common base class but Exception.
            # ONNX Runtime refuses the session option `EXACT_PRODUCTS` for a model whose layers share weights.
            if option_needed and variant in _saturable_models(body):
                raise UnsuitableRuntimeError(
                    f"{file} cannot be loaded on a processor that saturates 8-bit products: {error}", _SATURATION_HINT
                ) from error
            raise InvalidBundleError(f"{file} cannot be loaded: {error}") from error
        deltas = _compute_deltas(session, file, golden.runs, expected, inputs, int(body["pad_id"]))
        largest, median = max(deltas), sorted(deltas)[len(deltas) // 2]
        if largest > tolerance["largest"]:
            raise InvalidBundleError(
                f"{name}: the largest difference from the recorded logits is {largest:.3g} "
                f"(limit {tolerance['largest']:g})"
            )
        if median > tolerance["median"]:
            raise InvalidBundleError(
                f"{name}: the median difference from the recorded logits is {median:.3g} "
                f"(limit {tolerance['median']:g})"
            )
        yield name, largest, tolerance["largest"]


class _Golden(NamedTuple):
    """The content of golden.json.

    Attributes:
        rows: For each sentence, its text and its recorded token ids.
        runs: For each run of a model: the side of the padding, and the rows of the batch.
        logits: For each variant: the recorded logits of each row of each run.
    """

    rows: list[tuple[str, list[int]]]
    runs: list[tuple[str, list[tuple[str, list[int]]]]]
    logits: dict[str, list[list[Any]]]


def _read_golden(folder: Path, body: Mapping[str, Any]) -> _Golden:
    import numpy as np

    try:
        golden = _parse_json((folder / GOLDEN).read_text(encoding="utf-8"))
        rows = [(str(each["text"]), [int(i) for i in each["input_ids"]]) for each in golden["sentences"]]
        batches = [(str(each["padding"]), [rows[int(i)] for i in each["sentences"]]) for each in golden["batches"]]
        logits = {
            str(name): [
                [np.array(row, np.float32) for row in batch]
                for batch in [*([row] for row in single), *golden["batch_logits"][name]]
            ]
            for name, single in golden["logits"].items()
        }
        max_length = int(body["max_length"])
        has_wrong_row = any(not 0 < len(ids) <= max_length or min(ids) < 0 or max(ids) >= 1 << 31 for _, ids in rows)
        has_wrong_batch = any(side not in ("left", "right") or not batch for side, batch in batches)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise InvalidBundleError(f"{GOLDEN} cannot be read: {error!r:.300}") from error
    if not rows or not batches:
        raise InvalidBundleError(f"{GOLDEN} has no sentences or no batches")
    if len(rows) > MAX_GOLDEN_SENTENCES or sum(len(batch) for _, batch in batches) > MAX_GOLDEN_SENTENCES:
        raise InvalidBundleError(f"{GOLDEN} has more than {MAX_GOLDEN_SENTENCES} sentences")
    if has_wrong_row or has_wrong_batch:
        raise InvalidBundleError(f"{GOLDEN} has a sentence or a batch that no model can read")
    return _Golden(rows, [("right", [row]) for row in rows] + batches, logits)


def _compare_tokens(folder: Path, body: Mapping[str, Any], rows: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Raises `InvalidBundleError` unless the tokenizer gives the recorded tokens of every golden sentence."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(int(body["max_length"]))
        different = next((text for text, ids in rows if tokenizer.encode(text).ids != ids), None)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and for a crash a subclass of BaseException
        raise InvalidBundleError(f"tokenizer.json cannot be used: {error!r:.300}") from error
    if different is not None:
        raise InvalidBundleError(
            f"the tokenizer splits {different[:60]!r} into tokens that differ from the tokens in {GOLDEN}"
        )


def _compute_deltas(
    session: Any, file: str, runs: Sequence[Any], expected: Sequence[Any], inputs: Sequence[str], pad_id: int
) -> list[float]:
    """Runs the model on all batches and returns each text's largest difference from its recorded logits."""
    import numpy as np

    deltas: list[float] = []
    try:
        for (side, rows), logits in zip(runs, expected, strict=True):
            if inputs == [TEXT]:
                if side == "left":
                    continue  # a tokenizer in the graph can pad only on the right
                feeds = {TEXT: np.array([text for text, _ in rows], dtype=object)}
            else:
                arrays = pad_rows([ids for _, ids in rows], side, pad_id)
                feeds = {name: np.array(arrays[name], np.int64) for name in inputs}
            for index, (actual, expected_row) in enumerate(zip(session.run([LOGITS], feeds)[0], logits, strict=True)):
                if actual.ndim == 2:  # a token classifier; the recorded logits leave out padding
                    actual = actual[np.array(arrays["attention_mask"][index]) == 1].ravel()
                if actual.shape != expected_row.shape:
                    raise InvalidBundleError(f"{GOLDEN} does not have one logit of {file} for each label")
                delta = np.abs(actual - expected_row).max()
                deltas.append(float(delta) if np.isfinite(delta) else float("inf"))
    except InvalidBundleError:
        raise
    except Exception as error:  # the exception classes of onnxruntime have no common base class but Exception
        raise InvalidBundleError(f"{file} does not run on this machine: {error}") from error
    return deltas


def pad_rows(rows: Sequence[Sequence[int]], side: str, pad_id: int) -> dict[str, list[list[int]]]:
    """Returns token ids, attention mask and token types of a batch; pads rows on `side` to the longest row's length."""
    width = max(map(len, rows))

    def fill(values: Sequence[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(values))
        return [*padding, *values] if side == "left" else [*values, *padding]

    return {
        "input_ids": [fill(row, pad_id) for row in rows],
        "attention_mask": [fill([1] * len(row), 0) for row in rows],
        "token_type_ids": [[0] * width for _ in rows],
    }


def _check_tokenizer(file: Path, options: Any, rows: Sequence[Any]) -> None:
    """Raises `InvalidBundleError` unless the tokenizer graph gives the recorded tokens of every golden sentence."""
    import numpy as np
    import onnxruntime as ort

    names = ["input_ids", "attention_mask"]
    try:
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        outputs = [session.run(names, {TEXT: np.array([text], dtype=object)}) for text, _ in rows]
    except Exception as error:  # the exception classes of onnxruntime have no common base class but Exception
        raise InvalidBundleError(f"the tokenizer graph does not run on this machine: {error}") from error
    for (text, ids), (tokens, mask) in zip(rows, outputs, strict=True):
        if tokens[0][mask[0] == 1].tolist() != ids:
            raise InvalidBundleError(
                f"the tokenizer graph splits {text[:60]!r} into tokens that differ from the tokens in {GOLDEN}"
            )


def main(folder: Path) -> int:
    """Checks the bundle, prints the results and returns the exit code."""
    try:
        body = read_bundle(folder)
        print(f"bundle {body['id'][:12]}: {len(body['files'])} files are unmodified")
        for name, largest, tolerance in compare_logits(folder, body):
            print(f"{name}: golden sentences passed, largest |Δlogit| {largest:.2g} (limit {tolerance:g})")
    except (FileNotFoundError, NotADirectoryError):
        print(f"{folder} has no {BUNDLE}", file=sys.stderr)
        return 1
    except BundleError as error:
        print(f"FAILED: {error}.", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
