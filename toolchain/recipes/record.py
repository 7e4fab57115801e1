"""The content of a recipe, and the checks of a recipe that somebody else may have written."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from toolchain.artifacts import variants
from toolchain.artifacts.manifest import Digest
from toolchain.artifacts.steps import STEP_TYPES, Step, settings_of, step_name
from toolchain.errors import RecipeError, SettingsError, UnknownVariantError
from toolchain.recipes.bounds import bound_fault, setting_names
from toolchain.ship.targets import TARGETS
from toolchain.system.decoding import Count, Line, Name, Plain, convert, strict

SCHEMA: Literal[1] = 1
MAX_BYTES = 1 << 18
MAX_VARIANTS = 200
MAX_THREADS, MAX_BATCH = 1024, 4096
WRITE_HINT = "`toolchain build --schema` prints the keys of a recipe, and `toolchain recipe VARIANT` writes a recipe."


@strict
@dataclass(frozen=True)
class ModelRecord:
    """The checkpoint of a recipe.

    Attributes:
        kind: ``embedded`` for the reference model, ``folder``, or ``hub`` for a model of the Hugging Face hub.
        ref: Path of the folder, relative to the recipe's folder; or the hub id; or ``reference``.
        name: Name of the model's folder under ``exported``, which ONNX files contain; None for the model's own name.
        revision: Commit of a hub model, or the digest of a folder's files; None for any.
        base: Base of an adapter: a hub id, or a folder as ``./NAME``; None if the adapter names it.
        base_revision: The base with its commit or digest, as `Import.base`; None for any.
    """

    kind: Literal["embedded", "folder", "hub"] = "embedded"
    ref: Line = "reference"
    name: Name | None = None
    revision: Line | None = None
    base: Line | None = None
    base_revision: Line | None = None


@strict
@dataclass(frozen=True)
class TrainingRecord:
    """The training data of a recipe.

    Attributes:
        kind: ``embedded`` for the embedded SST-2, ``file``, or ``hub`` for a hub dataset.
        ref: Path of the file or folder, relative to the recipe's folder; or the hub dataset; or ``sst2``.
        digest: `TrainingSource.digest` of the data; None for any.
        text_column: Column of the texts; None for ``sentence`` or ``text``.
        text_pair_column: Column of second texts; None without one.
        label_column: Column of the labels.
        split: Split of the data; None for ``train``.
    """

    kind: Literal["embedded", "file", "hub"] = "embedded"
    ref: Line = "sst2"
    digest: Line | None = None
    text_column: Line | None = None
    text_pair_column: Line | None = None
    label_column: Line = "label"
    split: Line | None = None


@strict
@dataclass(frozen=True)
class VariantRecord:
    """A variant of a recipe.

    Attributes:
        name: Name of the variant.
        step: Name of the step that builds the variant; None for the step that the name implies.
        parent: Name of the parent, which is another variant of the recipe; None for the parent that the name implies.
        settings: Settings of the step. A missing setting has the default value for a variant of this name.
        id: Id of the artifact; None if the recipe states none.
        version: Version of the step; None if the recipe states none.
    """

    name: Line
    step: Line | None = None
    parent: Line | None = None
    settings: Annotated[dict[str, Any], Plain] = field(default_factory=dict)
    id: Digest | None = None
    version: Count | None = None


@strict
@dataclass(frozen=True)
class BenchRecord:
    """The benchmark at the end of a recipe.

    Attributes:
        variants: Variants of the recipe to measure.
        providers: Execution providers; empty for all.
        quick: Whether to measure each cell for a shorter time, as ``bench --quick`` does.
        threads: Number of CPU threads; None for the physical cores.
        batch_size: Largest number of sentences in a batch.
        data: File or folder of labelled sentences, relative to the recipe's folder; or a hub dataset. None for the
            embedded SST-2.
        kind: Kind of `data`: ``file``, or ``hub`` for a hub dataset.
        text_column: Column of the texts; None for ``sentence`` or ``text``.
        text_pair_column: Column of second texts; None without one.
        label_column: Column of the labels.
        split: Split of the data, or ``held-out`` for its held-out rows; None for ``validation``.
    """

    variants: tuple[Line, ...]
    providers: tuple[Literal["cpu", "cuda", "cuda-graphs", "tensorrt"], ...] = ()
    quick: bool = False
    threads: int | None = None
    batch_size: int = 32
    data: Line | None = None
    kind: Literal["file", "hub"] = "file"
    text_column: Line | None = None
    text_pair_column: Line | None = None
    label_column: Line = "label"
    split: Line | None = None

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("there is no variant to measure")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads is {self.threads}, which is not from 1 to {MAX_THREADS}")
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise ValueError(f"batch_size is {self.batch_size}, which is not from 1 to {MAX_BATCH}")
        if self.kind == "hub" and self.data is None:
            raise ValueError("the kind hub needs the name of a dataset in data")


@strict
@dataclass(frozen=True)
class ShipRecord:
    """The bundle at the end of a recipe.

    Attributes:
        target: Kind of app; see ``ship --target``.
        variants: Variants of the recipe in the bundle.
        output: Folder of the bundle, relative to the recipe's folder; None for the default folder of ``ship``.
        license: Licence of the bundle; None for the licence that the model states.
        demo: Whether a web bundle has a demo page.
        with_tokenizer: Whether each graph contains the tokenizer.
    """

    target: Line
    variants: tuple[Line, ...]
    output: Line | None = None
    license: Line | None = None
    demo: bool = True
    with_tokenizer: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"the target {self.target!r} is none of {', '.join(TARGETS)}")
        if not self.variants:
            raise ValueError("there is no variant to ship")


@strict
@dataclass(frozen=True)
class Recipe:
    """The content of a recipe.

    Attributes:
        schema: `SCHEMA`.
        variants: The variants to build, in any order. Ancestors that are not listed have default settings.
        model: The checkpoint.
        training: Training data of the steps that need it.
        bench: Benchmark after the build; None for none.
        ship: Bundle after the build; None for none.
        toolchain: Release of the toolchain that wrote the recipe; None for a recipe written by hand.
        releases: Releases of the libraries that built the artifacts, by package.
    """

    schema: Literal[1]
    variants: tuple[VariantRecord, ...]
    model: ModelRecord = field(default_factory=ModelRecord)
    training: TrainingRecord = field(default_factory=TrainingRecord)
    bench: BenchRecord | None = None
    ship: ShipRecord | None = None
    toolchain: Line | None = None
    releases: dict[Line, Line] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < len(self.variants) <= MAX_VARIANTS:
            raise ValueError(f"the recipe has {len(self.variants)} variants, which is not from 1 to {MAX_VARIANTS}")
        if len(self.names) < len(self.variants):
            raise ValueError("two variants have the same name")
        for table, names in (("bench", self.bench and self.bench.variants), ("ship", self.ship and self.ship.variants)):
            if missing := [name for name in names or () if name not in self.names]:
                raise ValueError(f"[{table}] names {missing[0]!r}, which is not a variant of the recipe")

    @property
    def names(self) -> set[str]:
        """Returns the names of all variants in the recipe."""
        return {variant.name for variant in self.variants}


def read(path: Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        RecipeError: The file is missing or too large, is not TOML, has a newer schema, an unknown key or a wrong value,
            or its variants contradict each other.
    """
    raw = _read_toml(path)
    schema = raw.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise RecipeError(
            f"{path} has the schema {schema}, but this release reads schema {SCHEMA}.",
            "Use the release of the toolchain that wrote the recipe, or a newer one.",
        )
    _check_keys(path, raw)
    try:
        recipe = convert(Recipe, raw)
    except (ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{path} is not a valid recipe: {error}.", WRITE_HINT) from error
    _check_parents(path, recipe)
    for record in recipe.variants:
        step_of(path, record)
    return recipe


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(
                f"{path} has more than {MAX_BYTES >> 10} KiB.", "Name a recipe that `toolchain recipe` wrote."
            )
        return tomllib.loads(content.decode())
    except FileNotFoundError as error:
        raise RecipeError(
            f"There is no recipe {path}.",
            "Write one with `toolchain init` or `toolchain recipe VARIANT > recipe.toml`.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not TOML: {error}.", "Correct the file, or write it again.") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}.", "Name the file of a recipe.") from error


_TABLES = {
    "model": ModelRecord,
    "training": TrainingRecord,
    "variants": VariantRecord,
    "bench": BenchRecord,
    "ship": ShipRecord,
}


def _check_keys(path: Path, raw: Mapping[str, Any]) -> None:
    """Raises `RecipeError` for the first key that recipes do not have, and suggests a similar key."""
    _require_known(path, "the recipe", raw, [entry.name for entry in dataclasses.fields(Recipe)])
    for name, kind in _TABLES.items():
        tables = raw.get(name)
        for table in tables if isinstance(tables, list) else [tables]:
            if isinstance(table, dict):
                title = f"[[{name}]]" if isinstance(tables, list) else f"[{name}]"
                _require_known(path, title, table, [entry.name for entry in dataclasses.fields(kind)])


def _require_known(path: Path, place: str, keys: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in keys:
        if key not in known:
            similar_keys = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {similar_keys[0]}?" if similar_keys else f"The keys are {', '.join(known) or 'none'}."
            raise RecipeError(f"{path}: {place} has the unknown key {key[:80]!r}.", hint)


def _check_parents(path: Path, recipe: Recipe) -> None:
    """Raises `RecipeError` if a parent is not a variant of the recipe, or if the parents form a cycle."""
    parents = {record.name: record.parent for record in recipe.variants}
    for name, parent in parents.items():
        if parent is not None and parent not in parents:
            raise RecipeError(
                f"{path}: the parent {parent!r} of {name} is not in the recipe.",
                "Add [[variants]] with this name, or leave the key parent out.",
            )
        visited = [name]
        while parent is not None:
            if parent in visited:
                raise RecipeError(
                    f"{path}: the parents form a cycle: {' → '.join([*visited, parent])}.",
                    "Correct the keys parent: each variant is built from its parent.",
                )
            visited.append(parent)
            parent = parents[parent]


def step_of(path: Path, record: VariantRecord) -> Step:
    """Returns the step of a variant with its settings; a missing setting has the default for the variant's name.

    Raises:
        RecipeError: No variant has this name, another step builds it, or a setting is unknown or out of bounds.
    """
    try:
        default_step = variants.get(record.name).step
    except UnknownVariantError as error:
        raise RecipeError(f"{path}: {error.cause}", error.hint) from error
    name = record.step or step_name(default_step)
    if name not in STEP_TYPES:
        raise RecipeError(
            f"{path}: {record.name} has the unknown step {name[:80]!r}.", f"The steps are {', '.join(STEP_TYPES)}."
        )
    if name != step_name(default_step):
        raise RecipeError(
            f"{path}: the step {name} does not build {record.name}.",
            f"Use the step {step_name(default_step)}, or another name.",
        )
    if "train" in record.settings:
        raise RecipeError(
            f"{path}: the settings of {record.name} have the key train.",
            "Name the training data in the table [training].",
        )
    _require_known(path, f"the table of settings of {record.name}", record.settings, setting_names(name))
    for key, value in record.settings.items():
        if fault := bound_fault(name, key, value):
            raise RecipeError(f"{path}: the setting {key} of {record.name} {fault}.", "Correct this setting.")
    try:
        return convert(STEP_TYPES[name], {**settings_of(default_step), **record.settings})
    except SettingsError as error:
        raise RecipeError(f"{path}: {record.name}: {error.cause}", error.hint) from error
    except (ValueError, KeyError) as error:
        raise RecipeError(
            f"{path}: a setting of {record.name} has a wrong value: {error}.", "Correct this setting."
        ) from error


def path_inside(folder: Path, ref: str, purpose: str, option: str) -> Path:
    """Returns the path that a recipe names, which must be inside the recipe's folder.

    Args:
        folder: Folder of the recipe.
        ref: The path in the recipe.
        purpose: Purpose of the path, for the error message.
        option: Option with which the user can name another path.

    Raises:
        RecipeError: The path is absolute, or leads out of the folder.
    """
    path = folder / ref
    parts = Path(ref)
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a null character
        is_inside = False
    if parts.is_absolute() or ".." in parts.parts or not is_inside:
        raise RecipeError(
            f"The recipe names {purpose} {ref!r}, which is outside the recipe's folder.",
            f"If you trust the recipe, name the path with {option}.",
        )
    return path
