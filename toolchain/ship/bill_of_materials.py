"""The bill of materials of a bundle: mlbom.json, in the format CycloneDX 1.6.

It lists the models with their model cards, the licence, the data, the packages that the bundle needs at run time, and
the packages that built it. It has no time stamp, and its serial number is computed from its content, so equal bundles
have equal bills of materials.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import toolchain
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.store import sha256
from toolchain.models.checkpoints import NOT_STATED
from toolchain.ship.targets import LOCK, clients

MLBOM = "mlbom.json"
SCHEMA_VERSION = "1.6"
_BUNDLE, _DATA = "bundle", "fine-tuning-data"
# `task` of bundle.json → task in the model card. Every other task is `text-classification`.
_TASKS = {"regression": "text-scoring", "token_classification": "token-classification"}
# Field of a model's figures in bundle.json → name of the score, and its key in this field.
_SCORES = {"accuracy": ("accuracy", "value"), "entities": ("entity F1", "value"), "regression": ("R2", "r2")}
# Line of a lock file that pins a package: name, version and possibly a marker.
_PINNED = re.compile(r"^([a-z0-9-]+)==([^ ;\\]+)", re.MULTILINE)


def bill_of_materials(body: Mapping[str, Any], manifests: Iterable[Manifest], folder: Path) -> dict[str, Any]:
    """Returns the bill of materials of a bundle, as CycloneDX 1.6 defines it.

    Args:
        body: Content of bundle.json without its list of files.
        manifests: Manifests of the bundle's artifacts.
        folder: Folder of the bundle; it holds every other file except bundle.json.
    """
    models = [_model_component(body, model, folder) for model in body["models"]]
    needed, builders = _runtime_components(body, folder), _build_components(manifests)
    references = [component["bom-ref"] for component in (*models, *needed)]
    content = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SCHEMA_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SCHEMA_VERSION,
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "toolchain", "version": toolchain.__version__}]},
            "component": {
                "type": "application",
                "bom-ref": _BUNDLE,
                "name": f"{body['model']['name']}, bundle for {body['target']}",
                **_licences(body),
            },
        },
        "components": [*models, _data_component(body), *needed, *builders],
        "dependencies": [
            {"ref": _BUNDLE, "dependsOn": references},
            *({"ref": model["bom-ref"], "dependsOn": [_DATA]} for model in models),
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {"serialNumber": f"urn:uuid:{serial}", **content}


def _model_component(body: Mapping[str, Any], model: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns one model with its digest, its origin and its model card."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = body["model"]["source"]
    origin = {"type": "machine-learning-model", "name": source["ref"], "description": body["model"]["origin"]}
    if source.get("revision"):
        origin["version"] = source["revision"]
    if source["kind"] == "hub":
        origin["purl"] = f"pkg:huggingface/{quote(source['ref'])}@{source['revision']}"
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model-{model['variant']}",
        "name": f"{body['model']['name']}/{model['variant']}",
        "version": model["artifact_id"],
        "hashes": [{"alg": "SHA-256", "content": sha256(folder / model["file"])}],
        **_licences(body),
        "pedigree": {"ancestors": [origin]},
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": _TASKS.get(body["task"], "text-classification"),
                "architectureFamily": config["model_type"],
                **({"modelArchitecture": config["architectures"][0]} if config.get("architectures") else {}),
                "datasets": [{"ref": _DATA}],
                "inputs": [{"format": f"{each['name']}: {each['dtype']}"} for each in model["inputs"]],
                "outputs": [{"format": f"{each['name']}: {each['dtype']}"} for each in model["outputs"]],
            },
            **_quality(model["measured"]),
        },
        "properties": [
            {"name": "toolchain:file", "value": model["file"]},
            {"name": "toolchain:labels", "value": json.dumps(body["labels"], ensure_ascii=False)},
            {"name": "toolchain:exact_on", "value": model["exact_on"]},
        ],
    }


def _quality(measured: Mapping[str, Any] | str) -> dict[str, Any]:
    """Returns the measured score of a model as the part `quantitativeAnalysis` of a model card."""
    if isinstance(measured, str):
        return {}
    metrics = [
        {"type": name, "value": str(score[key]), "slice": str(measured["data"])}
        for field, (name, key) in _SCORES.items()
        if (score := measured.get(field))
    ]
    return {"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}


def _data_component(body: Mapping[str, Any]) -> dict[str, Any]:
    data = body["model"]["data"]
    return {
        "type": "data",
        "bom-ref": _DATA,
        "name": "fine-tuning data",
        "description": data,
        "data": [{"type": "dataset", "name": data}],
    }


def _runtime_components(body: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Returns all packages that the lock files of the bundle name, with the releases that the tests use."""
    pinned = sorted({pin for lock in folder.rglob(LOCK) for pin in _PINNED.findall(lock.read_text(encoding="utf-8"))})
    components = [_library("pypi", name, version, "required") for name, version in pinned]
    if body["target"] == "web":
        components += [_library("npm", name, clients.version(name), "required") for name in clients.DEPENDENCIES]
    return components


def _build_components(manifests: Iterable[Manifest]) -> list[dict[str, Any]]:
    """Returns the packages that built the artifacts, which the bundle does not need."""
    versions = {
        (str(name), str(version))
        for manifest in manifests
        for name, version in manifest.environment.get("versions", {}).items()
    }
    return [
        _library("generic" if name == "python" else "pypi", name, version, "excluded")
        for name, version in sorted(versions)
    ]


def _library(kind: str, name: str, version: str, scope: str) -> dict[str, Any]:
    """Returns one package; the scope is ``required`` for a package of the run time, else ``excluded``."""
    purl = f"pkg:{kind}/{quote(name, safe='/')}@{quote(version, safe='')}"
    reference = purl if scope == "required" else f"{purl}#build"
    return {
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "version": version,
        "scope": scope,
        "purl": purl,
    }


def _licences(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the licence as an SPDX expression if it is one, else by its name; an empty mapping without a licence."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    name = body["model"]["license"]
    if name == NOT_STATED:
        return {}
    try:
        return {"licenses": [{"expression": canonicalize_license_expression(name)}]}
    except InvalidLicenseExpression:
        return {"licenses": [{"license": {"name": name}}]}
