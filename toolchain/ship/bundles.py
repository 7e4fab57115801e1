"""The writer of bundles: folders for an app that need nothing of this package and contain their own check.

`bundle.json` describes the bundle and lists every file with its sha256. `golden.json` holds the golden sentences with
their token ids and reference logits. The bundle's id is the sha256 of the content of bundle.json without the id.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import passes
from toolchain.artifacts.store import Artifact, TensorSpec, list_files
from toolchain.artifacts.variants import settings_of, step_name
from toolchain.backends import Place
from toolchain.backends.ort import OrtSession, saturates
from toolchain.build.onnx_metadata import license_of, options_by_processor, set_properties
from toolchain.data.inputs import Encoder, pad
from toolchain.errors import ShippingError
from toolchain.passes.probabilities import add_probabilities
from toolchain.ship.bundle_files.verify import BUNDLE, GOLDEN, SCHEMA, TEXT, canonical_id
from toolchain.ship.targets import BUNDLED, DEMO, TARGETS, Target, dtype, mobile, served
from toolchain.ship.targets.releases import DEFAULT, ORDER
from toolchain.ship.targets.uses import oldest_release, read_needs
from toolchain.ship.tokenizer_graph import proven, with_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

# Limits on the largest and the median difference from the recorded logits on other machines. Other kernels add in
# another order. In fp32 this changes the rounding. In int8 an activation sometimes rounds to the next of its 256 steps,
# which changes the logits of a few sentences only; saturated products change most sentences. In int4 a runtime may
# compute with activations of 8 or of 32 bits.
TOLERANCES = {
    "fp32": {"largest": 1e-3, "median": 1e-4},
    "fp16": {"largest": 5e-2, "median": 5e-2},
    "int8": {"largest": 0.5, "median": 1e-2},
    "int4": {"largest": 0.5, "median": 0.1},
}
TOKENIZER, TOKENIZER_CONFIG, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
# Processors on which a model is exact, as text for bundle.json.
NEEDS_OPTION = (
    "x86-64 with VNNI or AMX (Intel from Cascade Lake and Ice Lake on, AMD from Zen 4 on), 64-bit ARM, and "
    "WebAssembly; on older x86-64 only with the session option below, without which its 8-bit products saturate"
)
ANYWHERE = "any processor"
GOLDEN_BATCH = 8  # sentences in each padded batch
TEXT_SPEC = TensorSpec(TEXT, "string", ("texts",))
# A tokenizer graph pads to a multiple of this number of tokens, since a server batches only inputs of equal width.
MULTIPLE = 16


@dataclass(frozen=True)
class Origin:
    """The name, licence and provenance of a model.

    Attributes:
        name: Name of the model.
        source: Source of the checkpoint, as in its manifest.
        license: Licence of the model.
        origin: Provenance, as a text for readers.
        data: Data of the fine-tuning, as a text for readers.
    """

    name: str
    source: Mapping[str, str]
    license: str
    origin: str
    data: str


@dataclass(frozen=True)
class Contents:
    """The content of a bundle.

    Attributes:
        target: The target.
        artifacts: Artifacts of the variants, in order.
        origin: Name, licence and provenance of the model.
        sentences: The golden sentences.
        measured: Benchmark figures by artifact id.
        clients: JavaScript files for the demo page, by their path in the bundle; empty for no page.
        with_tokenizer: Whether each graph contains the tokenizer and takes texts.
        release: Release of ONNX Runtime on the phones; None for all targets except phones.
    """

    target: Target
    artifacts: Sequence[Artifact]
    origin: Origin
    sentences: Sequence[str]
    measured: Mapping[str, Mapping[str, Any]]
    clients: Mapping[str, Path] = field(default_factory=dict)
    with_tokenizer: bool = False
    release: str | None = None


def write(contents: Contents, folder: Path) -> dict[str, Any]:
    """Writes the bundle into an empty folder and returns the content of bundle.json, the last file to be written.

    Raises:
        ShippingError: The tokenizer does not work as a graph, this runtime saturates int8 products, or no release of
            ONNX Runtime (for phones: not the phone's release) can run a model correctly.
    """
    first = contents.artifacts[0]
    manifest = first.manifest
    encoder = Encoder.open(first.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    tokenizer: dict[str, Any] = {}
    if contents.with_tokenizer or contents.target.tokenizer:
        tokenizer = _tokenizer(contents, encoder, folder)
    models = [_model(contents, index, encoder, folder) for index in range(len(contents.artifacts))]
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        shutil.copyfile(first.path / name, folder / name)
    config = _config(contents)
    _json(folder / CONFIG, config)
    golden = _golden(contents, encoder)
    _json(folder / GOLDEN, golden)
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "target": contents.target.name,
        "model": dataclasses.asdict(contents.origin),
        "labels": list(manifest.labels),
        "multi_label": encoder.multi_label,
        "max_length": manifest.max_length,
        "pad_id": encoder.pad_id,
        "tokenizer_in_graph": tokenizer or None,
        "onnxruntime": max((model["onnxruntime"] for model in models), key=ORDER.index),
        "models": models,
        **({"ort_mobile": contents.release} if contents.release else {}),
    }
    if contents.release:
        mobile.configure([folder / model["ort"]["file"] for model in models])
    _companions(contents, folder, body, golden)
    body["files"] = [dataclasses.asdict(entry) for entry in list_files(folder)]
    body["id"] = canonical_id(body)
    _json(folder / BUNDLE, body)
    return body


def _tokenizer(contents: Contents, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Compares the tokenizer graph with the checkpoint's tokenizer; writes it for a target with a separate graph.

    Returns:
        The entry ``tokenizer_in_graph`` of bundle.json.
    """
    if contents.with_tokenizer:
        return {"texts_compared": proven.compare(encoder, contents.sentences)}
    path = contents.target.tokenizer or ""
    (folder / path).parent.mkdir(parents=True)
    compared = proven.compare(encoder, contents.sentences, folder / path, MULTIPLE)
    return {"texts_compared": compared, "file": path, "multiple": MULTIPLE}


def _config(contents: Contents) -> dict[str, Any]:
    """Returns config.json without the path of the checkpoint; for the web target with the dtype for transformers.js."""
    config: dict[str, Any] = json.loads((contents.artifacts[0].path / CONFIG).read_text())
    config.pop("_name_or_path", None)
    if contents.target is TARGETS["web"]:
        config["transformers.js_config"] = {"dtype": dtype(contents.artifacts[0].manifest.variant)}
    return config


def _golden(contents: Contents, encoder: Encoder) -> dict[str, Any]:
    """Returns the golden sentences and padded batches, their token ids, and the exact logits of each variant.

    Raises:
        ShippingError: This runtime saturates the int8 products of a variant even with the session option.
    """
    rows = encoder.encode(contents.sentences)
    short = [index for index, row in enumerate(rows) if len(row) < encoder.max_length][:GOLDEN_BATCH]
    batches = [{"padding": side, "sentences": short} for side in ("right", "left")]
    alone = [pad([row], encoder.names, encoder.pad_id) for row in rows]
    padded = [pad([rows[i] for i in short], encoder.names, encoder.pad_id, left) for left in (False, True)]
    logits, batch_logits = {}, {}
    for artifact in contents.artifacts:
        name = artifact.manifest.variant
        if artifact.manifest.facts.get("int8_headroom", 1) < 1 and saturates(exact=True):
            raise ShippingError(
                f"This runtime saturates 8-bit products, so the recorded answers of {name} would be wrong.",
                "Install the newest onnxruntime, or ship a -portable variant.",
            )
        session = OrtSession(artifact.path, Place("cpu", 1))
        logits[name] = [_rounded(session.run(batch))[0] for batch in alone]
        batch_logits[name] = [_rounded(session.run(batch)) for batch in padded]
        session.close()
    sentences = [{"text": text, "input_ids": row} for text, row in zip(contents.sentences, rows, strict=True)]
    return {"sentences": sentences, "logits": logits, "batches": batches, "batch_logits": batch_logits}


def _rounded(logits: np.ndarray) -> list[list[float]]:
    return [[round(float(x), 6) for x in row] for row in logits]


def _placed(contents: Contents, artifact: Artifact, encoder: Encoder, file: Path) -> dict[str, Any]:
    """Writes the file of a variant; returns the extra entries of bundle.json for phones, else an empty dictionary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    source = artifact.onnx_path
    with tempfile.TemporaryDirectory() as scratch:
        if graph := _graph_of_bundle(contents, artifact, encoder):
            source = Path(scratch) / file.name
            set_properties(graph, {"license": contents.origin.license})
            passes.write(graph, source)
        if contents.release:
            return mobile.make(source, file, contents.release, artifact.onnx_path)
        shutil.copyfile(source, file)
    return {}


def _graph_of_bundle(contents: Contents, artifact: Artifact, encoder: Encoder) -> ir.Model | None:
    """Returns the graph for the bundle, or None if the bundle can hold the artifact's own file."""
    import onnx_ir as ir

    if contents.with_tokenizer:
        return with_tokenizer(passes.read(artifact.onnx_path), encoder)
    if contents.target.tokenizer:
        return add_probabilities(passes.read(artifact.onnx_path), encoder.multi_label)
    if contents.origin.license != license_of(artifact.manifest):
        return ir.load(artifact.onnx_path)
    return None


def _model(contents: Contents, index: int, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Writes the model file of one artifact and returns its entry in bundle.json."""
    artifact = contents.artifacts[index]
    manifest = artifact.manifest
    place = contents.target.path([each.manifest.variant for each in contents.artifacts], index)
    made = _placed(contents, artifact, encoder, folder / place)
    graph = passes.read(folder / place)
    known = passes.facts(graph)  # not from the manifest: an older release may have recorded fewer facts
    room = known.get("int8_headroom")
    return {
        "variant": manifest.variant,
        "file": place,
        **({"dtype": dtype(manifest.variant)} if contents.target is TARGETS["web"] else {}),
        "bytes": (folder / place).stat().st_size,
        "artifact_id": manifest.id,
        "ir_version": known["ir_version"],
        "opset": known["opset"],
        "operators": known["operators"],
        "inputs": [dataclasses.asdict(spec) for spec in passes.specs(graph.graph.inputs)],
        "outputs": [dataclasses.asdict(spec) for spec in passes.specs(graph.graph.outputs)],
        "step": {"name": step_name(manifest.step), "settings": settings_of(manifest.step)},
        "int8_headroom": room,
        "onnxruntime": contents.release or _oldest_release(manifest.variant, folder / place),
        "exact_on": ANYWHERE if room is None or room >= 1 else NEEDS_OPTION,
        "session_options": options_by_processor(room),
        "tolerance": TOLERANCES[manifest.variant.parts.scheme],
        "measured": contents.measured.get(manifest.id, "not measured"),
        **made,
    }


def _oldest_release(variant: str, file: Path) -> str:
    """Returns the oldest release of ONNX Runtime that runs the file correctly, but none older than `DEFAULT`.

    Bundles are not tested with releases before `DEFAULT`.

    Raises:
        ShippingError: No known release runs the file correctly.
    """
    found = oldest_release(read_needs(file))
    if found is None:
        raise ShippingError(
            f"No release of ONNX Runtime is known to answer {variant} right.", "Ship another variant, such as onnx-std."
        )
    return max(found, DEFAULT, key=ORDER.index)


def _companions(contents: Contents, folder: Path, body: Mapping[str, Any], golden: Mapping[str, Any]) -> None:
    """Writes the README, the check, the other files of the target, and the demo page with its JavaScript files."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(BUNDLED),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    files = contents.target.text_files if contents.with_tokenizer else contents.target.files
    for path, name in {**files, **(DEMO if contents.clients else {})}.items():
        for model in body["models"] if "{name}" in path else [None]:
            served_as = served(model["variant"]) if model else ""
            place = folder / path.format(name=served_as)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith(".j2"):
                shutil.copyfile(BUNDLED / name, place)
                continue
            known = {"bundle": body, "golden": golden, "demo": bool(contents.clients), "model": model}
            text = environment.get_template(name).render(known, name=served_as, served=served, text=TEXT_SPEC)
            place.write_text(text, encoding="utf-8")
    for path, file in contents.clients.items():
        shutil.copyfile(file, folder / path)


def _json(path: Path, body: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
