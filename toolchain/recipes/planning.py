"""From a recipe to the plan of the pipeline: the workspace, the steps, and the checks before the first build."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.artifacts import variants
from toolchain.artifacts.steps import Export, Import, Quantize, Step, uses_training_data
from toolchain.build import pipeline, trimming
from toolchain.build.pipeline import VariantPlan
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.datasets import Columns, hub_dataset
from toolchain.data.files import Texts
from toolchain.data.inputs import TrainingSource
from toolchain.errors import RecipeError
from toolchain.exporters import require_exporter
from toolchain.models import checkpoints, hub
from toolchain.models.locations import FOLDER_PREFIX
from toolchain.recipes import record
from toolchain.recipes.record import Recipe


@dataclass(frozen=True)
class Overrides:
    """The user's options, which replace what a recipe states.

    Attributes:
        exported: Folder of the artifacts.
        model: Value of ``--model``; None for the recipe's model.
        folder_name: Value of ``--as``; None for the recipe's name.
        base: Value of ``--base``; None for the recipe's base.
        train: Training data; None for the recipe's.
        corpus: Texts for vocabulary trimming; None without any.
        output: Folder of the bundle; None for the recipe's.
    """

    exported: Path
    model: str | None = None
    folder_name: str | None = None
    base: str | None = None
    train: TrainingSource | None = None
    corpus: Texts | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A checked plan: nothing is built yet.

    Attributes:
        recipe: The recipe.
        folder: Folder of the recipe.
        workspace: Workspace of the model.
        steps: Steps of all variants and their ancestors, by variant name.
        items: The pipeline's decisions, parents first.
        output: Folder of the bundle; None for the default folder.
    """

    recipe: Recipe
    folder: Path
    workspace: Workspace
    steps: dict[str, Step]
    items: Sequence[VariantPlan]
    output: Path | None


def make_plan(path: Path, overrides: Overrides) -> Plan:
    """Reads a recipe and plans its build.

    Args:
        path: Path of the recipe.
        overrides: The user's options.

    Raises:
        RecipeError: The recipe is invalid, or its checkpoint or training data is missing or has another digest.
    """
    recipe, folder = record.read(path), path.parent
    workspace = _open_workspace(recipe, folder, overrides)
    steps = _steps(path, recipe, workspace)
    items = pipeline.plan(workspace, steps, steps)
    for item in items:
        _require_inputs(recipe, workspace, item)
    return Plan(recipe, folder, workspace, steps, items, _output(recipe, folder, overrides))


def _open_workspace(recipe: Recipe, folder: Path, overrides: Overrides) -> Workspace:
    model = overrides.model or _model_of(recipe, folder, overrides)
    name = overrides.folder_name or recipe.model.name
    train = overrides.train or _training_source(recipe, folder)
    workspace = Workspace.open(model, overrides.exported, name, train, overrides.corpus)
    if not overrides.model and workspace.source.kind != recipe.model.kind:
        raise RecipeError(
            f"The recipe's model {model} is a {recipe.model.kind} model, but here it is a {workspace.source.kind} one.",
            "Name the model with --model.",
        )
    base = overrides.base or _base_of(recipe, folder, workspace)
    return workspace.with_base(base) if base else workspace


def _model_of(recipe: Recipe, folder: Path, overrides: Overrides) -> str:
    """Returns the value of ``--model`` for the recipe's model."""
    model = recipe.model
    if model.kind == "embedded":
        return checkpoints.REFERENCE_SLUG
    if model.kind == "hub":
        if not hub.HUB_ID.fullmatch(model.ref):
            raise RecipeError(
                f"The recipe's model {model.ref!r} is not a hub id.",
                "Correct the key ref, or name the model with --model.",
            )
        return model.ref
    path = record.path_inside(folder, model.ref, "the checkpoint", "--model")
    if path.is_dir():
        return str(path.resolve())
    name = overrides.folder_name or model.name
    if name and (overrides.exported / name / checkpoints.ROOT_VARIANT).is_dir():
        return name
    raise RecipeError(
        f"The folder {model.ref} of the recipe's checkpoint is not beside the recipe.",
        "Name the folder with --model FOLDER.",
    )


def _base_of(recipe: Recipe, folder: Path, workspace: Workspace) -> str | None:
    """Returns the value of ``--base`` for the recipe's base; None if the adapter or the workspace names the base."""
    base = recipe.model.base
    if base is None:
        return None
    if not base.startswith(FOLDER_PREFIX):
        if not hub.HUB_ID.fullmatch(base):
            raise RecipeError(f"The recipe's base {base!r} is not a hub id.", "Name the base with --base.")
        return base
    path = record.path_inside(folder, base, "the base", "--base")
    if path.is_dir():
        return str(path.resolve())
    if workspace.source.base:
        return None
    raise RecipeError(
        f"The folder {base} of the adapter's base is not beside the recipe.", "Name the folder with --base FOLDER."
    )


def _training_source(recipe: Recipe, folder: Path) -> TrainingSource:
    """Returns the recipe's training data; its file may be missing."""
    training = recipe.training
    columns = Columns(training.text_column, training.label_column, training.text_pair_column)
    if training.kind == "embedded":
        return TrainingSource(split=training.split)
    if training.kind == "file":
        path = record.path_inside(folder, training.ref, "the training data", "--train-data")
        return TrainingSource(str(path.resolve()), columns, training.split)
    if hub_dataset(training.ref) is None or Path(training.ref).exists():
        raise RecipeError(
            f"The recipe's training data {training.ref!r} is not a hub dataset.", "Name the data with --train-data."
        )
    return TrainingSource(training.ref, columns, training.split)


def _is_missing(workspace: Workspace) -> bool:
    """Returns whether the training data is a path on which nothing is."""
    file = workspace.train.file
    return file is not None and Path(file).is_absolute() and not Path(file).exists()


def _steps(path: Path, recipe: Recipe, workspace: Workspace) -> dict[str, Step]:
    """Returns the steps of all variants and their ancestors, by name; an unlisted ancestor has its default step."""
    records = {variant.name: variant for variant in recipe.variants}
    steps: dict[str, Step] = {}
    for name in records:
        for variant in workspace.lineage(name, records):
            listed = records.get(variant.name)
            step = record.step_of(path, listed) if listed else variant.step
            if listed and listed.parent and listed.parent != variant.parent:
                raise RecipeError(
                    f"{path}: the parent of {variant.name} is {variant.parent}, not {listed.parent}.",
                    "Correct the key parent, or build in another folder with --exported DIR.",
                )
            if variant.parent and variants.derive_variant(variant.parent, step, variant.name.parts.label).name != (
                variant.name
            ):
                raise RecipeError(
                    f"{path}: the settings of {variant.name} do not fit its name.", "Correct the settings or the name."
                )
            steps[variant.name] = _with_inputs(step, recipe, workspace)
    return steps


def _with_inputs(step: Step, recipe: Recipe, workspace: Workspace) -> Step:
    """Returns the step with the revision of a hub model, or with the digest of the training data."""
    if isinstance(step, Import):
        return Import(recipe.model.revision) if workspace.source.kind == "hub" else step
    if not uses_training_data(step):
        return step
    if recipe.training.digest is None and _is_missing(workspace):
        raise RecipeError(
            f"The training data {recipe.training.ref} is not beside the recipe.", "Name it with --train-data FILE."
        )
    return dataclasses.replace(step, train=recipe.training.digest or "")


def _require_inputs(recipe: Recipe, workspace: Workspace, item: VariantPlan) -> None:
    """Raises `RecipeError` if the checkpoint or the data of a variant is not that of the recipe."""
    step = item.step
    if isinstance(step, Import):
        for kind, expected, actual in (
            ("checkpoint", recipe.model.revision, step.revision),
            ("base of the adapter", recipe.model.base_revision, step.base),
        ):
            if expected and expected != actual:
                raise RecipeError(
                    f"The {kind} is not that of the recipe: it is {actual}, but the recipe needs {expected}.",
                    "Name the recipe's files with --model FOLDER, and the base of an adapter with --base FOLDER.",
                )
    elif item.reason and uses_training_data(step):
        _require_data(recipe, workspace, item.variant.name, step)
    elif item.reason and isinstance(step, Export) and step.exporter:
        require_exporter(step.exporter, step.opset)


def _require_data(recipe: Recipe, workspace: Workspace, name: str, step: Step) -> None:
    digest = recipe.training.digest
    actual = "" if _is_missing(workspace) else workspace.train.digest
    if digest and actual != digest:
        difference = f"the data of this command has {actual}" if actual else "there is no such file beside the recipe"
        raise RecipeError(
            f"{name} needs the training data {recipe.training.ref} with the digest {digest}, but {difference}.",
            "Give the recipe's data with --train-data FILE, and name its columns if they have other names.",
        )
    corpus = step.trim_vocab if isinstance(step, Quantize) else None
    if corpus and corpus != trimming.TRAIN and corpus != (workspace.corpus and workspace.corpus.digest):
        raise RecipeError(
            f"{name} needs the corpus {inputs.data_name(corpus)} with the digest {corpus}.",
            "Give it with --trim-vocab CORPUS.",
        )


def _output(recipe: Recipe, folder: Path, overrides: Overrides) -> Path | None:
    if overrides.output or not (recipe.ship and recipe.ship.output):
        return overrides.output
    return record.path_inside(folder, recipe.ship.output, "the folder of the bundle", "--output")
