"""Writes the recipe of an artifact: its lineage, with the effective settings and the ids of all artifacts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import toolchain
from toolchain.artifacts.steps import Export, Import, Step, settings_of, step_name, uses_training_data
from toolchain.artifacts.store import Artifact
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.datasets import hub_dataset
from toolchain.data.inputs import TrainingSource
from toolchain.errors import ArtifactError, RecipeError
from toolchain.recipes.record import (
    SCHEMA,
    BenchRecord,
    ModelRecord,
    Recipe,
    ShipRecord,
    TrainingRecord,
    VariantRecord,
)

MAX_LINE = 100  # characters; a longer list has a line for each entry
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def recipe_of(workspace: Workspace, name: str) -> Recipe:
    """Returns the recipe of a built variant.

    Raises:
        ArtifactError: An artifact of the lineage is missing, stale or modified.
        RecipeError: The steps of the lineage used different training data.
        UnknownVariantError: No variant has this name.
    """
    artifacts = _lineage(workspace, name)
    steps: dict[str, Step] = {artifact.manifest.variant: artifact.manifest.step for artifact in artifacts}
    manifest = artifacts[-1].manifest
    root_step = artifacts[0].manifest.step
    source = artifacts[0].manifest.source
    return Recipe(
        schema=SCHEMA,
        variants=tuple(_variant_record(artifact) for artifact in artifacts),
        model=ModelRecord(
            kind=source["kind"],
            ref=source["ref"],
            name=workspace.model,
            revision=source["revision"],
            base=source.get("base") or None,
            base_revision=root_step.base if isinstance(root_step, Import) else None,
        ),
        training=_training_record(steps),
        toolchain=toolchain.__version__,
        releases=dict(manifest.environment.get("versions", {})),
    )


def _lineage(workspace: Workspace, name: str) -> list[Artifact]:
    """Returns the artifacts of a variant and its ancestors, the oldest first, after a check of their files and ids."""
    artifacts: list[Artifact] = []
    for variant in workspace.lineage(name):
        artifact = workspace.load(variant.name)
        if artifact is None:
            raise ArtifactError(
                f"{variant.name} is not built.", f"Build {name} first. `toolchain variants` lists the built variants."
            )
        parent_id = artifacts[-1].manifest.id if artifacts else None
        if artifact.manifest.parent_id != parent_id:
            raise ArtifactError(
                f"{variant.name} is stale: its parent changed after it was built.",
                f"Build {variant.name} again, or write the recipe of another variant.",
            )
        artifact.verify()
        artifacts.append(artifact)
    return artifacts


def _variant_record(artifact: Artifact) -> VariantRecord:
    manifest = artifact.manifest
    return VariantRecord(
        name=manifest.variant,
        step=step_name(manifest.step),
        parent=manifest.parent,
        settings=_effective_settings(manifest.step),
        id=manifest.id,
        version=manifest.step_version,
    )


def _effective_settings(step: Step) -> dict[str, Any]:
    """Returns the settings of a step, without those that the tables ``model`` and ``training`` state."""
    if isinstance(step, Import):
        return {}
    settings = {key: value for key, value in settings_of(step).items() if key != "train"}
    # A manifest omits the exporter ``optimum``; in a recipe, a missing exporter means the default exporter.
    return {**settings, "exporter": step.exporter} if isinstance(step, Export) and step.exporter else settings


def _training_record(steps: Mapping[str, Step]) -> TrainingRecord:
    digests = {name: step.train for name, step in steps.items() if uses_training_data(step) and step.train}
    if len(set(digests.values())) > 1:
        names = " and ".join(digests)
        raise RecipeError(
            f"{names} used different training data, but a recipe has one.", "Build both with the same --train-data."
        )
    digest = next(iter(digests.values()), None)
    if digest is None:
        return TrainingRecord()
    if digest == TrainingSource().digest:
        return TrainingRecord(digest=digest)
    name = inputs.data_name(digest)
    # The digest of a file has no path, so a name with a slash is that of a hub dataset.
    kind: Literal["embedded", "file", "hub"] = "hub" if "/" in name and hub_dataset(name) else "file"
    columns = re.fullmatch(r".*:[0-9a-f]{64}:([^:]*):([^:]*)", digest)  # without a column of pairs, and without a split
    if columns is None:
        return TrainingRecord(kind, name, digest)
    return TrainingRecord(kind, name, digest, text_column=columns[1] or None, label_column=columns[2])


def to_toml(recipe: Recipe, comments: Mapping[str, Sequence[str]] | None = None) -> str:
    """Returns the text of a recipe; `read` reads it.

    Args:
        recipe: The recipe.
        comments: Lines of comments, by the name of the table or variant that they stand before. The lines under
            ``recipe`` begin the file. Without `comments`, a line at the beginning says what the recipe builds.
    """
    comments = comments or {"recipe": [f"How to build {recipe.variants[-1].name}: `toolchain build` reads this file."]}
    lines = _comment_lines(comments, "recipe")
    tables: list[tuple[str, str, Mapping[str, Any]]] = []
    for key, value in _without_defaults(recipe).items():
        if isinstance(value, dict):
            tables.append((key, f"[{key}]", value))
        elif key == "variants":
            tables += [(table["name"], "[[variants]]", table) for table in value]
        else:
            lines.append(_entry(key, value))
    for name, title, table in tables:
        inner_tables = [(key, value) for key, value in table.items() if isinstance(value, dict)]
        lines += ["", *_comment_lines(comments, name), title]
        lines += [_entry(key, value) for key, value in table.items() if not isinstance(value, dict)]
        for key, value in inner_tables:
            lines += [f"[{title.strip('[]')}.{key}]", *(_entry(*item) for item in value.items())]
    return "\n".join(lines) + "\n"


def _comment_lines(comments: Mapping[str, Sequence[str]], name: str) -> list[str]:
    return [f"# {line}".rstrip() for line in comments.get(name, ())]


def _without_defaults(recipe: Recipe) -> dict[str, Any]:
    """Returns the content of a recipe without absent values and empty tables, the general tables first."""
    content = dataclasses.asdict(recipe)
    if recipe.training == TrainingRecord():
        del content["training"]
    for key, entries in (("bench", dataclasses.fields(BenchRecord)), ("ship", dataclasses.fields(ShipRecord))):
        if content[key]:
            defaults = {entry.name: entry.default for entry in entries}
            content[key] = {name: value for name, value in content[key].items() if value != defaults[name]}
    order = ("schema", "toolchain", "releases", "model", "training", "variants", "bench", "ship")
    return {key: _present(content[key]) for key in order if content.get(key)}


def _present(value: Any) -> Any:
    """Returns a value without the entries of its tables that are None, empty tables or empty lists."""
    if isinstance(value, Mapping):
        return {key: _present(entry) for key, entry in value.items() if entry is not None and entry not in ({}, ())}
    return [_present(entry) for entry in value] if isinstance(value, list | tuple) else value


def _entry(key: str, value: Any) -> str:
    name = key if _BARE_KEY.fullmatch(key) else _value(key)
    line = f"{name} = {_value(value)}"
    if len(line) > MAX_LINE and isinstance(value, list | tuple):
        return "\n".join([f"{name} = [", *(f"  {_value(entry)}," for entry in value), "]"])
    return line


def _value(value: bool | float | str | Sequence[Any]) -> str:
    """Returns a TOML value. Strings, numbers and booleans of JSON are also those of TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
