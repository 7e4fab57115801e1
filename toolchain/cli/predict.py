"""Predict: computes labels and probabilities for the texts of a file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from toolchain.cli.completion import complete_files, complete_variants_or_folders
from toolchain.cli.options import RAY, engine_options, model_options, open_workspace
from toolchain.cli.output import echo


@click.command()
@click.argument("source", metavar="VARIANT|BUNDLE", shell_complete=complete_variants_or_folders)
@click.argument("file", default="-", metavar="[FILE]", shell_complete=complete_files)
@click.option("--text-column", help="Column of texts.  [default: sentence, text or tokens]")
@click.option("--text-pair-column", "pair_column", help="Column of second texts, if each row is a pair.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Output file: .csv, .tsv, .jsonl or .parquet.  [default: standard output, as JSON lines]",
)
@click.option(
    "--escape-formulas",
    is_flag=True,
    help="With a .csv or .tsv file as --output: write an apostrophe before each text and label that begins with =, +, "
    "-, @, a tab or a line break. A spreadsheet then shows the text, and does not run it as a formula.",
)
@engine_options
@model_options
def predict(
    model: str,
    exported: Path,
    folder_name: str | None,
    source: str,
    file: str,
    text_column: str | None,
    pair_column: str | None,
    output: Path | None,
    escape_formulas: bool,
    engine: str,
    address: str | None,
) -> None:
    """Predict labels, scores or entities for the texts of FILE with a variant or a bundle, in the order of the texts.

    FILE is a .csv, .tsv, .jsonl or .parquet file, a folder of .parquet files, or a folder that save_to_disk of the
    library datasets wrote. A FILE with another ending has one text in each line. If FILE is -, the command reads one
    text in each line of standard input. A longer FILE does not need more memory; a row has at most 16,777,216
    characters. If you interrupt a command with --output, the same command continues the work.

    With --engine ray, all machines of a Ray cluster take part; this machine must be a node of the cluster.

    \b
    Examples:
      toolchain predict onnx-int8 reviews.csv --text-column review --output scored.parquet
      echo "a charming film" | toolchain predict onnx-int8
      toolchain predict exported/reference/bundle-python reviews.txt
      toolchain predict onnx-int8 reviews.csv --output scored.parquet --engine ray --address auto
    """
    from toolchain.cli.progress import bar, say
    from toolchain.data.files import Texts
    from toolchain.data.writing import SPREADSHEETS
    from toolchain.distributed import connect
    from toolchain.predict import load_bundle_model, load_variant_model, score_locally
    from toolchain.predict import predict as score
    from toolchain.ship.bundle_files.verify import BUNDLE

    if escape_formulas and (output is None or output.suffix.lower() not in SPREADSHEETS):
        raise click.UsageError(f"--escape-formulas needs --output with a {' or '.join(SPREADSHEETS)} file.")
    with ExitStack() as stack:
        engine_function = stack.enter_context(connect(address, say)).score if engine == RAY else score_locally
        if "/" in source or (Path(source) / BUNDLE).exists():
            chosen_model = load_bundle_model(Path(source), say)
        else:
            chosen_model = load_variant_model(open_workspace(model, exported, folder_name), source, say, bar)
        texts = Texts(file, text_column, pair_column)
        count = score(chosen_model, texts, output, say, bar, engine_function, escape_formulas)
    if output:
        say(f"{count} texts scored")
        echo(output)
