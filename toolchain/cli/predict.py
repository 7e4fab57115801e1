"""Predict: computes labels and probabilities for the texts of a file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from toolchain.cli.completion import complete_files, complete_variants_or_folders
from toolchain.cli.options import RAY, engine_options, model_options, open_workspace
from toolchain.cli.output import echo


@click.command()
@click.argument("source", metavar="VARIANT|BUNDLE", shell_complete=complete_variants_or_folders)
@click.argument("inputs", nargs=-1, metavar="[FILE]...", shell_complete=complete_files)
@click.option("--text-column", help="Column of texts.  [default: sentence, text or tokens]")
@click.option("--text-pair-column", "pair_column", help="Column of second texts, if each row is a pair.")
@click.option(
    "--output",
    metavar="FILE|FOLDER/",
    help="Output file: .csv, .tsv, .jsonl or .parquet. Or a folder or URL that ends in `/`, for Parquet parts.  "
    "[default: standard output, as JSON lines]",
)
@click.option(
    "--escape-formulas",
    is_flag=True,
    help="With a .csv or .tsv file as --output: write an apostrophe before each text and label that begins with =, +, "
    "-, @, a tab or a line break. A spreadsheet then shows the text, and does not run it as a formula.",
)
@click.option(
    "--max-errors",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="With a folder as --output: largest number of rows without an answer.",
)
@engine_options
@model_options
def predict(
    model: str,
    exported: Path,
    folder_name: str | None,
    source: str,
    inputs: tuple[str, ...],
    text_column: str | None,
    pair_column: str | None,
    output: str | None,
    escape_formulas: bool,
    max_errors: int,
    engine: str,
    address: str | None,
) -> None:
    """Predict labels, scores or entities for the texts of FILE with a variant or a bundle, in the order of the texts.

    FILE is a .csv, .tsv, .jsonl or .parquet file, a folder of .parquet files, or a folder that save_to_disk of the
    library datasets wrote. A FILE with another ending has one text in each line. If FILE is -, the command reads one
    text in each line of standard input. A longer FILE does not need more memory; a row has at most 16,777,216
    characters. If you interrupt a command with --output, the same command continues the work.

    With a folder as --output, the command takes several FILEs. A FILE may then also be a folder of all these formats,
    a quoted pattern such as "data/*.csv.gz", or a URL such as s3://bucket/folder/.

    With --engine ray, all machines of a Ray cluster take part; this machine must be a node of the cluster.

    \b
    Examples:
      toolchain predict onnx-int8 reviews.csv --text-column review --output scored.parquet
      echo "a charming film" | toolchain predict onnx-int8
      toolchain predict exported/reference/bundle-python reviews.txt
      toolchain predict onnx-int8 reviews/ more.jsonl.gz --output scored/
      toolchain predict onnx-int8 reviews.csv --output scored.parquet --engine ray --address auto
    """
    from toolchain.cli.progress import bar, say
    from toolchain.data.files import Texts
    from toolchain.data.storage import public_name
    from toolchain.data.writing import SPREADSHEETS
    from toolchain.distributed import connect
    from toolchain.predict import load_bundle_model, load_variant_model, score_locally
    from toolchain.predict import predict as score
    from toolchain.predict.parts import Request, predict_parts, score_parts_locally
    from toolchain.ship.bundle_files.verify import BUNDLE

    to_folder = output is not None and _is_folder(output)
    if escape_formulas and (output is None or to_folder or Path(output).suffix.lower() not in SPREADSHEETS):
        raise click.UsageError(f"--escape-formulas needs --output with a {' or '.join(SPREADSHEETS)} file.")
    _check_options(inputs, output, to_folder, max_errors)
    with ExitStack() as stack:
        cluster = stack.enter_context(connect(address, say)) if engine == RAY else None
        if "/" in source or (Path(source) / BUNDLE).exists():
            chosen_model = load_bundle_model(Path(source), say)
        else:
            chosen_model = load_variant_model(open_workspace(model, exported, folder_name), source, say, bar)
        if to_folder and output is not None:
            request = Request(inputs, output, text_column, pair_column, max_errors)
            parts_engine = cluster.score_parts if cluster else score_parts_locally
            summary = predict_parts(chosen_model, request, say, bar, parts_engine)
            count, errors = summary.rows, summary.errors
        else:
            texts = Texts(inputs[0] if inputs else "-", text_column, pair_column)
            target = Path(output) if output else None
            score_engine = cluster.score if cluster else score_locally
            count, errors = score(chosen_model, texts, target, say, bar, score_engine, escape_formulas), 0
    if output:
        say(f"{count} texts scored" + (f", {errors} rows have no answer; see the folder _errors" if errors else ""))
        echo(public_name(output) if to_folder else Path(output))


def _is_folder(output: str) -> bool:
    return output.endswith("/") or Path(output).is_dir()


def _check_options(inputs: Sequence[str], output: str | None, to_folder: bool, max_errors: int) -> None:
    """Raises `click.UsageError` if the options exclude each other."""
    if to_folder:
        if not inputs:
            raise click.UsageError("A folder as --output needs at least one FILE.")
        return
    if max_errors:
        raise click.UsageError("--max-errors needs a folder as --output, such as scored/.")
    if output and "://" in output:
        raise click.UsageError("A URL as --output is a folder: end it with /.")
    if len(inputs) > 1 or any("://" in name for name in inputs):
        raise click.UsageError("Several FILEs and URLs need a folder as --output, such as scored/.")
