"""Init: asks four questions, and writes a first recipe."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from toolchain.cli.completion import complete_data, complete_files, complete_models, complete_targets
from toolchain.cli.options import DATA, columns_options, debug_option, folder_options
from toolchain.cli.output import echo, echo_error
from toolchain.errors import ToolchainError
from toolchain.system.escaping import escape_line

if TYPE_CHECKING:
    from toolchain.data.datasets import Columns
    from toolchain.data.labels import LabelSet
    from toolchain.recipes.answers import DataFacts
    from toolchain.recipes.starter import Draft

T = TypeVar("T")
EXPORTED = Path("exported")
MAX_COLUMNS = 50  # names of columns in a question


@click.command()
@click.option(
    "--model",
    metavar="FOLDER|ID",
    shell_complete=complete_models,
    help="The model: `reference` (embedded), a folder, or a hub id.",
)
@click.option(
    "--data", metavar="DATA", shell_complete=complete_data, help=f"Labelled texts: `sst2` (embedded), {DATA}."
)
@columns_options
@click.option(
    "--target",
    metavar="TARGET",
    shell_complete=complete_targets,
    help="Where the model will run: a target of `ship` (web, python, mobile, server, ray-serve, mlflow, other), or "
    "`compare` for a recipe without a bundle.",
)
@click.option(
    "--max-drop",
    "max_drop",
    metavar="POINTS",
    help="Accuracy that the model may lose, in points. 0 allows no loss; with 1, 90 % may become 89 %.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("recipe.toml"),
    show_default=True,
    metavar="FILE",
    shell_complete=complete_files,
    help="File of the recipe. An existing file is never replaced.",
)
@debug_option
@folder_options
def init(
    model: str | None,
    data: str | None,
    columns: Columns,
    target: str | None,
    max_drop: str | None,
    output: Path,
    exported: Path,
    folder_name: str | None,
) -> None:
    """Write a first recipe for a model, a target and an allowed accuracy drop; `toolchain build` builds it.

    In a terminal, the command asks for each of --model, --data, --target and --max-drop that is missing. Comments in
    the recipe say why each variant is there, and what else to try. The command builds nothing. A recipe can name only
    data in its own folder, so write the recipe beside the data.

    \b
    Examples:
      toolchain init
      toolchain init --model reference --data sst2 --target web --max-drop 1
      toolchain init --model ./my-checkpoint --data reviews.csv --text-column review --target python --max-drop 0.5
      toolchain init --model user/name --data rows.parquet --target compare --max-drop 2 --output compare.toml
    """
    from toolchain.recipes import answers, starter
    from toolchain.recipes.writing import to_toml
    from toolchain.system.files import write_whole

    given = {"--model": model, "--data": data, "--target": target, "--max-drop": max_drop}
    missing = [name for name, value in given.items() if value is None]
    _require_terminal(missing)
    answers.check_output(output)
    if missing:
        echo("Enter takes the answer in brackets. Ctrl-C stops, and writes nothing.", err=True)
    folder = output.absolute().parent
    # The answers of the command line are checked before the first question.
    drop = None if max_drop is None else starter.parse_drop(max_drop)
    place = None if target is None else starter.find_target(target)
    facts = _answer(model, _ask_model, lambda text: answers.check_model(text, exported, folder_name, folder))
    check_data = _data_check(columns, facts.label_set, folder, may_ask=data is None)
    rows = _answer(data, lambda: _ask_data(facts.label_set), check_data)
    place = _answer(place, _ask_target, lambda text: _check_target(text, facts.label_set))
    drop = drop if drop is not None else _answer(None, _ask_drop, starter.parse_drop)
    draft = starter.draft(answers.join(facts, rows, place, drop))
    try:
        write_whole(output, to_toml(draft.recipe, draft.comments), replace=False)
    except FileExistsError:
        answers.check_output(output)
        raise
    echo(output)
    _print_next(draft, output, facts.option, exported)


def _require_terminal(missing: Sequence[str]) -> None:
    """Raises `UsageError` if options are missing and there is no terminal for questions."""
    if missing and not (sys.stdin.isatty() and sys.stderr.isatty()):
        names = ", ".join(f"'{name}'" for name in missing)
        raise click.UsageError(
            f"Missing option{'s' if len(missing) > 1 else ''} {names}. The command asks for them only in a terminal."
        )


def _answer(given: str | None, ask: Callable[[], str], check: Callable[[str], T]) -> T:
    """Returns the checked answer from the command line; without one, asks until an answer passes the check."""
    if given is not None:
        return check(given)
    while True:
        text = ask()
        try:
            return check(text)
        except ToolchainError as error:
            echo_error(error)


def _prompt(question: str, default: str | None = None) -> str:
    try:
        return str(click.prompt(question, default=default, err=True)).strip()
    except click.Abort:
        echo("", err=True)  # the message about the interrupt begins on a new line
        raise


def _ask_model() -> str:
    echo("\nWhich model? `reference` (embedded), a folder, or a hub id such as user/name.", err=True)
    return _prompt("Model", "reference")


def _ask_data(label_set: LabelSet) -> str:
    from toolchain.data.datasets import EMBEDDED
    from toolchain.data.inputs import fits_embedded_data

    echo(
        "\nWhich labelled texts? `sst2` (embedded), a CSV, TSV, JSON lines or Parquet file, or a hub dataset.", err=True
    )
    return _prompt("Data", EMBEDDED if fits_embedded_data(label_set) else None)


def _ask_target() -> str:
    from toolchain.recipes.starter import PLACES

    echo("\nWhere will the model run?", err=True)
    for name, place in PLACES.items():
        echo(f"  {name:8} {place}", err=True)
    return _prompt("Target", "python")


def _ask_drop() -> str:
    echo("\nHow many points of accuracy may the model lose? 0: none. 1: 90 % may become 89 %.", err=True)
    return _prompt("Points", "1")


def _check_target(text: str, label_set: LabelSet) -> str:
    from toolchain.recipes import answers, starter

    target = starter.find_target(text)
    answers.check_target(target, label_set)
    return target


def _data_check(columns: Columns, label_set: LabelSet, folder: Path, *, may_ask: bool) -> Callable[[str], DataFacts]:
    """Returns the check of an answer to the question for data; it asks for columns that have other names."""
    from dataclasses import replace

    from toolchain.recipes import answers

    def check(text: str) -> DataFacts:
        chosen = columns
        names, roles = answers.missing_columns(text, columns) if may_ask else ([], [])
        for role in roles:
            chosen = replace(chosen, **{role: _ask_column(role, names)})
        return answers.check_data(text, chosen, label_set, folder)

    return check


def _ask_column(role: str, names: Sequence[str]) -> str:
    listed = [escape_line(name) for name in names[:MAX_COLUMNS]] + (["…"] if len(names) > MAX_COLUMNS else [])
    echo(f"\nWhich column has the {role}s? {', '.join(listed)}", err=True)
    while (name := _prompt("Column")) not in names:
        echo(f"The data has no column {name!r}.", err=True)
    return name


def _print_next(draft: Draft, output: Path, model: str | None, exported: Path) -> None:
    from toolchain.cli.progress import say

    recipe = draft.recipe
    end = "and a benchmark"
    if recipe.ship:
        end = f"a benchmark, and a bundle of {recipe.ship.variants[0]} for {recipe.ship.target}"
    say(f"{len(recipe.variants)} variants, {end}; comments in the file say why")
    command = ["toolchain", "build", str(output)]
    command += ["--model", model] if model else []
    command += ["--exported", str(exported)] if exported != EXPORTED else []
    say(f"next: `{shlex.join([*command, '--dry-run'])}` shows the plan, and `{shlex.join(command)}` builds it")
