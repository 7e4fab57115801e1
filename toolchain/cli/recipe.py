"""Recipe: prints how an artifact was built."""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.completion import complete_variants
from toolchain.cli.options import model_options, open_workspace
from toolchain.cli.output import echo


@click.command()
@click.argument("variant", shell_complete=complete_variants)
@model_options
def recipe(variant: str, model: str, exported: Path, folder_name: str | None) -> None:
    """Print the recipe of VARIANT: checkpoint, training data, and each step with its settings and the artifact's id.

    `toolchain build` builds the variant again from its recipe, and compares the ids. The command first checks that the
    files of the variant and of its ancestors are unmodified.

    \b
    Examples:
      toolchain recipe onnx-int8 > recipe.toml
      toolchain recipe onnx-int8 --model ./my-checkpoint > recipe.toml
    """
    from toolchain.recipes.writing import recipe_of, to_toml

    echo(to_toml(recipe_of(open_workspace(model, exported, folder_name), variant)), nl=False)
