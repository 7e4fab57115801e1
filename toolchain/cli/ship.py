"""Ship: a bundle for an app."""

from __future__ import annotations

import json
from pathlib import Path

import click

from toolchain.cli.options import json_option, model_options, open_workspace
from toolchain.ship.targets import TARGETS
from toolchain.ship.targets.releases import DEFAULT, ORDER, RELEASES


@click.command()
@click.argument("variants", nargs=-1, required=True, metavar="VARIANT...")
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
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
