"""The commands `ship`, which writes variants of a model to a bundle, and `verify`, which checks a bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import passes
from toolchain.artifacts import variants
from toolchain.artifacts.publishing import building, lock, replace
from toolchain.artifacts.store import Artifact, Manifest
from toolchain.backends import Place, Session, open_session
from toolchain.bench import run
from toolchain.build import onnx_metadata
from toolchain.build.pipeline import ensure
from toolchain.build.steps.validate import SEED as VALIDATED_SEED
from toolchain.build.steps.validate import SENTENCES as VALIDATED
from toolchain.build.steps.validate import TEXTS, TOLERANCE, sentence, validate
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.inputs import Encoder, pad
from toolchain.errors import ArtifactError, ProviderError, ShippingError, VerdictError
from toolchain.models.checkpoints import NOT_STATED, REFERENCE_LICENSE
from toolchain.progress import Bar, Say
from toolchain.results.measurements import Measurement, ResultFile
from toolchain.ship import bundles
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.bundles import Contents, Origin
from toolchain.ship.targets import TARGETS, Target, clients
from toolchain.ship.targets.releases import DEFAULT
from toolchain.ship.tokenizer_graph.characters import WITHOUT
from toolchain.ship.tokenizer_graph.session import TextSession
from toolchain.system import hardware

if TYPE_CHECKING:
    import onnx

SENTENCES, SEED = 16, 6
REFERENCE = Origin(
    name="reference",
    source={},
    license=REFERENCE_LICENSE,
    origin="DistilBERT fine-tuned by the toolchain's authors from sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)",
    data="SST-2 (GLUE); the Stanford Sentiment Treebank is published for research with citation "
    "(Socher et al., EMNLP 2013)",
)


@dataclasses.dataclass(frozen=True)
class Order:
    """The options of `ship`.

    Attributes:
        variants: Names of the variants, in the order of the bundle.
        target: Name of the target.
        license: Licence for the bundle; None for the licence that the model states.
        demo: Whether a web bundle has a demo page.
        with_tokenizer: Whether each graph contains the tokenizer.
        ort_mobile: Release of ONNX Runtime on the phones, one of `RELEASES`; only for the mobile target.
    """

    variants: tuple[str, ...]
    target: str
    license: str | None = None
    demo: bool = True
    with_tokenizer: bool = False
    ort_mobile: str = DEFAULT


def ship(workspace: Workspace, order: Order, output: Path, say: Say, bar: Bar) -> dict[str, Any]:
    """Builds the missing or stale variants, writes the bundle and returns its bundle.json.

    `verify` checks the new bundle in a scratch folder before it is renamed to `output`. An equal bundle that exists
    already stays as it is.

    Args:
        order: The options.
        output: Folder of the bundle.

    Raises:
        ShippingError: The target cannot run a variant, or the variants have different tokenizers.
        VerdictError: A variant failed its validation, or its file in the bundle differs from the artifact.
        ArtifactError: `output` exists and is not an unmodified bundle.
        ProviderError: onnxruntime-extensions is missing.
    """
    target = TARGETS[order.target]
    _check_names(order.variants, target)
    if order.with_tokenizer and target.no_texts:
        raise ShippingError(
            f"A bundle for {target.name} cannot have the tokenizer in the graph: {target.no_texts}.",
            WITHOUT,
        )
    built = ensure(workspace, order.variants, {}, say, bar)
    chosen = [built[name] for name in order.variants]
    for artifact in chosen:
        _check(artifact, target)
        if artifact.manifest.tokenizer != chosen[0].manifest.tokenizer:
            raise ShippingError(
                f"{order.variants[0]} and {artifact.manifest.variant} have tokenizers of their own, and a bundle has "
                "room for one.",
                "Ship them in bundles of their own.",
            )
    found: dict[str, Path] = {}
    if target is TARGETS["web"] and order.demo:
        modules = clients.install(workspace.exported / ".cache")
        found = {path: modules / file for path, file in clients.BROWSER.items()}
    measured = run.cited([artifact.manifest.id for artifact in chosen], say)
    contents = Contents(
        target,
        chosen,
        _origin(workspace, chosen[0].manifest, order.license),
        [*TEXTS.values(), *map(str, inputs.embedded().sample(SENTENCES, SEED))],
        {artifact_id: _measured(*found_in) for artifact_id, found_in in measured.items()},
        found,
        order.with_tokenizer,
        order.ort_mobile if target is TARGETS["mobile"] else None,
    )
    with lock(output, lambda: say(f"{output}: another run is writing it, waiting")):
        _check_output(output)
        return _publish(contents, output, say)


def _publish(contents: Contents, output: Path, say: Say) -> dict[str, Any]:
    with building(output) as scratch:
        body = bundles.write(contents, scratch)
        if contents.release or contents.with_tokenizer:
            _compare(contents, body, scratch, say)
        if output.exists() and bundled.sealed(output)["id"] == body["id"]:
            say(f"{output}: the same already, unchanged")
            return body
        verify(scratch)
        replace(scratch, output)
    say(f"{output}: written and verified, {sum(entry['bytes'] for entry in body['files']) / 1e6:.1f} MB")
    return body


def _compare(contents: Contents, body: Mapping[str, Any], folder: Path, say: Say) -> None:
    """Compares every model file with its artifact on the validation sentences, on this machine.

    Raises:
        VerdictError: The logits of a file differ from those of its artifact.
    """
    sentences = list(map(str, inputs.embedded().sample(VALIDATED, VALIDATED_SEED)))
    place = Place("cpu", hardware.cores())
    for artifact, model in zip(contents.artifacts, body["models"], strict=True):
        names = [spec.name for spec in artifact.manifest.inputs]
        encoder = Encoder.open(artifact.path, names, artifact.manifest.max_length)
        original = open_session(artifact.path, "onnx", place)
        for name, file in bundled.files_of(model):
            if contents.with_tokenizer:
                passed, told = _compare_texts(folder / file, original, encoder, sentences)
            else:
                asked = open_session(folder / file, "onnx", place)
                report = validate(asked, original, encoder, sentences, "exact")
                passed, told = report["passed"], sentence(report)
                asked.close()
            if not passed:
                raise VerdictError(
                    f"{file} does not answer as {model['variant']} does: {told}.",
                    "Ship the variant for the newest --ort-mobile, or ship another variant.",
                )
            say(f"{name}: {told}")
        original.close()


def _compare_texts(file: Path, original: Session, encoder: Encoder, texts: Sequence[str]) -> tuple[bool, str]:
    """Compares a graph that contains the tokenizer with the original model on each text.

    Returns:
        Whether the largest difference of a logit is within `TOLERANCE`, and a summary with the figures.
    """
    import numpy as np

    session = TextSession(file, hardware.cores())
    deltas = []
    for text, row in zip(texts, encoder.encode(texts), strict=True):
        wanted = original.run(pad([row], encoder.names, encoder.pad_id))
        deltas.append(float(np.abs(session.run([text])[bundled.LOGITS] - wanted).max()))
    session.close()
    largest = max(deltas)
    return largest <= TOLERANCE, f"largest |Δlogit| {largest:.2g} over {len(deltas)} texts, ≤ {TOLERANCE:g} allowed"


def _check_output(output: Path) -> None:
    """Raises `ArtifactError` unless `output` is free or an unmodified bundle, which `ship` can build again."""
    if not (output.exists() or output.is_symlink()):
        return
    hint = "Move it away, or name another folder with --output."
    try:
        bundled.sealed(output)
    except FileNotFoundError as error:
        raise ArtifactError(f"{output} exists and is no bundle.", hint) from error
    except NotADirectoryError as error:
        raise ArtifactError(f"{output} is a file.", hint) from error
    except bundled.Broken as error:
        raise ArtifactError(f"{output} was changed since it was written: {error.cause}.", hint) from error


def _check_names(names: Sequence[str], target: Target) -> None:
    """Raises `ShippingError` for a PyTorch variant or two variants with one path. Called before any build."""
    places: dict[str, str] = {}
    chosen = [variants.get(name) for name in names]
    for index, name in enumerate(names):
        if chosen[index].runtime != "onnx":
            raise ShippingError(f"{name} is PyTorch's and no .onnx file.", "Ship an ONNX variant such as onnx-int8.")
        place = target.path([variant.name for variant in chosen], index)
        other = places.setdefault(place, name)
        if other != name:
            raise ShippingError(f"{other} and {name} would both be {place}.", "Ship them in bundles of their own.")
    if len(set(names)) < len(names):
        raise ShippingError("A variant is named twice.", "Name each once.")


def _check(artifact: Artifact, target: Target) -> None:
    """Checks an artifact before it is shipped.

    Raises:
        VerdictError: The artifact did not pass its validation.
        ShippingError: The graph has operators that the target lacks.
    """
    name = artifact.manifest.variant
    if artifact.manifest.validation.get("passed") is not True:
        raise VerdictError(f"{name} did not pass validation.", f"`toolchain validate {name}` shows why.")
    graph = passes.read(artifact.onnx_path)
    lacking = sorted({node.op_type for node in graph.graph.all_nodes() if node.domain not in target.domains})
    if lacking:
        instead = "onnx-std-int8" if name.parts.scheme == "int8" else "onnx-std"
        raise ShippingError(
            f"{name} uses {', '.join(lacking)}, which only ONNX Runtime has.",
            f"Ship a variant of standard operators such as {instead}.",
        )


def _origin(workspace: Workspace, manifest: Manifest, license_: str | None) -> Origin:
    """Returns the origin of the model, with only the last part of the path of a local folder."""
    source = {key: str(value) for key, value in manifest.source.items()}
    if source["kind"] == "embedded":
        return dataclasses.replace(REFERENCE, source=source, license=license_ or REFERENCE.license)
    source = {key: Path(value).name if Path(value).is_absolute() else value for key, value in source.items()}
    what = "a local folder" if source["kind"] == "folder" else "the model hub"
    license_ = license_ or onnx_metadata.license_of(manifest)
    return Origin(workspace.model, source, license_, f"{source['ref']}, from {what}", NOT_STATED)


def _measured(run: ResultFile, row: Measurement) -> dict[str, Any]:
    """Returns the figures of a benchmark row with the hardware of its run."""
    machine = run.machine
    return {
        "provider": row.provider,
        "cpu": machine["cpu"],
        "isa": machine["isa"],
        "gpu": [gpu["name"] for gpu in machine["gpu"]],
        "threads": run.run.get("threads"),
        "created": run.created,
        "data": run.data["name"],
        "accuracy": row.accuracy and {"value": row.accuracy.value, "count": row.accuracy.count},
        "latency_ms": {name: row.latency_ms[name] for name in ("p50", "p95")} if row.latency_ms else None,
        "sentences_per_s": row.throughput_per_s,
    }


def verify(folder: Path) -> dict[str, Any]:
    """Checks that a bundle is unmodified and computes its reference logits here.

    Returns:
        ``id``, ``target``, the number of ``files``, and ``models``: by model file the ``largest_delta`` from the
        reference logits and its ``tolerance``.

    Raises:
        ShippingError: The folder holds no bundle.
        VerdictError: The bundle was modified, or this runtime cannot compute its reference logits.
        ProviderError: The bundle needs onnxruntime-extensions, which is not installed.
    """
    body, models = checked(folder)
    return {"id": body["id"], "target": body.get("target"), "files": len(body["files"]), "models": models}


def checked(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checks a bundle as `verify` does, and raises the same errors.

    Returns:
        The content of bundle.json, and by model file the ``largest_delta`` from the reference logits with its
        ``tolerance``.
    """
    try:
        body = bundled.sealed(folder)
        apart = (body.get("tokenizer_in_graph") or {}).get("file")
        for file in [model["file"] for model in body["models"]] + ([apart] if apart else []):
            _check_single(folder / file)
        models = {
            variant: {"largest_delta": largest, "tolerance": tolerance}
            for variant, largest, tolerance in bundled.answers(folder, body)
        }
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShippingError(
            f"{folder} is no bundle: it holds no {bundled.BUNDLE}.", "Name a folder `toolchain ship` wrote."
        ) from error
    except ImportError as error:
        raise ProviderError(
            f"The models of {folder} have the tokenizer in the graph, and {error.name} is not installed.",
            'Install it: pip install "toolchain[text]".',
        ) from error
    except bundled.Refused as error:
        raise VerdictError(f"{folder}: {error.cause}.", f"{error.hint}.") from error
    return body, models


def _check_single(path: Path) -> None:
    """Raises `Broken` for a model with tensors in other files: a loader would open any path that the model names."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        tensors = list(external_tensors(onnx.load(str(path), load_external_data=False).graph))
    except (DecodeError, ValueError, OSError) as error:
        raise bundled.Broken(f"{path.name} is no ONNX file") from error
    if tensors:
        raise bundled.Broken(f"{path.name} keeps {tensors[0]} outside of itself")


def external_tensors(graph: onnx.GraphProto) -> Iterator[str]:
    """Yields the names of the tensors that a graph or its subgraphs store in other files."""
    from onnx import TensorProto

    attributes = [attribute for node in graph.node for attribute in node.attribute]
    tensors = [
        *graph.initializer,
        *(t for a in attributes for t in ([a.t] if a.HasField("t") else []) + list(a.tensors)),
    ]
    yield from (tensor.name for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL)
    for attribute in attributes:
        for part in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            yield from external_tensors(part)


def default_output(workspace: Workspace, target: str) -> Path:
    """Returns the default folder of a bundle for a target."""
    return workspace.exported / workspace.model / f"bundle-{target}"


def read(folder: Path) -> dict[str, Any] | None:
    """Returns the content of bundle.json without any check; None if the folder holds no bundle."""
    file = folder / bundled.BUNDLE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
