"""Finetune: trains a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.completion import complete_folders
from toolchain.cli.options import DATA, debug_option, json_option, training_options
from toolchain.cli.output import echo, echo_json

if TYPE_CHECKING:
    from toolchain.data.inputs import TrainingSource


@click.command()
@click.option(
    "--base",
    default="distilbert/distilbert-base-uncased",
    show_default=True,
    shell_complete=complete_folders,
    help="Model to train: `reference` (embedded), a folder, or a hub id, with or without a classification head.",
)
@click.option("--revision", help="Branch, tag or commit of a base model on the hub.")
@click.option("--epochs", type=click.IntRange(1, 99), default=3, show_default=True, help="Number of epochs.")
@click.option(
    "--lr",
    "learning_rate",
    type=click.FloatRange(0, 1, min_open=True),
    default=5e-5,
    show_default=True,
    help="Peak learning rate.",
)
@click.option(
    "--batch-size", type=click.IntRange(1, 1024), default=32, show_default=True, help="Rows in a training step."
)
@click.option(
    "--max-length",
    type=click.IntRange(8),
    metavar="TOKENS",
    help="Truncate texts to this number of tokens.  [default: the base model's maximum]",
)
@click.option(
    "--labels",
    metavar="A,B,…",
    help="Class labels of a new classification head, in order.  [default: the labels of the base model or the data]",
)
@click.option(
    "--multi-label", is_flag=True, help="Each text has any number of labels, written as a|b in the label column."
)
@click.option("--regression", is_flag=True, help="The label column holds scores; the model predicts a score.")
@click.option(
    "--entities",
    is_flag=True,
    help="The label column holds a label for each word, such as B-CITY; the model finds entities.",
)
@click.option("--teacher", metavar="MODEL", help="Also learn from the logits of this classifier.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Random seed of the new classification head, the row order and dropout.",
)
@click.option(
    "--data",
    metavar="DATA",
    help=f"Data for the final evaluation: {DATA}.  [default: the held-out rows; for the embedded SST-2, its "
    "validation set]",
)
@training_options
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the new checkpoint."
)
@json_option
@debug_option
def finetune(
    base: str,
    revision: str | None,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    max_length: int | None,
    labels: str | None,
    multi_label: bool,
    regression: bool,
    entities: bool,
    teacher: str | None,
    seed: int,
    data: str | None,
    train: TrainingSource,
    output: Path,
    as_json: bool,
) -> None:
    """Train a base model on your labelled texts. Other commands accept the new checkpoint as --model.

    The command holds out a tenth of the rows, at most 2000. It keeps the weights of the epoch that scores best on the
    held-out rows. If you interrupt the training, the same command continues it.

    \b
    Examples:
      toolchain finetune --base reference --train-data tickets.csv --output tickets
      toolchain finetune --train-data glue/sst2 --output sst2
      toolchain finetune --train-data pairs.jsonl --text-column a --text-pair-column b --output pairs
      toolchain finetune --train-data reviews.csv --label-column stars --regression --output stars
      toolchain finetune --train-data orders.jsonl --label-column tags --entities --output orders
    """
    from toolchain.cli.progress import bar, say
    from toolchain.data.labels import MULTI, REGRESSION, TOKENS
    from toolchain.finetune import FinetuneRequest, make_recipe, summary
    from toolchain.finetune import finetune as run_finetune

    recipe = make_recipe(epochs, learning_rate, batch_size, seed, has_teacher=teacher is not None)
    names = tuple(name.strip() for name in labels.split(",")) if labels else ()
    if len(set(names)) < len(names) or not all(names):
        raise click.BadParameter("give different names, separated by commas", param_hint="--labels")
    flags = {"--multi-label": multi_label, "--regression": regression, "--entities": entities}
    if sum(flags.values()) > 1:
        chosen = " and ".join(name for name, is_set in flags.items() if is_set)
        raise click.UsageError(f"{chosen} exclude each other: pass one of them.")
    task = MULTI if multi_label else REGRESSION if regression else TOKENS if entities else None
    card = run_finetune(
        FinetuneRequest(base, train, recipe, output, revision, teacher, names, task, max_length, data), say, bar
    )
    say(summary(card))
    if as_json:
        echo_json(card)
    else:
        echo(output)
