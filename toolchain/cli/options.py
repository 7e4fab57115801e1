"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from toolchain.artifacts.names import LABEL
from toolchain.cli.completion import complete_files, complete_models
from toolchain.results.folder import DEFAULT_FOLDER

if TYPE_CHECKING:
    from toolchain.build.workspace import Workspace
    from toolchain.data.files import Texts
    from toolchain.data.inputs import TrainingSource

F = TypeVar("F", bound=Callable[..., Any])


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType):
    """A duration such as ``90s``, ``20m``, ``2h`` or ``1d``; its value is in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)([smhd])", str(value))
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a duration such as 90s, 20m, 2h or 1d.", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


def require_finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """Refuses NaN and infinity, which `click.FloatRange` does not reject, as the callback of an option."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("must be a finite number")
    return value


def debug_option(command: F) -> F:
    """Adds --debug, and stores its value in the click context's `obj`, which `main` reads."""

    def set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
        if isinstance(context.obj, dict):
            context.obj["debug"] = value

    text = "Show the traceback of an error."
    return click.option("--debug", is_flag=True, expose_value=False, callback=set_debug, help=text)(command)


def folder_options(command: F) -> F:
    """Adds --as and --exported, for every command that works on artifacts."""
    for option in (
        click.option(
            "--exported",
            type=click.Path(file_okay=False, path_type=Path),
            default=Path("exported"),
            show_default=True,
            help="Folder of the artifacts.",
        ),
        click.option(
            "--as",
            "folder_name",
            metavar="NAME",
            help="Name of the model's folder under --exported.  [default: the model's own name]",
        ),
    ):
        command = option(command)
    return command


def model_options(command: F) -> F:
    """Adds --model, --as, --exported and --debug, for every command that works on a model."""
    text = "The model: `reference` (embedded), a folder, or a hub id."
    option = click.option("--model", default="reference", show_default=True, shell_complete=complete_models, help=text)
    return debug_option(option(folder_options(command)))


def results_option(command: F) -> F:
    """Adds --results, which a command receives as `folder`, for every command that reads or writes result files."""
    return click.option(
        "--results",
        "folder",
        type=click.Path(file_okay=False, path_type=Path),
        default=DEFAULT_FOLDER.path,
        show_default=True,
        help="Folder of the result files.",
    )(command)


def name_option(command: F) -> F:
    """Adds --name, for every command that builds a variant with the user's settings."""

    def check(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
        if value is not None and not re.fullmatch(LABEL, value):
            raise click.BadParameter("use at most 100 lower-case letters, digits and single hyphens.")
        return value or ""

    text = (
        "Label of the new variant, as in onnx-int8+LABEL. A new variant without a label replaces the variant of the "
        "same name."
    )
    return click.option("--name", "label", metavar="LABEL", callback=check, help=text)(command)


def no_pass_option(names: Sequence[str], action: str) -> Callable[[F], F]:
    """Returns a decorator that adds --no-pass, for every command that rewrites a graph.

    Args:
        names: Names of the passes that the option accepts.
        action: First sentence of the help text, without a full stop.
    """
    text = f"{action}. Can be repeated."
    return click.option("--no-pass", "omitted_passes", type=click.Choice(names), multiple=True, help=text)


def json_option(command: F) -> F:
    """Adds --json, for every command that can print JSON."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command)


def dry_run_option(command: F) -> F:
    """Adds the option --dry-run to a command that builds artifacts."""
    return click.option("--dry-run", is_flag=True, help="Print the plan, and change nothing.")(command)


RAY = "ray"


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --engine and --address, for every command whose work several machines can share."""

    @functools.wraps(command)
    def run_command(engine: str, address: str | None, **arguments: Any) -> Any:
        if address and engine != RAY:
            raise click.UsageError("--address needs --engine ray.")
        return command(engine=engine, address=address, **arguments)

    options = [
        click.option(
            "--engine",
            type=click.Choice(["local", RAY]),
            default="local",
            show_default=True,
            help="Run on this machine, or on a Ray cluster.",
        ),
        click.option(
            "--address",
            metavar="HOST:PORT",
            help="Address of the cluster, as `ray start --head` prints it, or `auto`.  "
            "[default: a new cluster on this machine]",
        ),
    ]
    for option in reversed(options):
        run_command = option(run_command)
    return run_command


def open_workspace(
    model: str,
    exported: Path,
    folder_name: str | None,
    train: TrainingSource | None = None,
    corpus: Texts | None = None,
) -> Workspace:
    """Opens the workspace of a model.

    Args:
        model: Value of --model.
        exported: Value of --exported.
        folder_name: Value of --as.
        train: Training data from `training_options`.
        corpus: Texts that vocabulary trimming uses.
    """
    from toolchain.build.workspace import Workspace

    return Workspace.open(model, exported, folder_name, train, corpus)


DATA = (
    "a CSV, TSV, JSON lines or Parquet file, a folder of Parquet files or of a saved dataset, or a hub dataset such as "
    "glue/sst2"
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options for training data, which a command receives together as the argument `train`."""

    @functools.wraps(command)
    def run_command(train_data: str | None, **arguments: Any) -> Any:
        from toolchain.data.inputs import TrainingSource

        return command(train=TrainingSource(train_data, arguments.pop("columns"), arguments.pop("split")), **arguments)

    text = f"Training data: {DATA}.  [default: the embedded SST-2]"
    return click.option("--train-data", metavar="DATA", shell_complete=complete_files, help=text)(
        _columns_options(run_command, "train")
    )


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options for evaluation data, which a command receives as `data`, `columns` and `split`."""
    text = f"Evaluation data: {DATA}.  [default: the embedded SST-2]"
    return click.option("--data", metavar="DATA", shell_complete=complete_files, help=text)(
        _columns_options(command, "validation")
    )


def _columns_options(command: Callable[..., Any], default_split: str) -> Callable[..., Any]:
    """Adds the options for columns and split, which a command receives as `columns` and `split`."""
    split_text = "Dataset split, or `held-out` for the held-out rows of the data.  [default: validation]"
    text = split_text if default_split == "validation" else f"Dataset split.  [default: {default_split}]"
    return columns_options(click.option("--split", help=text)(command))


def columns_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options for the columns of data, which a command receives together as `columns`."""

    @functools.wraps(command)
    def run_command(text_column: str | None, pair_column: str | None, label_column: str, **arguments: Any) -> Any:
        from toolchain.data.datasets import Columns

        return command(columns=Columns(text_column, label_column, pair_column), **arguments)

    options = [
        click.option("--text-column", help="Column of texts in the data.  [default: sentence, text or tokens]"),
        click.option("--text-pair-column", "pair_column", help="Column of second texts, if each row is a pair."),
        click.option("--label-column", default="label", show_default=True, help="Column of labels in the data."),
    ]
    for option in reversed(options):
        run_command = option(run_command)
    return run_command
