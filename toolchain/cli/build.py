"""Build: builds the variants of a recipe, and compares their ids with those in the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.building import plan_line
from toolchain.cli.compare import show
from toolchain.cli.options import (
    debug_option,
    dry_run_option,
    folder_options,
    json_option,
    results_option,
    training_options,
)
from toolchain.cli.output import echo, echo_json

if TYPE_CHECKING:
    from toolchain.data.inputs import TrainingSource
    from toolchain.recipes.building import BuiltVariant
    from toolchain.recipes.planning import Plan


def _print_schema(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from toolchain.recipes.json_schema import recipe_schema

        echo_json(recipe_schema())
        context.exit()


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", metavar="FOLDER|ID", help="The model, in place of the model that the recipe names.")
@click.option("--base", metavar="FOLDER|ID", help="Base model of a LoRA adapter, in place of the recipe's.")
@click.option(
    "--trim-vocab", metavar="CORPUS", help="File or folder of the texts with which the recipe's variants were trimmed."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the bundle, in place of the folder that the recipe names.",
)
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of recipes for editors, and exit.",
)
@training_options
@json_option
@dry_run_option
@results_option
@debug_option
@folder_options
def build(
    recipe: Path,
    model: str | None,
    base: str | None,
    trim_vocab: str | None,
    output: Path | None,
    train: TrainingSource,
    exported: Path,
    folder_name: str | None,
    folder: Path,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Build the variants of RECIPE, a file that `toolchain recipe` or a person wrote; exit code 3 if an id differs.

    The command skips variants that are up to date: name a new folder with --exported to build all of them. It compares
    each id with the id that the recipe states. If all ids are the same, it runs the recipe's benchmark and writes the
    recipe's bundle. Paths in a recipe are relative to the recipe's folder, and cannot lead out of it.

    \b
    Examples:
      toolchain build recipe.toml --dry-run
      toolchain build recipe.toml --exported rebuilt
      toolchain build recipe.toml --model ./my-checkpoint --train-data reviews.csv
      toolchain build --schema
    """
    from toolchain.build.trimming import corpus_of
    from toolchain.cli.progress import bar, say
    from toolchain.compare.current import compare_current
    from toolchain.data.datasets import DEFAULT_COLUMNS
    from toolchain.recipes import building
    from toolchain.recipes.planning import Overrides, make_plan
    from toolchain.results.folder import ResultsFolder, require_measured

    if train.file is None and (train.split or (train.columns != DEFAULT_COLUMNS and not trim_vocab)):
        raise click.UsageError("Options for columns and --split need --train-data.")
    if as_json and dry_run:
        raise click.UsageError("--json cannot be used with --dry-run.")
    corpus = corpus_of(trim_vocab, train.columns.text)
    overrides = Overrides(exported, model, folder_name, base, train if train.file else None, corpus, output)
    plan = make_plan(recipe, overrides)
    results = ResultsFolder(folder)
    # Benchmark and bundle are checked before the build, which may take hours.
    request, bundle_folder = building.bench_request(plan, results), building.bundle_folder(plan)
    if dry_run:
        _print_plan(plan, bundle_folder)
        return
    rows = building.build(plan, say, bar)
    if not as_json:
        _print_ids(rows)
    is_same = all(row.same is not False for row in rows)
    measured = building.measure(plan, request, say, bar) if is_same and request else None
    bundle = building.ship(plan, results, say, bar) if is_same else None
    if as_json:
        echo_json(_to_json(rows, measured and measured[1], bundle))
    else:
        if measured:
            show(compare_current([measured[0]], None, exported), "table")
        if bundle:
            echo(bundle[1])
            echo(f"id {bundle[0]['id']}")
    building.require_same_ids(plan, rows)
    if measured:
        require_measured(measured[0])


def _print_plan(plan: Plan, bundle_folder: Path | None) -> None:
    from toolchain.bench.run import planned_pairs

    for item in plan.items:
        echo(plan_line(item))
    if bench := plan.recipe.bench:
        cells = ", ".join(f"{name}@{provider}" for name, provider in planned_pairs(bench.variants, bench.providers))
        echo(f"bench: {cells}")
    if order := plan.recipe.ship:
        echo(f"ship: {', '.join(order.variants)} for {order.target} to {bundle_folder}")


def _print_ids(rows: Sequence[BuiltVariant]) -> None:
    for row in rows:
        work = "built" if row.built else "fresh"
        verdict = {None: "no id in the recipe", True: "same id", False: f"NOT the recipe's id {row.recipe_id}"}
        echo(f"{row.variant}: {work}, id {row.id}, {verdict[row.same]}")


def _to_json(
    rows: Sequence[BuiltVariant], result: Path | None, bundle: tuple[dict[str, Any], Path] | None
) -> dict[str, Any]:
    return {
        "same": all(row.same is not False for row in rows),
        "variants": [row.to_json() for row in rows],
        "result": str(result) if result else None,
        "bundle": {"folder": str(bundle[1]), "id": bundle[0]["id"]} if bundle else None,
    }
