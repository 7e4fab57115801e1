"""The functions behind the commands `ship`, which writes variants to a bundle, and `verify`, which checks a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain import passes
from toolchain.artifacts import variants
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.publishing import lock, replace, scratch_folder
from toolchain.artifacts.store import Artifact
from toolchain.backends import Place, open_session
from toolchain.build import onnx_metadata
from toolchain.build.pipeline import ensure
from toolchain.build.reference_logits import ReferenceLogits
from toolchain.build.steps.validate import SEED as VALIDATION_SEED
from toolchain.build.steps.validate import SENTENCES as VALIDATION_SENTENCES
from toolchain.build.steps.validate import TEXTS, TOLERANCE, validate, validation_summary
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.datasets import hub_dataset
from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import TOKENS
from toolchain.errors import ArtifactError, ShippingError, VerdictError
from toolchain.models.checkpoints import NOT_STATED, REFERENCE_LICENSE, ROOT_VARIANT
from toolchain.progress import Bar, Say
from toolchain.results.folder import DEFAULT_FOLDER, ResultsFolder
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile
from toolchain.results.scores import Accuracy, EntityScore, Score
from toolchain.results.session_file import LATENCY, SessionFile
from toolchain.results.session_settings import AppSettings
from toolchain.ship import bundles, checking
from toolchain.ship.bundle_files import verify as bundle_verifier
from toolchain.ship.bundles import Contents, Provenance
from toolchain.ship.exit_points import with_exit_confidence
from toolchain.ship.golden import select_stable_sentences
from toolchain.ship.signing import Signer, Verifier
from toolchain.ship.targets import TARGETS, WEBGPU, Target, clients, device, webgpu
from toolchain.ship.targets.releases import DEFAULT
from toolchain.ship.tokenizer_graph.characters import SHIP_WITHOUT_HINT
from toolchain.ship.tokenizer_graph.session import TextSession
from toolchain.system import hardware
from toolchain.system.files import temporary_folder

SENTENCES, SEED = 16, 6
REFERENCE_PROVENANCE = Provenance(
    name="reference",
    source={},
    license=REFERENCE_LICENSE,
    origin="DistilBERT, fine-tuned by the toolchain's authors from sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)",
    data="SST-2 (GLUE); the Stanford Sentiment Treebank is published for research, with citation "
    "(Socher et al., EMNLP 2013)",
    base_model="sentence-transformers/all-MiniLM-L6-v2",
    datasets=("nyu-mll/glue",),
    languages=("en",),
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
        ort_mobile: Release of ONNX Runtime on the phones, one of `RELEASES`; used by the mobile target only.
        results: Folder of the result files from which the bundle takes its benchmark figures.
        signer: Private key that signs the bundle; None for a bundle without a signature.
        session: Session file of one of the variants; None for default settings.
        objective: Objective whose settings the bundle takes from `session`, one of `OBJECTIVES`.
        exit_confidence: Confidence threshold of the exits; None for the threshold that the build chose.
    """

    variants: tuple[str, ...]
    target: str
    license: str | None = None
    demo: bool = True
    with_tokenizer: bool = False
    ort_mobile: str = DEFAULT
    results: ResultsFolder = DEFAULT_FOLDER
    signer: Signer | None = None
    session: SessionFile | None = None
    objective: str = LATENCY
    exit_confidence: float | None = None


def ship(workspace: Workspace, order: Order, output: Path, say: Say, bar: Bar) -> dict[str, Any]:
    """Builds the missing or stale variants, writes the bundle and returns the content of its bundle.json.

    The function writes the new bundle to a scratch folder, verifies it there, and renames the folder to `output`. If
    `output` already holds an equal bundle, the folder stays unchanged. With a signer, the folder stays unchanged only
    if it also has a valid signature of this signer.

    Args:
        order: The options.
        output: Folder of the bundle.

    Raises:
        ShippingError: The target cannot run a variant, the variants have different tokenizers, the session file
            belongs to another artifact, or the build of a variant did not measure `exit_confidence`.
        VerdictError: A variant failed its validation, or a model file's logits differ from the artifact's logits.
        ArtifactError: `output` is a file, a folder without a bundle, or a modified bundle.
        ProviderError: onnxruntime-extensions is not installed.
    """
    target = TARGETS[order.target]
    check_names(order.variants, target)
    if order.with_tokenizer and target.no_tokenizer_reason:
        raise ShippingError(
            f"A bundle for {target.name} cannot have the tokenizer in the graph: {target.no_tokenizer_reason}.",
            SHIP_WITHOUT_HINT,
        )
    artifacts_by_name = ensure(workspace, order.variants, {}, say, bar)
    artifacts = [artifacts_by_name[name] for name in order.variants]
    if order.exit_confidence is None:
        return _ship(workspace, order, artifacts, output, say)
    with temporary_folder() as scratch:
        artifacts = [
            with_exit_confidence(each, order.exit_confidence, scratch / each.manifest.variant) for each in artifacts
        ]
        return _ship(workspace, order, artifacts, output, say)


def _ship(workspace: Workspace, order: Order, artifacts: Sequence[Artifact], output: Path, say: Say) -> dict[str, Any]:
    """Checks the artifacts, and writes and publishes the bundle; see `ship`."""
    target = TARGETS[order.target]
    check_task(artifacts[0].label_set.task, target, order.with_tokenizer)
    for artifact in artifacts:
        _check_artifact(artifact, target)
        if artifact.manifest.tokenizer != artifacts[0].manifest.tokenizer:
            raise ShippingError(
                f"{order.variants[0]} and {artifact.manifest.variant} have different tokenizers, but a bundle has one "
                "tokenizer.",
                "Ship the two variants in separate bundles.",
            )
    page_files: dict[str, Path] = {}
    if target is TARGETS["web"] and order.demo:
        modules = clients.install(workspace.exported / ".cache")
        has_webgpu = any(device(artifact.manifest.variant) == WEBGPU for artifact in artifacts)
        page_files = {path: modules / file for path, file in clients.browser_files(webgpu=has_webgpu).items()}
    measurements = order.results.measurements_of([artifact.manifest.id for artifact in artifacts], say)
    contents = Contents(
        target,
        artifacts,
        _provenance(workspace, artifacts[0].manifest, order.license),
        select_stable_sentences(
            artifacts, [*TEXTS.values(), *map(str, inputs.load_embedded().sample(SENTENCES, SEED))]
        ),
        {artifact_id: _measurement_entry(*row) for artifact_id, row in measurements.items()},
        page_files,
        order.with_tokenizer,
        order.ort_mobile if target is TARGETS["mobile"] else None,
        _app_settings(order, artifacts),
    )
    with lock(output, lambda: say(f"{output}: another run is writing this bundle, waiting")):
        check_output(output)
        return _publish(contents, output, say, order.signer)


def _app_settings(order: Order, artifacts: Sequence[Artifact]) -> dict[str, AppSettings]:
    """Returns the settings of the session file, by artifact id; empty without a session file.

    Raises:
        ShippingError: The session file belongs to none of the artifacts.
    """
    if order.session is None:
        return {}
    if order.session.artifact_id not in [artifact.manifest.id for artifact in artifacts]:
        names = " and ".join(order.variants)
        raise ShippingError(
            f"The session file belongs to {order.session.variant} with the id {order.session.artifact_id[:12]}, which "
            f"is not the current artifact of {names}.",
            f"Measure the current artifact: `toolchain tune --session {order.variants[0]}`.",
        )
    return {order.session.artifact_id: order.session.choices[order.objective].settings}


def _publish(contents: Contents, output: Path, say: Say, signer: Signer | None) -> dict[str, Any]:
    with scratch_folder(output) as scratch:
        # A signature contains the name of the folder that it signs.
        folder = scratch / f"{contents.provenance.name}-{contents.target.name}"
        folder.mkdir()
        body = bundles.write(contents, folder)
        if contents.release or contents.with_tokenizer:
            _compare(contents, body, folder, say)
        if signer:
            signer.sign(folder)
        equal = output.exists() and bundle_verifier.read_bundle(output)["id"] == body["id"]
        if equal and (not signer or signer.has_signed(output, folder / bundle_verifier.SIGNATURE)):
            say(f"{output}: an equal bundle exists and stays unchanged")
            return body
        checking.check_own_bundle(folder)
        replace(folder, output)
    say(f"{output}: written and verified, {sum(entry['bytes'] for entry in body['files']) / 1e6:.1f} MB")
    return body


def _compare(contents: Contents, body: Mapping[str, Any], folder: Path, say: Say) -> None:
    """Compares every model file with its artifact on the validation sentences.

    Raises:
        VerdictError: The logits of a file differ from the logits of its artifact.
    """
    sentences = list(map(str, inputs.load_embedded().sample(VALIDATION_SENTENCES, VALIDATION_SEED)))
    place = Place("cpu", hardware.cores())
    for artifact, model in zip(contents.artifacts, body["models"], strict=True):
        names = [spec.name for spec in artifact.manifest.inputs]
        encoder = Encoder.open(artifact.path, names, artifact.manifest.max_length)
        original = ReferenceLogits(artifact, "onnx", place)
        for name, file in bundle_verifier.model_files(model):
            if contents.with_tokenizer:
                passed, summary = _compare_texts(folder / file, original, encoder, sentences)
            else:
                session = open_session(folder / file, "onnx", place)
                report = validate(session, original, encoder, sentences, "exact")
                passed, summary = report["passed"], validation_summary(report)
                session.close()
            if not passed:
                raise VerdictError(
                    f"The logits of {file} differ from the logits of {model['variant']}: {summary}.",
                    "Ship another variant, or for phones, pass a newer release as --ort-mobile.",
                )
            say(f"{name}: {summary}")
        original.close()


def _compare_texts(file: Path, original: ReferenceLogits, encoder: Encoder, texts: Sequence[str]) -> tuple[bool, str]:
    """Compares the logits of two models on each text.

    The first model is `file`, whose graph contains the tokenizer. The second model is the original model, which takes
    the token ids that `encoder` returns.

    Returns:
        Whether all logits of the graph differ from the original model's logits by at most `TOLERANCE`, and a summary
        with the figures.
    """
    import numpy as np

    session = TextSession(file, hardware.cores())
    deltas = []
    for text, row in zip(texts, encoder.encode(texts), strict=True):
        expected = original.run(pad([row], encoder.names, encoder.pad_id))
        deltas.append(float(np.abs(session.run([text])[bundle_verifier.LOGITS] - expected).max()))
    session.close()
    largest = max(deltas)
    return largest <= TOLERANCE, f"largest |Δlogit| {largest:.2g} over {len(deltas)} texts (limit {TOLERANCE:g})"


def check_output(output: Path) -> None:
    """Raises `ArtifactError` if `output` is a file, a folder without a bundle, or a modified bundle."""
    if not (output.exists() or output.is_symlink()):
        return
    hint = "Move the existing file or folder away, or name another folder with --output."
    try:
        bundle_verifier.read_bundle(output)
    except FileNotFoundError as error:
        raise ArtifactError(f"{output} exists and is not a bundle.", hint) from error
    except NotADirectoryError as error:
        raise ArtifactError(f"{output} is a file.", hint) from error
    except bundle_verifier.InvalidBundleError as error:
        raise ArtifactError(f"{output} was modified: {error.cause}.", hint) from error


def check_names(names: Sequence[str], target: Target) -> None:
    """Raises `ShippingError` for a PyTorch variant, a repeated name, or two variants with the same bundle path."""
    variants_by_path: dict[str, str] = {}
    chosen = [variants.get(name) for name in names]
    for index, name in enumerate(names):
        if chosen[index].runtime != "onnx":
            raise ShippingError(
                f"{name} is a PyTorch variant and has no .onnx file.", "Ship an ONNX variant such as onnx-int8."
            )
        path = target.path([variant.name for variant in chosen], index)
        previous = variants_by_path.setdefault(path, name)
        if previous != name:
            raise ShippingError(
                f"{previous} and {name} would both have the path {path}.", "Ship the two variants in separate bundles."
            )
    if len(set(names)) < len(names):
        raise ShippingError("A variant is named twice.", "Name each variant once.")


def check_task(task: str, target: Target, with_tokenizer: bool = False) -> None:
    """Raises `ShippingError` if a bundle for the target cannot have a model of this task."""
    if task != TOKENS:
        return
    if with_tokenizer or target.tokenizer_path:
        raise ShippingError(
            "A bundle of a token classifier cannot have the tokenizer in a graph, because the graph does not return "
            "the positions of the tokens in the text.",
            "Ship for python, web, mobile or other, without --with-tokenizer.",
        )
    places = {"mlflow": "the columns of an MLflow model hold", "ray-serve": "the outputs of the server hold"}
    if target.name in places:
        raise ShippingError(
            f"A bundle for {target.name} cannot have a token classifier, because {places[target.name]} the same number "
            "of values for each text, not a list of entities.",
            "Ship for python, web, mobile or other.",
        )


def _check_artifact(artifact: Artifact, target: Target) -> None:
    """Checks an artifact before it is shipped.

    Raises:
        VerdictError: The artifact did not pass its validation.
        ShippingError: The graph has operators that the target lacks.
    """
    name = artifact.manifest.variant
    if artifact.manifest.validation.get("passed") is not True:
        raise VerdictError(f"{name} did not pass validation.", f"`toolchain validate {name}` shows the reason.")
    graph = passes.read(artifact.onnx_path)
    if target is TARGETS["web"] and name.parts.webgpu:
        webgpu.require_supported(name, graph)
    missing = sorted({node.op_type for node in graph.graph.all_nodes() if node.domain not in target.domains})
    if missing:
        replacement = "onnx-std-int8" if name.parts.scheme == "int8" else "onnx-std"
        raise ShippingError(
            f"{name} uses operators that only ONNX Runtime has: {', '.join(missing)}.",
            f"Ship a variant with standard operators such as {replacement}.",
        )


def _provenance(workspace: Workspace, manifest: Manifest, license_: str | None) -> Provenance:
    """Returns the provenance of the model; shortens the path of a local folder to the folder's name.

    The provenance names data of the hub, but no file, because a file's name may be private.
    """
    source = {key: str(value) for key, value in manifest.source.items()}
    if source["kind"] == "embedded":
        return dataclasses.replace(
            REFERENCE_PROVENANCE, source=source, license=license_ or REFERENCE_PROVENANCE.license
        )
    source = {key: Path(value).name if Path(value).is_absolute() else value for key, value in source.items()}
    kind = "a local folder" if source["kind"] == "folder" else "the model hub"
    license_ = license_ or onnx_metadata.license_of(manifest)
    root = workspace.load(ROOT_VARIANT)
    facts = root.manifest.facts if root else {}
    data = inputs.data_name(facts.get("trained_on", ""))
    dataset = hub_dataset(data)
    return Provenance(
        workspace.model,
        source,
        license_,
        f"{source['ref']}, from {kind}",
        data if dataset else NOT_STATED,
        source["ref"] if source["kind"] == "hub" else facts.get("base_model"),
        (dataset[0],) if dataset else (),
        tuple(facts.get("languages", ())),
    )


def _measurement_entry(run: ResultFile, row: Measurement) -> dict[str, Any]:
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
        **({row.score.key: _score_entry(row.score)} if row.score else {"accuracy": None}),
        "latency_ms": {name: row.latency_ms[name] for name in ("p50", "p95")} if row.latency_ms else None,
        "sentences_per_s": row.throughput_per_s,
    }


def _score_entry(score: Score) -> dict[str, Any]:
    """Returns the score of a benchmark row without its batch size."""
    if isinstance(score, Accuracy):
        return {"value": score.value, "count": score.count}
    if isinstance(score, EntityScore):
        return {"value": score.value, "precision": score.precision, "recall": score.recall, "count": score.count}
    return {"r2": score.r2, "mean_absolute_error": score.mean_absolute_error, "count": score.count}


def verify(folder: Path, bundle_id: str | None = None, verifier: Verifier | None = None) -> dict[str, Any]:
    """Checks that a bundle is unmodified and that its models compute the reference logits on this machine.

    Args:
        folder: Folder of the bundle.
        bundle_id: Id that the bundle must have; None for any id.
        verifier: Public key or root certificates that must confirm the signature; None to ignore the signature.

    Returns:
        A dict with ``id``, ``target``, the number of ``files``, ``signature`` and ``models``. The ``signature`` is
        ``valid``, ``not checked``, or None without a signature. For each model file, ``models`` holds the
        ``largest_delta`` from the reference logits and the ``tolerance``.

    Raises:
        ShippingError: The folder holds no bundle.
        VerdictError: The bundle was modified, has another id or no valid signature, or this runtime cannot compute the
            bundle's reference logits.
        ProviderError: The bundle needs onnxruntime-extensions, which is not installed.
    """
    record, models = checking.check_bundle(folder, bundle_id, verifier)
    unchecked = "not checked" if (folder / bundle_verifier.SIGNATURE).exists() else None
    return {
        "id": record.id,
        "target": record.target,
        "files": len(record.files),
        "signature": "valid" if verifier else unchecked,
        "models": models,
    }


def default_output(workspace: Workspace, target: str) -> Path:
    """Returns the default folder of a bundle for a target."""
    return workspace.exported / workspace.model / f"bundle-{target}"
