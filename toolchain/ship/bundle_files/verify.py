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
    1: The folder has no bundle.json, or a file may not be read.
    3: A check failed.
"""

import os
import sys

if __name__ == "__main__":
    # Python searches the script's folder for libraries first. The script removes its folder from the search path, so
    # that no file of the bundle can replace a library.
    _script_folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _script_folder]
# ONNX Runtime reports its use to Microsoft by default. It reads this variable once, when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import base64
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

SCHEMA = 2
BUNDLE, GOLDEN = "bundle.json", "golden.json"
# The signature covers bundle.json, so bundle.json cannot list the signature.
SIGNATURE = "model.sig"
# The model hub adds this file to a repository, and its library adds this folder to a download. No app reads them.
HUB_FILE, HUB_FOLDER = ".gitattributes", ".cache/huggingface"
TEXT, LOGITS = "text", "logits"
# Names of the inputs of a model that takes token ids. The first two are required.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Limits on a bundle. A model file of 2 GiB is the largest that the format ONNX allows.
LIMITS = {"models": 100, "labels": 100_000, "files": 10_000, "max_length": 1 << 20, "golden sentences": 10_000}
MAX_RECORD_BYTES, MAX_FILE_BYTES, MAX_ID = 8 << 20, 1 << 31, (1 << 31) - 1
# JSON of a wrong structure, depth or size raises these exceptions.
_JSON_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError)
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
        # A terminal would obey control characters, which names in the bundle may contain.
        self.cause = "".join(character if character.isprintable() else " " for character in cause)
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
    file = folder / BUNDLE
    try:
        status = file.lstat()
        _require(not stat.S_ISLNK(status.st_mode), f"{BUNDLE} is a link")
        # A named pipe could block a reader forever.
        _require(stat.S_ISREG(status.st_mode), f"{BUNDLE} is not a regular file")
        _require(status.st_size <= MAX_RECORD_BYTES, f"{BUNDLE} has more than {MAX_RECORD_BYTES} bytes")
        # With `parse_constant=int`, NaN and infinities raise ValueError, because they are no JSON.
        body: dict[str, Any] = json.loads(
            file.read_text(encoding="utf-8"), parse_constant=int, object_pairs_hook=_unique_keys
        )
        schema = f"{body['schema']!s:.20}"
        _require(body["schema"] == SCHEMA, f"{BUNDLE} has schema {schema}, but this program reads schema {SCHEMA}")
        _require(canonical_id(body) == body.get("id"), f"the content of {BUNDLE} does not match its id")
        required = _check_record(body)
        entries = {str(entry["path"]): (int(entry["bytes"]), str(entry["sha256"])) for entry in body["files"]}
        _require(len(entries) == len(body["files"]), f"{BUNDLE} lists a file twice")
        for path in entries:
            parts = PurePosixPath(path)
            is_outside = not path or parts.is_absolute() or ".." in parts.parts or bool({*"\\:\0"} & {*path})
            _require(not is_outside, f"the path {path!r} is outside the folder of the bundle")
            _require(path == parts.as_posix(), f"{path!r} is not the shortest form of a path")
        for path in (*required, GOLDEN, "tokenizer.json", "config.json"):
            _require(path in entries, f"{path} is not listed in {BUNDLE}")
        for path, (size, digest) in entries.items():
            _check_file(folder, path, size, digest)
        for entry in sorted(folder.rglob("*")):
            name = entry.relative_to(folder).as_posix()
            is_known = name in (*entries, BUNDLE) or (entry.is_dir() and not entry.is_symlink())
            is_known |= is_unlisted(name) and entry.is_file() and not entry.is_symlink()
            _require(is_known, f"{name} is not listed in {BUNDLE}")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise
    except OSError as error:
        raise InvalidBundleError(f"the bundle cannot be read: {error!r:.300}") from error
    except _JSON_ERRORS as error:
        raise InvalidBundleError(f"{BUNDLE} cannot be read: {error!r:.300}") from error
    return body


def is_unlisted(path: str) -> bool:
    """Returns whether a bundle may have the file without listing it: the signature, and the files of the model hub."""
    return path in (SIGNATURE, HUB_FILE) or path.startswith(HUB_FOLDER + "/")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dict; another JSON parser could read another value if two keys were equal."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("an object has two equal keys")
    return dict(pairs)


def _require(condition: bool, cause: str) -> None:
    """Raises `InvalidBundleError` with `cause` unless `condition` is true."""
    if not condition:
        raise InvalidBundleError(cause)


def _check_record(body: Mapping[str, Any]) -> list[str]:
    """Checks the values of bundle.json that `compare_logits` uses; returns the files that bundle.json must list.

    A value that is missing or has a wrong type raises one of `_JSON_ERRORS`.
    """
    sizes = {name: len(body[name]) for name in ("models", "labels", "files")} | {"max_length": int(body["max_length"])}
    for name, size in sizes.items():
        _require(0 < size <= LIMITS[name], f"{BUNDLE} has {size} as the size of {name}, not 1 to {LIMITS[name]}")
    _require(0 <= int(body["pad_id"]) <= MAX_ID, f"{BUNDLE} has an impossible pad_id")
    names = {str(m["variant"]) for m in body["models"]}
    are_names_usable = len(names) == sizes["models"] and all(re.fullmatch(r"[\w.+-]{1,200}", name) for name in names)
    _require(are_names_usable, f"{BUNDLE} names a model twice, or has an impossible name of a model")
    for model in body["models"]:
        inputs, outputs = ([tensor["name"] for tensor in model[key]] for key in ("inputs", "outputs"))
        is_known = inputs == [TEXT] or set(TOKEN_INPUTS[:2]) <= set(inputs) <= set(TOKEN_INPUTS)
        _require(is_known and LOGITS in outputs, f"{BUNDLE} has a model with unknown inputs or without logits")
        _check_settings(model.get("app_settings"))
        limits = [model["tolerance"][key] for key in ("largest", "median")]
        _require(all(0 <= limit <= 1e300 for limit in limits), f"{BUNDLE} has an impossible tolerance")
    _parse_release(body["onnxruntime"])
    _saturable_models(body)
    return [file for model in body["models"] for _, file in model_files(model)] + _tokenizer_graphs(body)


def _check_settings(settings: Any) -> None:
    """Checks the settings with which an app runs a model; None is a model without settings."""
    if settings is None:
        return
    session = settings["session"]
    counts = [settings["threads"], session["inter_op_threads"], settings["batch_size"] or 1]
    is_usable = all(type(count) is int and 0 < count <= 4096 for count in counts)
    is_usable &= all(type(session[name]) is bool for name in ("spinning", "memory_arena", "memory_pattern"))
    is_usable &= session["execution_mode"] in ("sequential", "parallel") and settings["padding"] in ("longest", "fixed")
    is_usable &= session["graph_optimization"] in ("basic", "extended", "all")
    _require(is_usable, f"{BUNDLE} has impossible settings for an app")


def _tokenizer_graphs(body: Mapping[str, Any]) -> list[str]:
    """Returns the file of the separate tokenizer graph in a list; an empty list without one."""
    file = (body.get("tokenizer_in_graph") or {}).get("file")
    return [] if file is None else [str(file)]


def _check_file(folder: Path, path: str, size: int, digest: str) -> None:
    location = folder
    for part in PurePosixPath(path).parts:
        location = location / part
        _require(not location.is_symlink(), f"{path} is a link")
    _require(location.is_file(), f"{path} is missing, or is not a regular file")
    actual_size = location.stat().st_size
    _require(actual_size == size, f"{path} has {actual_size} bytes instead of {size}")
    _require(size <= MAX_FILE_BYTES, f"{path} has more than {MAX_FILE_BYTES} bytes")
    sha256 = hashlib.sha256()
    with location.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    _require(sha256.hexdigest() == digest, f"the sha256 of {path} differs from the sha256 in {BUNDLE}")


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

    rows, runs, recorded = _read_golden(folder, body)
    _compare_tokens(folder, body, rows)
    models = [
        (variant, name, file, recorded.get(variant, ()), m["tolerance"], [t["name"] for t in m["inputs"]])
        for m in body["models"]
        for variant in [str(m["variant"])]
        for name, file in model_files(m)
    ]
    check_runtime(body)
    option_needed = saturates()
    for file in _tokenizer_graphs(body):
        _check_tokenizer(folder / file, _session_options(body, None, option_needed), rows)
    settings = {str(model["variant"]): model.get("app_settings") for model in body["models"]}
    for variant, name, file, expected, tolerance, inputs in models:
        _require(len(expected) == len(runs), f"{GOLDEN} does not have the logits of {name}")
        options = _session_options(body, settings[variant], option_needed)
        try:
            session = ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # The exception classes of onnxruntime have no common base class but Exception.
            # ONNX Runtime refuses the session option `EXACT_PRODUCTS` for a model whose layers share weights.
            if option_needed and variant in _saturable_models(body):
                raise UnsuitableRuntimeError(
                    f"{file} cannot be loaded on a processor that saturates 8-bit products: {error}", _SATURATION_HINT
                ) from error
            raise InvalidBundleError(f"{file} cannot be loaded: {error}") from error
        deltas = _compute_deltas(session, file, runs, expected, inputs, int(body["pad_id"]))
        largest, median = max(deltas), sorted(deltas)[len(deltas) // 2]
        for kind, delta in (("largest", largest), ("median", median)):
            cause = f"{name}: the {kind} difference from the recorded logits is {delta:.3g} (limit {tolerance[kind]:g})"
            _require(delta <= tolerance[kind], cause)
        yield name, largest, tolerance["largest"]


def _session_options(body: Mapping[str, Any], settings: Mapping[str, Any] | None, exact: bool) -> Any:
    """Returns the options of a session with the settings of a model, except its threads, which change no logit."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    if exact:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    if body.get("tokenizer_in_graph"):
        import onnxruntime_extensions

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    if settings:
        session = settings["session"]
        options.execution_mode = getattr(ort.ExecutionMode, f"ORT_{session['execution_mode'].upper()}")
        level = f"ORT_ENABLE_{session['graph_optimization'].upper()}"
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.enable_cpu_mem_arena = session["memory_arena"]
        options.enable_mem_pattern = session["memory_pattern"]
    return options


def _read_golden(folder: Path, body: Mapping[str, Any]) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Reads golden.json.

    Returns:
        For each sentence, its text and its recorded token ids; for each run of a model, the side of the padding and the
        sentences of the batch; for each variant, the recorded logits of each sentence of each run.
    """
    import numpy as np

    try:
        golden = json.loads((folder / GOLDEN).read_text(encoding="utf-8"), parse_constant=int)
        rows = [(str(each["text"]), [int(i) for i in each["input_ids"]]) for each in golden["sentences"]]
        batches = [(str(each["padding"]), [rows[int(i)] for i in each["sentences"]]) for each in golden["batches"]]
        logits = {
            str(name): [
                [np.array(row, np.float32) for row in batch]
                for batch in [*([row] for row in single), *golden["batch_logits"][name]]
            ]
            for name, single in golden["logits"].items()
        }
    except _JSON_ERRORS as error:
        raise InvalidBundleError(f"{GOLDEN} cannot be read: {error!r:.300}") from error
    _require(bool(rows and batches), f"{GOLDEN} has no sentences or no batches")
    count, limit = len(rows) + sum(len(batch) for _, batch in batches), LIMITS["golden sentences"]
    _require(count <= limit, f"{GOLDEN} has more than {limit} sentences")
    max_length = int(body["max_length"])
    is_usable = all(0 < len(ids) <= max_length and 0 <= min(ids) <= max(ids) <= MAX_ID for _, ids in rows)
    is_usable &= all(side in ("left", "right") and batch for side, batch in batches)
    _require(is_usable, f"{GOLDEN} has a sentence or a batch that no model can read")
    return rows, [("right", [row]) for row in rows] + batches, logits


def _compare_tokens(folder: Path, body: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """Raises `InvalidBundleError` unless the tokenizer gives the recorded tokens of every golden sentence."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(int(body["max_length"]))
        text = next((text for text, ids in rows if tokenizer.encode(text).ids != ids), None)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and for a crash a subclass of BaseException
        raise InvalidBundleError(f"tokenizer.json cannot be used: {error!r:.300}") from error
    _require(text is None, f"the tokenizer splits {text!r:.60} into tokens that differ from the tokens in {GOLDEN}")


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
                delta = np.abs(actual - expected_row).max() if actual.shape == expected_row.shape else np.inf
                deltas.append(float(delta) if np.isfinite(delta) else float("inf"))
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
        is_equal = tokens[0][mask[0] == 1].tolist() == ids
        _require(is_equal, f"the tokenizer graph splits {text[:60]!r} into tokens that differ from those in {GOLDEN}")


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
    except PermissionError as error:
        print(f"{error.filename} cannot be read: {error.strerror}", file=sys.stderr)
        return 1
    except BundleError as error:
        print(f"FAILED: {error}.", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
