"""The check of a bundle: its files, its record, its graphs, and the logits of its models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ProviderError, ShippingError, VerdictError
from toolchain.ship.bundle_files import verify as bundle_verifier
from toolchain.ship.bundle_files.verify import InvalidBundleError
from toolchain.ship.bundle_record import BundleRecord, decode_record
from toolchain.ship.process import GOLDEN_ROWS, BundleProcess
from toolchain.ship.signing import Verifier
from toolchain.system.extras import install_hint

if TYPE_CHECKING:
    from google.protobuf.message import Message


def check_bundle(
    folder: Path, bundle_id: str | None = None, verifier: Verifier | None = None
) -> tuple[BundleRecord, dict[str, Any]]:
    """Checks that a bundle is unmodified and that its models compute the recorded logits on this machine.

    A child process with limits of time and memory opens the bundle's graphs and its tokenizer; see `BundleProcess`.

    Returns:
        The record of the bundle; and for each model file, the ``largest_delta`` from the recorded logits and the
        ``tolerance``.

    Raises:
        ShippingError: The folder holds no bundle.
        VerdictError: The bundle was modified, exceeds a limit, or this runtime cannot compute the recorded logits.
        ProviderError: The bundle needs onnxruntime-extensions, which is not installed.
    """
    body, record = read(folder)
    _check_author(folder, record.id, bundle_id, verifier)
    with closing(BundleProcess(folder, record, GOLDEN_ROWS)) as process:
        return record, process.compare(body)


def _check_author(folder: Path, found_id: str, expected_id: str | None, verifier: Verifier | None) -> None:
    """Raises `VerdictError` if the bundle has another id than the expected one, or has no valid signature."""
    if expected_id and found_id != expected_id:
        raise VerdictError(
            f"{folder} has the id {found_id} instead of {expected_id}.",
            "Do not use this bundle; get the expected one from its author.",
        )
    if verifier:
        verifier.check(folder)


def check_own_bundle(folder: Path) -> None:
    """Checks a bundle that this process wrote; raises the errors of `check_bundle`.

    The check runs in this process, because the bundle's models come from this machine.
    """
    body, _ = read(folder)
    compare(folder, body)


def read(folder: Path) -> tuple[dict[str, Any], BundleRecord]:
    """Compares every file of a bundle with bundle.json; opens no graph and no tokenizer.

    Returns:
        The content of bundle.json for `compare`, and its record.

    Raises:
        ShippingError: The folder holds no bundle.
        VerdictError: The bundle was modified, or its bundle.json is invalid.
    """
    with _translate_errors(folder):
        body = bundle_verifier.read_bundle(folder)
        try:
            return body, decode_record(body)
        except ValueError as error:
            raise InvalidBundleError(f"{bundle_verifier.BUNDLE} is invalid: {error}") from error


def compare(folder: Path, body: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the models of a bundle in this process, and compares tokens and logits with the recorded ones.

    Args:
        folder: Folder of the bundle.
        body: Content of bundle.json from `read`.

    Returns:
        For each model file, the ``largest_delta`` from the recorded logits and the ``tolerance``.

    Raises:
        VerdictError: A graph is invalid, or this runtime cannot compute the recorded logits.
        ProviderError: The bundle needs onnxruntime-extensions, which is not installed.
    """
    with _translate_errors(folder):
        tokenizer_file = (body.get("tokenizer_in_graph") or {}).get("file")
        for file in [model["file"] for model in body["models"]] + ([tokenizer_file] if tokenizer_file else []):
            require_single_file(folder / file)
        return {
            variant: {"largest_delta": largest, "tolerance": tolerance}
            for variant, largest, tolerance in bundle_verifier.compare_logits(folder, body)
        }


@contextmanager
def _translate_errors(folder: Path) -> Iterator[None]:
    """Converts the errors of verify.py to errors of the toolchain."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        fault = f"{folder} is not a bundle: it has no {bundle_verifier.BUNDLE}."
        raise ShippingError(
            fault if folder.is_dir() else f"There is no folder {folder}.", "Name a folder that `toolchain ship` wrote."
        ) from error
    except ImportError as error:
        raise ProviderError(
            f"The models of {folder} contain the tokenizer and need the package {error.name}, which is not installed.",
            install_hint("text"),
        ) from error
    except bundle_verifier.BundleError as error:
        raise VerdictError(f"{folder}: {error.cause}.", f"{error.hint}.") from error


def require_single_file(path: Path) -> None:
    """Raises `InvalidBundleError` if a model stores tensors in files other than its .onnx file.

    A model that stores tensors in separate files could make ONNX Runtime open any path.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        # ONNX Runtime reads this format, whatever the ending of the name is.
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise InvalidBundleError(f"{path.name} is not an ONNX file") from error
    if (name := next(external_tensors(model), None)) is not None:
        raise InvalidBundleError(f"{path.name} stores the tensor {name[:60]!r} in another file")


def external_tensors(model: Message) -> Iterator[str]:
    """Yields the names of the tensors that an ONNX model stores in files other than the .onnx file.

    The function visits every message of the model: graphs and their subgraphs, local functions, sparse tensors and
    training graphs. It does not call itself, because graphs in graphs could exhaust Python's stack.
    """
    from onnx import TensorProto

    messages = [model]
    while messages:
        message = messages.pop()
        if isinstance(message, TensorProto):
            if message.data_location == TensorProto.EXTERNAL or message.external_data:
                yield message.name
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                messages.extend(value if field.is_repeated else [value])
