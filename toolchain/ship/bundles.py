"""Writes bundles: folders with models for an app.

A bundle works without the package `toolchain`. The script verify.py in a bundle checks the bundle. `bundle.json`
describes the bundle and lists every file with its sha256. `golden.json` holds the golden sentences with their token ids
and reference logits. The bundle's id is the sha256 of the content of bundle.json without the id.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import passes
from toolchain.artifacts.fact_summaries import summarize_exits
from toolchain.artifacts.manifest import TensorSpec
from toolchain.artifacts.names import VariantName
from toolchain.artifacts.steps import settings_of, step_name
from toolchain.artifacts.store import Artifact, list_files
from toolchain.build.onnx_metadata import license_of, options_by_processor, set_properties
from toolchain.data.encoding import Encoder
from toolchain.data.labels import MULTI, REGRESSION, TOKENS
from toolchain.errors import ShippingError
from toolchain.passes.probabilities import add_probabilities
from toolchain.results.session_settings import AppSettings
from toolchain.ship.bill_of_materials import MLBOM, bill_of_materials
from toolchain.ship.bundle_files.verify import BUNDLE, GOLDEN, SCHEMA, TEXT, canonical_id
from toolchain.ship.card import CARD, front_matter
from toolchain.ship.golden import golden_content
from toolchain.ship.targets import (
    BUNDLE_FILES,
    DEMO,
    TARGETS,
    TOKEN_FILES,
    WEBGPU,
    Target,
    device,
    dtype,
    mlflow,
    mobile,
    served_name,
)
from toolchain.ship.targets.releases import DEFAULT, ORDER
from toolchain.ship.targets.uses import oldest_release, read_needs
from toolchain.ship.tokenizer_graph import comparison, with_tokenizer
from toolchain.system.decoding import decode_object, read_bytes
from toolchain.system.escaping import escape_line, escape_markdown, format_c_string, format_markdown_code, to_json
from toolchain.system.files import temporary_folder

if TYPE_CHECKING:
    import jinja2
    import onnx_ir as ir

# Limits on how far the logits on another machine may differ from the recorded logits: largest and median difference.
# Two machines may add the same numbers in different orders. In fp32, the order of additions changes the rounding of
# sums. In int8, two machines sometimes round the same activation to two neighbouring integers. This difference changes
# the logits of only a few sentences. Saturated products change the logits of most sentences, so the median difference
# exceeds its limit. For int4 weights, a runtime may use activations of either 8 or 32 bits.
TOLERANCES = {
    "fp32": {"largest": 1e-3, "median": 1e-4},
    "fp16": {"largest": 5e-2, "median": 5e-2},
    "int8": {"largest": 0.5, "median": 1e-2},
    "int4": {"largest": 0.5, "median": 0.1},
}
TOKENIZER, TOKENIZER_CONFIG, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
# Text in bundle.json for a model whose int8 products can saturate: the processors on which the model is exact.
NEEDS_OPTION = (
    "x86-64 with VNNI or AMX (Intel from Cascade Lake and Ice Lake on, AMD from Zen 4 on), 64-bit ARM, and "
    "WebAssembly. An older x86-64 processor needs the session option session.x64quantprecision, because its 8-bit "
    "products saturate"
)
ANY_PROCESSOR = "any processor"
TEXT_SPEC = TensorSpec(TEXT, "string", ("texts",))
# A tokenizer graph pads to a multiple of this number of tokens, because a server batches only inputs of equal width.
MULTIPLE = 16


@dataclass(frozen=True)
class Provenance:
    """The name, licence and provenance of a model.

    Attributes:
        name: Name of the model.
        source: Source of the checkpoint, from the manifest.
        license: Licence of the model.
        origin: Description of the model's origin, for readers.
        data: Description of the fine-tuning data, for readers.
        base_model: Hub id of the model from which this one was made; None if it is unknown.
        datasets: Hub ids of the fine-tuning data; empty if they are unknown.
        languages: ISO 639 codes of the languages of the texts; empty if they are unknown.
    """

    name: str
    source: Mapping[str, str]
    license: str
    origin: str
    data: str
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """The models, texts and figures from which `write` makes a bundle.

    Attributes:
        target: Target of the bundle.
        artifacts: Artifacts of the variants, in the order of the bundle.
        provenance: Name, licence and provenance of the model.
        sentences: The golden sentences.
        measurements: Benchmark figures by artifact id.
        clients: JavaScript files of the demo page by path in the bundle; empty without a demo page.
        with_tokenizer: Whether each graph contains the tokenizer and takes texts.
        release: Release of ONNX Runtime on the phones; None for other targets.
        app_settings: Settings with which an app runs a model, by artifact id.
    """

    target: Target
    artifacts: Sequence[Artifact]
    provenance: Provenance
    sentences: Sequence[str]
    measurements: Mapping[str, Mapping[str, Any]]
    clients: Mapping[str, Path] = field(default_factory=dict)
    with_tokenizer: bool = False
    release: str | None = None
    app_settings: Mapping[str, AppSettings] = field(default_factory=dict)


def write(contents: Contents, folder: Path) -> dict[str, Any]:
    """Writes the bundle into an empty folder, bundle.json last, and returns the content of bundle.json.

    Raises:
        ShippingError: A graph cannot express the tokenizer; this runtime saturates int8 products; or no suitable
            release of ONNX Runtime runs a model correctly.
    """
    first = contents.artifacts[0]
    manifest = first.manifest
    encoder = Encoder.open(first.path, [spec.name for spec in manifest.inputs], manifest.max_length)
    tokenizer: dict[str, Any] = {}
    if contents.with_tokenizer or contents.target.tokenizer_path:
        tokenizer = _prepare_tokenizer(contents, encoder, folder)
    models = [_write_model(contents, index, encoder, folder) for index in range(len(contents.artifacts))]
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        shutil.copyfile(first.path / name, folder / name)
    config = _config_content(contents)
    _write_json(folder / CONFIG, config)
    golden = golden_content(contents.artifacts, contents.sentences, encoder)
    if encoder.task == REGRESSION:
        for model in models:
            model["tolerance"] = _scale_tolerance(model["tolerance"], golden["logits"][model["variant"]])
    _write_json(folder / GOLDEN, golden)
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "target": contents.target.name,
        "model": dataclasses.asdict(contents.provenance),
        "labels": list(manifest.labels),
        "task": encoder.task,
        "multi_label": encoder.task == MULTI,
        "max_length": manifest.max_length,
        "pad_id": encoder.pad_id,
        "tokenizer_in_graph": tokenizer or None,
        "onnxruntime": max((model["onnxruntime"] for model in models), key=ORDER.index),
        "models": models,
        **({"ort_mobile": contents.release} if contents.release else {}),
    }
    if contents.release:
        mobile.configure([folder / model["ort"]["file"] for model in models])
    _write_companions(contents, folder, body, golden)
    manifests = [artifact.manifest for artifact in contents.artifacts]
    _write_json(folder / MLBOM, bill_of_materials(body, manifests, folder))
    body["files"] = [dataclasses.asdict(entry) for entry in list_files(folder)]
    body["id"] = canonical_id(body)
    _write_json(folder / BUNDLE, body)
    return body


def _prepare_tokenizer(contents: Contents, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Compares the tokenizer graph with the checkpoint's tokenizer; writes the graph if it is a separate file.

    Returns:
        The entry ``tokenizer_in_graph`` of bundle.json.
    """
    if contents.with_tokenizer:
        return {"texts_compared": comparison.compare(encoder, contents.sentences)}
    path = contents.target.tokenizer_path or ""
    (folder / path).parent.mkdir(parents=True)
    compared = comparison.compare(encoder, contents.sentences, folder / path, MULTIPLE)
    return {"texts_compared": compared, "file": path, "multiple": MULTIPLE}


def _config_content(contents: Contents) -> dict[str, Any]:
    """Returns config.json without the path of the checkpoint; adds the transformers.js dtype for the web target."""
    config = decode_object(read_bytes(contents.artifacts[0].path / CONFIG))
    config.pop("_name_or_path", None)
    if contents.target is TARGETS["web"]:
        config["transformers.js_config"] = _transformers_js_config(
            [each.manifest.variant for each in contents.artifacts]
        )
    return config


def _transformers_js_config(names: Sequence[VariantName]) -> dict[str, Any]:
    """Returns the dtypes that transformers.js loads by default: that of the first variant for each device."""
    dtypes = {device(name): dtype(name) for name in reversed(names)}
    config: dict[str, Any] = {"dtype": dtypes.get("wasm") or dtypes[WEBGPU]}
    return {**config, "device_config": {WEBGPU: {"dtype": dtypes[WEBGPU]}}} if WEBGPU in dtypes else config


def _scale_tolerance(tolerance: Mapping[str, float], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Returns the limits multiplied by the largest absolute golden score, if that is above 1."""
    scale = max(1.0, *(abs(score) for row in scores for score in row))
    return {name: limit * scale for name, limit in tolerance.items()}


def _write_model_files(contents: Contents, artifact: Artifact, encoder: Encoder, file: Path) -> dict[str, Any]:
    """Writes the model files of a variant; returns extra entries of bundle.json for phones, else an empty mapping."""
    file.parent.mkdir(parents=True, exist_ok=True)
    source = artifact.onnx_path
    with temporary_folder() as scratch:
        if graph := _bundle_graph(contents, artifact, encoder):
            source = scratch / file.name
            set_properties(graph, {"license": contents.provenance.license})
            passes.write(graph, source)
        if contents.release:
            return mobile.make(source, file, contents.release, artifact.onnx_path)
        shutil.copyfile(source, file)
    return {}


def _bundle_graph(contents: Contents, artifact: Artifact, encoder: Encoder) -> ir.Model | None:
    """Returns the changed graph for the bundle, or None if the artifact's graph needs no change."""
    import onnx_ir as ir

    if contents.with_tokenizer:
        return with_tokenizer(passes.read(artifact.onnx_path), encoder)
    if contents.target.tokenizer_path:
        return add_probabilities(passes.read(artifact.onnx_path), encoder.task)
    if contents.provenance.license != license_of(artifact.manifest):
        return ir.load(artifact.onnx_path)
    return None


def _write_model(contents: Contents, index: int, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Writes the model files of one artifact and returns the model's entry in bundle.json."""
    artifact = contents.artifacts[index]
    manifest = artifact.manifest
    path = contents.target.path([each.manifest.variant for each in contents.artifacts], index)
    phone_entries = _write_model_files(contents, artifact, encoder, folder / path)
    graph = passes.read(folder / path)
    facts = passes.facts(graph)  # the manifest of an older toolchain may lack some facts
    headroom = facts.get("int8_headroom")
    settings = contents.app_settings.get(manifest.id)
    return {
        "variant": manifest.variant,
        "file": path,
        **(
            {"dtype": dtype(manifest.variant), "device": device(manifest.variant)}
            if contents.target is TARGETS["web"]
            else {}
        ),
        "bytes": (folder / path).stat().st_size,
        "artifact_id": manifest.id,
        "ir_version": facts["ir_version"],
        "opset": facts["opset"],
        "operators": facts["operators"],
        "inputs": [dataclasses.asdict(spec) for spec in passes.specs(graph.graph.inputs)],
        "outputs": [dataclasses.asdict(spec) for spec in passes.specs(graph.graph.outputs)],
        "step": {"name": step_name(manifest.step), "settings": settings_of(manifest.step)},
        "int8_headroom": headroom,
        "onnxruntime": contents.release or _oldest_release(manifest.variant, folder / path),
        "exact_on": ANY_PROCESSOR if headroom is None or headroom >= 1 else NEEDS_OPTION,
        "session_options": options_by_processor(headroom),
        **({"exits": _exits_entry(manifest.facts["exits"])} if "exits" in manifest.facts else {}),
        **({"app_settings": dataclasses.asdict(settings)} if settings else {}),
        "tolerance": TOLERANCES[manifest.variant.parts.scheme],
        "measured": contents.measurements.get(manifest.id, "not measured"),
        "validation": _validation_entry(manifest.validation),
        **phone_entries,
    }


def _exits_entry(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the exits of a model, with the share of the held-out rows that uses each exit."""
    return {name: facts[name] for name in ("layers", "confidence", "shares", "drop", "work", "held_out_rows")}


def _validation_entry(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of a validation: the number of compared sentences or words, and of flips among them.

    Regression has no flips, so its entry holds None and the largest ``shift`` of a score in standard deviations. The
    manifest of an older toolchain may lack these figures.
    """
    unit = "words" if "words" in report else "sentences"
    figures = {"unit": unit, "count": report.get(unit, 0), "flips": report.get("flips")}
    return {**figures, "shift": report["shift"]} if "shift" in report else figures


def _oldest_release(variant: str, file: Path) -> str:
    """Returns the oldest release of ONNX Runtime, from `DEFAULT` on, that runs the file correctly.

    The tests run bundles only with the release `DEFAULT` of ONNX Runtime and newer releases.

    Raises:
        ShippingError: No known release of ONNX Runtime runs the file correctly.
    """
    release = oldest_release(read_needs(file))
    if release is None:
        raise ShippingError(
            f"No known release of ONNX Runtime computes {variant} correctly.", "Ship another variant, such as onnx-std."
        )
    return max(release, DEFAULT, key=ORDER.index)


def template_environment() -> jinja2.Environment:
    """Returns the environment of the templates; its filters escape labels, names and other text from files."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(BUNDLE_FILES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["c_string"] = format_c_string
    environment.filters["exits"] = summarize_exits
    environment.filters["json"] = to_json
    environment.filters["line"] = escape_line
    environment.filters["markdown"] = escape_markdown
    environment.filters["markdown_code"] = format_markdown_code
    return environment


def _write_companions(contents: Contents, folder: Path, body: Mapping[str, Any], golden: Mapping[str, Any]) -> None:
    """Writes the README, verify.py, the other files of the target, and the demo page with its JavaScript files."""
    environment = template_environment()
    files = contents.target.text_files if contents.with_tokenizer else contents.target.files
    if body["task"] == TOKENS:
        files = {path: TOKEN_FILES.get(file, file) for path, file in files.items()}
    for pattern, template in {**files, **(DEMO if contents.clients else {})}.items():
        for model in body["models"] if "{name}" in pattern else [None]:
            name = served_name(model["variant"]) if model else ""
            path = folder / pattern.format(name=name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not template.endswith(".j2"):
                shutil.copyfile(BUNDLE_FILES / template, path)
                continue
            values = {"bundle": body, "golden": golden, "demo": bool(contents.clients), "model": model}
            values |= {"name": name, "served_name": served_name, "text": TEXT_SPEC}
            text = environment.get_template(template).render(values, mlflow_columns=mlflow.columns(body))
            if pattern == CARD:
                text = front_matter(body) + text
            path.write_text(text, encoding="utf-8")
    for target, file in contents.clients.items():
        shutil.copyfile(file, folder / target)


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
