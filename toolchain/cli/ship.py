"""Ship: writes a bundle for an app."""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import json_option, model_options, open_workspace, results_option
from toolchain.cli.output import echo, echo_json
from toolchain.ship.targets import TARGETS
from toolchain.ship.targets.releases import DEFAULT, ORDER, RELEASES


@click.command()
@click.argument("variants", nargs=-1, required=True, metavar="VARIANT...")
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    required=True,
    help="Kind of app. web: for browser and Node, with transformers.js. python: with onnxruntime and tokenizers. "
    "mobile: for Android and iOS, with ONNX Runtime. server: for Triton and KServe. mlflow: a model of MLflow. other: "
    "for any ONNX runtime.",
)
@click.option(
    "--ort-mobile",
    type=click.Choice(list(RELEASES)),
    metavar="RELEASE",
    help=f"mobile only: oldest release of ONNX Runtime that must run the models, {ORDER[0]} to {ORDER[-1]}.  "
    f"[default: {DEFAULT}]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the bundle.  [default: bundle-TARGET beside the variants]",
)
@click.option(
    "--demo/--no-demo",
    default=True,
    help="web only: whether the bundle has a demo page. For the first demo page, the command needs npm to download "
    "JavaScript packages.  [default: demo]",
)
@click.option(
    "--with-tokenizer",
    is_flag=True,
    help="python, mobile and server only: put the tokenizer into the graph, with operators of onnxruntime-extensions. "
    "A model with the tokenizer takes text and returns probabilities.",
)
@click.option("--license", "license_", metavar="TEXT", help="Licence of the bundle.  [default: the model's licence]")
@click.option(
    "--sign",
    "key",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="KEY",
    help="PEM file with the elliptic-curve private key that signs the bundle; needs the extra `sign`.",
)
@click.option(
    "--certificate",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="PEM file with the certificate of KEY, followed by the intermediate certificates.",
)
@json_option
@results_option
@model_options
def ship(
    model: str,
    exported: Path,
    folder_name: str | None,
    variants: tuple[str, ...],
    target: str,
    ort_mobile: str | None,
    output: Path | None,
    demo: bool,
    with_tokenizer: bool,
    license_: str | None,
    key: Path | None,
    certificate: Path | None,
    folder: Path,
    as_json: bool,
) -> None:
    """Write VARIANT... to a bundle: a folder that an app loads without this toolchain, and that can check itself.

    A bundle has models, tokenizer, labels, checksums, golden sentences, the processors on which each model is exact,
    benchmark figures, and a README with working code. The command builds missing and stale variants first. It replaces
    an existing bundle in the output folder if nobody modified that bundle. It prints the output folder and the id of
    the bundle.

    \b
    Examples:
      toolchain ship onnx-int8 --target web
      toolchain ship onnx-int8 --target python --output app/model
      toolchain ship onnx-int8 onnx-int8-portable --target mobile --ort-mobile 1.20
      toolchain ship onnx-std onnx-std-int8 --target other
      toolchain ship onnx-int8 --target python --sign key.pem
    """
    from toolchain.cli.progress import bar, say
    from toolchain.results.folder import ResultsFolder
    from toolchain.ship.shipping import Order, default_output
    from toolchain.ship.shipping import ship as write_bundle
    from toolchain.ship.signing import Signer

    if ort_mobile and target != "mobile":
        raise click.UsageError(f"--ort-mobile needs --target mobile, not --target {target}.")
    if certificate and not key:
        raise click.UsageError("--certificate needs --sign.")
    signer = Signer.open(key, certificate) if key else None
    workspace = open_workspace(model, exported, folder_name)
    output_folder = output or default_output(workspace, target)
    order = Order(
        variants, target, license_, demo, with_tokenizer, ort_mobile or DEFAULT, ResultsFolder(folder), signer
    )
    bundle = write_bundle(workspace, order, output_folder, say, bar)
    if as_json:
        echo_json(bundle)
    else:
        echo(output_folder)
        echo(f"id {bundle['id']}")
