"""How an artifact was built: its ancestors, with the settings and the effects of their steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.artifacts import fact_summaries
from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.steps import Import, Quantize, settings_of, step_name
from toolchain.artifacts.store import Artifact
from toolchain.build.steps.validate import validation_summary
from toolchain.build.workspace import Workspace

BUILT, CHANGED, MISSING = "built", "changed", "missing"
CHECKPOINT_KINDS = {"embedded": "embedded model", "folder": "folder", "hub": "hub model"}


@dataclass(frozen=True)
class Ancestor:
    """A variant in the lineage of an artifact, or the artifact itself.

    Attributes:
        variant: Name of the variant.
        state: ``built``; ``missing`` if the artifact no longer exists; or ``changed`` if a later build replaced it.
            Only with ``built``, the other attributes have values.
        parent: Name of its parent; None for an import.
        step: Name of the step that built it.
        settings: Settings of this step.
        id: Id of the artifact.
        created: UTC time of the build, in ISO 8601.
        size_bytes: Size of all files.
        summaries: Sentences about the effects of the step and its passes, without full stops.
    """

    variant: str
    state: str
    parent: str | None = None
    step: str | None = None
    settings: Mapping[str, Any] | None = None
    id: str | None = None
    created: str | None = None
    size_bytes: int | None = None
    summaries: tuple[str, ...] = ()


def trace_lineage(workspace: Workspace, artifact: Artifact) -> list[Ancestor]:
    """Returns the ancestors of an artifact, oldest first, and last the artifact itself.

    The list begins with the oldest ancestor that the manifests identify: behind a missing or changed ancestor, the
    lineage is unknown.

    Raises:
        ArtifactError: The manifest of an ancestor is unreadable.
        TamperedError: The manifest of an ancestor was modified.
    """
    manifest = artifact.manifest
    ancestors = [_describe(manifest)]
    while manifest.parent is not None:
        parent = workspace.load(manifest.parent)
        if parent is None or parent.manifest.id != manifest.parent_id:
            return [Ancestor(manifest.parent, CHANGED if parent else MISSING), *ancestors]
        manifest = parent.manifest
        ancestors.insert(0, _describe(manifest))
    return ancestors


def _describe(manifest: Manifest) -> Ancestor:
    return Ancestor(
        manifest.variant,
        BUILT,
        manifest.parent,
        step_name(manifest.step),
        settings_of(manifest.step),
        manifest.id,
        manifest.created,
        manifest.size_bytes,
        tuple(_summaries(manifest)),
    )


def _summaries(manifest: Manifest) -> list[str]:
    """Returns sentences about the effects of the step that built the artifact."""
    step, facts = manifest.step, manifest.facts
    summaries = [_import_summary(manifest)] if isinstance(step, Import) else []
    summaries += [fact_summaries.summarize_step(step, facts)]
    summaries += fact_summaries.summarize_rewrites(facts.get("rewrites") or {})
    if layers := facts.get("kept_fp32"):
        summaries.append(f"the layers most sensitive to quantisation stay fp32: {', '.join(layers)}")
    if isinstance(step, Quantize) and "int8_headroom" in facts:
        summaries.append(fact_summaries.summarize_headroom(facts["int8_headroom"]))
    summaries.append(_validation_summary(manifest.validation))
    return [summary for summary in summaries if summary]


def _import_summary(manifest: Manifest) -> str:
    source, facts = manifest.source, manifest.facts
    parts = [f"from the {CHECKPOINT_KINDS[source['kind']]} {source['ref']}"]
    if source.get("base"):
        parts.append(f"an adapter of {source['base']}")
    if "architecture" in facts:
        parts.append(str(facts["architecture"]))
    if "parameters" in facts:
        parts.append(f"{facts['parameters'] / 1e6:.1f} million parameters")
    return ", ".join([*parts, f"labels {', '.join(manifest.labels)}"])


def _validation_summary(report: Mapping[str, Any]) -> str:
    """Returns the summary of a validation report; empty if the report lacks a field, as a foreign one may."""
    fields = {"agreement", "finite", "worst_case", "largest_delta", *(() if "shift" in report else ("flips",))}
    counts = {"shift", "words", "sentences"} & set(report)
    is_complete = fields <= set(report) and counts and (not report["finite"] or report["largest_delta"] is not None)
    return f"validated: {validation_summary(dict(report))}" if is_complete else ""
