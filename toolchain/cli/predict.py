"""Predict: labels and probabilities for the texts of a file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from toolchain.cli.options import RAY, engine_options, model_options, open_workspace


@click.command()
@click.argument("what", metavar="VARIANT|BUNDLE")
@click.argument("file", default="-", metavar="[FILE]")
@click.option("--text-column", help="The column of texts.  [default: sentence or text]")
@click.option("--text-pair-column", "pair_column", help="The column of second texts, where each row is a pair.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A .csv, .tsv, .jsonl or .parquet file.  [default: JSON lines on standard output]",
)
@engine_options
@model_options
def predict(
    model: str,
    exported: Path,
    slug: str | None,
    what: str,
    file: str,
    text_column: str | None,
    pair_column: str | None,
    output: Path | None,
    engine: str,
    address: str | None,
) -> None:
    """Score the texts of FILE with a variant or a bundle: label and probabilities, in order.

    FILE is CSV, TSV, JSON lines or Parquet by its ending, else one text a line; - is standard input. However long it
    is, it takes no more memory. With --output, the same command goes on where an interrupted one was. With --engine
    ray, every machine of a Ray cluster takes part; this one must be a node of it.

    \b
    Examples:
      toolchain predict onnx-int8 reviews.csv --text-column review --output scored.parquet
      echo "a charming film" | toolchain predict onnx-int8
      toolchain predict exported/reference/bundle-python reviews.txt
      toolchain predict onnx-int8 reviews.csv --output scored.parquet --engine ray --address auto
    """
    from toolchain.cli.progress import bar, say
    from toolchain.data.files import Texts
    from toolchain.distributed import connect
    from toolchain.predict import here, of_bundle, of_variant
    from toolchain.predict import predict as score
    from toolchain.ship.bundle_files.verify import BUNDLE

    with ExitStack() as stack:
        score_on = stack.enter_context(connect(address, say)).score if engine == RAY else here
        if "/" in what or (Path(what) / BUNDLE).exists():
            found = of_bundle(Path(what), say)
        else:
            found = of_variant(open_workspace(model, exported, slug), what, say, bar)
        count = score(found, Texts(file, text_column, pair_column), output, say, bar, score_on)
    if output:
        say(f"{count} texts scored")
        click.echo(output)
