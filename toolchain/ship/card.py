"""The metadata of a bundle's model card: the YAML block at the start of the bundle's README.md.

The model hub reads this block if the bundle lies in one of its repositories. The block states only what bundle.json
states. It follows the hub's specification of model cards (modelcard.md in the repository huggingface/hub-docs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.data.datasets import hub_dataset
from toolchain.data.labels import REGRESSION, TOKENS
from toolchain.models.checkpoints import NOT_STATED

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
# Identifiers of the licences that the hub knows (docs/hub/repositories-licenses.md in huggingface/hub-docs).
_HUB_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown
"""
HUB_LICENSES = frozenset(_HUB_LICENSES.split())
_OTHER = "other"
# Name and id of the data set of the metric `agreement`.
_VALIDATION_SENTENCES, _VALIDATION_ID = "validation sentences of the toolchain", "toolchain-validation"


@dataclass(frozen=True)
class _Metric:
    """One measured figure: the hub's id of the metric, its name, its value, and the name of the data."""

    id: str
    name: str
    value: float
    data: str


def front_matter(body: Mapping[str, Any]) -> str:
    """Returns the YAML block, with its two lines of hyphens.

    No text in the block can act as Markdown or HTML, because a program that does not know YAML blocks shows the block
    as Markdown.

    Args:
        body: Content of bundle.json; the entries ``files`` and ``id`` may be missing.
    """
    from huggingface_hub import ModelCardData

    model = body["model"]
    license_id, license_name = _license(model["license"])
    results = [_eval_result(body, metric) for each in body["models"] for metric in _metrics(each)]
    data = ModelCardData(
        language=list(model["languages"]) or None,
        license=license_id,
        license_name=license_name,
        library_name="transformers.js" if body["target"] == "web" else "onnx",
        pipeline_tag=_pipeline_tag(body),
        base_model=model["base_model"],
        datasets=list(model["datasets"]) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=model["name"] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _pipeline_tag(body: Mapping[str, Any]) -> str:
    return "token-classification" if body["task"] == TOKENS else "text-classification"


def _license(name: str) -> tuple[str | None, str | None]:
    """Returns the licence as the hub writes it: its identifier and None, or `other` and a name; None if not stated."""
    if name == NOT_STATED:
        return None, None
    identifier = re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")
    if identifier in HUB_LICENSES:
        return identifier, None
    return _OTHER, identifier or None


def _metrics(model: Mapping[str, Any]) -> Iterator[_Metric]:
    """Yields the measured figures of one model: its scores, or its agreement with the PyTorch model.

    A model that no benchmark measured has the figures of its validation. A regression model has none then, because its
    validation counts no flips.
    """
    measured = model["measured"]
    variant = str(model["variant"])
    scores = () if isinstance(measured, str) else tuple(_scores(measured))
    for metric_id, name, value in scores:
        yield _Metric(metric_id, f"{name} of {variant}", round(value, 6), str(measured["data"]))
    validation = model["validation"]
    if not scores and validation["count"] and validation["flips"] is not None:
        share = 1 - validation["flips"] / validation["count"]
        name = f"Share of {validation['unit']} in which {variant} and the PyTorch model predict the same label"
        yield _Metric("agreement", name, round(share, 6), _VALIDATION_SENTENCES)


def _scores(measured: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yields the id, the name and the value of each score in a model's benchmark figures."""
    if accuracy := measured.get("accuracy"):
        yield "accuracy", "Accuracy", accuracy["value"]
    if entities := measured.get("entities"):
        yield "f1", "Entity F1", entities["value"]
        yield "precision", "Entity precision", entities["precision"]
        yield "recall", "Entity recall", entities["recall"]
    if regression := measured.get(REGRESSION):
        yield "r_squared", "R²", regression["r2"]
        yield "mae", "Mean absolute error", regression["mean_absolute_error"]


def _eval_result(body: Mapping[str, Any], metric: _Metric) -> EvalResult:
    from huggingface_hub import EvalResult

    if metric.data == _VALIDATION_SENTENCES:
        dataset, config = _VALIDATION_ID, None
    else:
        dataset, config = hub_dataset(metric.data) or (_slug(metric.data), None)
    return EvalResult(
        task_type=_pipeline_tag(body),
        dataset_type=dataset,
        dataset_name=re.sub(r"[^\w .,:/@+()-]|_(?!\w)|(?<!\w)_", " ", metric.data).strip() or "data",
        dataset_config=config,
        metric_type=metric.id,
        metric_name=metric.name,
        metric_value=metric.value,
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "data"
