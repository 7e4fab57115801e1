"""Commands for what leaves: ship, verify, predict."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import click

from toolchain.cli.options import RAY, debug_option, engine_options, json_option, model_options, open_workspace
from toolchain.ship.targets.releases import DEFAULT, ORDER, RELEASES


@click.command()
@click.argument("variants", nargs=-1, required=True, metavar="VARIANT...")
@click.option(
    "--target",
    type=click.Choice(["web", "python", "mobile", "server", "other"]),
    required=True,
    help="web: browser and Node, by transformers.js. python: onnxruntime and tokenizers. mobile: ONNX Runtime on "
    "Android and iOS. server: Triton and KServe. other: any ONNX runtime.",
)
@click.option(
    "--ort-mobile",
    type=click.Choice(list(RELEASES)),
    metavar="RELEASE",
    help=f"mobile: the oldest release of ONNX Runtime that must read the models, {ORDER[0]} to {ORDER[-1]}.  "
    f"[default: {DEFAULT}]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the bundle goes.  [default: bundle-TARGET beside the variants]",
)
@click.option(
    "--demo/--no-demo",
    default=True,
    help="web: a page to try it in, which needs npm once; or only the models.  [default: demo]",
)
@click.option(
    "--with-tokenizer",
    is_flag=True,
    help="python, mobile, server: text in, probabilities out, by onnxruntime-extensions in the graph.",
)
@click.option("--license", "license_", metavar="TEXT", help="The model's licence, where it is not known here.")
@json_option
@model_options
def ship(
    model: str,
    exported: Path,
    slug: str | None,
    variants: tuple[str, ...],
    target: str,
    ort_mobile: str | None,
    output: Path | None,
    demo: bool,
    with_tokenizer: bool,
    license_: str | None,
    as_json: bool,
) -> None:
    """Make a bundle of VARIANT...: a folder an app loads without this toolchain, and that can check itself.

    Models, tokenizer, labels, digests, golden sentences, where each file is exact, what was measured, a README with
    code that runs. What is missing or stale is built first; an unchanged bundle in the same place is replaced.

    \b
    Examples:
      toolchain ship onnx-int8 --target web
      toolchain ship onnx-int8 --target python --output app/model
      toolchain ship onnx-int8 onnx-int8-portable --target mobile --ort-mobile 1.20
      toolchain ship onnx-std onnx-std-int8 --target other
    """
    from toolchain.cli.progress import bar, say
    from toolchain.ship.shipping import Order, default_output
    from toolchain.ship.shipping import ship as make

    if ort_mobile and target != "mobile":
        raise click.UsageError(f"--ort-mobile is of --target mobile, not of --target {target}.")
    workspace = open_workspace(model, exported, slug)
    place = output or default_output(workspace, target)
    order = Order(variants, target, license_, demo, with_tokenizer, ort_mobile or DEFAULT)
    body = make(workspace, order, place, say, bar)
    click.echo(json.dumps(body, indent=1) if as_json else place)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
@debug_option
def verify(bundle: Path, as_json: bool) -> None:
    """Check that BUNDLE is what it was; exit 3 if not.

    Every file's digest, then the golden sentences' tokens and logits, asked here. The bundle's own verify.py does the
    same without this toolchain.

    \b
    Example:
      toolchain verify exported/reference/bundle-python
    """
    from toolchain.ship.shipping import verify as check

    report = check(bundle)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    click.echo(f"{report['files']} files as listed, bundle {report['id'][:12]}")
    for variant, found in report["models"].items():
        click.echo(f"{variant}: largest |Δlogit| {found['largest_delta']:.2g}, ≤ {found['tolerance']:g} allowed")


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
    from toolchain.distributed import connected
    from toolchain.predict import here, of_bundle, of_variant
    from toolchain.predict import predict as score
    from toolchain.ship.bundle_files.verify import BUNDLE

    with ExitStack() as stack:
        score_on = stack.enter_context(connected(address, say)).scored if engine == RAY else here
        if "/" in what or (Path(what) / BUNDLE).exists():
            found = of_bundle(Path(what), say)
        else:
            found = of_variant(open_workspace(model, exported, slug), what, say, bar)
        count = score(found, Texts(file, text_column, pair_column), output, say, bar, score_on)
    if output:
        say(f"{count} texts scored")
        click.echo(output)
