"""Ship: writes a bundle for an app."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from toolchain.cli.completion import complete_variants
from toolchain.cli.options import json_option, model_options, open_workspace, results_option
from toolchain.cli.output import echo, echo_json
from toolchain.results.session_file import LATENCY, OBJECTIVES, SessionFile
from toolchain.ship.targets import TARGETS, TUNABLE
from toolchain.ship.targets.releases import DEFAULT, ORDER, RELEASES

if TYPE_CHECKING:
    from toolchain.progress import Say

# Options beside which `ship` needs no VARIANT, because it publishes an existing bundle.
_PUSH_OPTIONS = {"variants", "output", "destination", "public", "as_json", "debug"}


def _parse_destination(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | str | None:
    """Returns a folder as a path, and the id of a repository as text."""
    if value is None or value.startswith((".", "/")):
        return Path(value) if value else None
    from toolchain.ship.pushing import check_name

    try:
        check_name(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}. A folder begins with . or /, as in ./{value}.") from error
    return value


@click.command()
@click.argument("variants", nargs=-1, metavar="[VARIANT]...", shell_complete=complete_variants)
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    help="Kind of app. web: for browser and Node, with transformers.js. python: with onnxruntime and tokenizers. "
    "mobile: for Android and iOS, with ONNX Runtime. server: for Triton and KServe. ray-serve: an application of Ray "
    "Serve. mlflow: a model of MLflow. other: for any ONNX runtime.",
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
    help="python, mobile, server and ray-serve only: put the tokenizer into the graph, with operators of "
    "onnxruntime-extensions. A model with the tokenizer takes text and returns probabilities.",
)
@click.option(
    "--session",
    "session_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="python, web and server only: file of `toolchain tune --session`, whose settings of ONNX Runtime the bundle's "
    "code uses.",
)
@click.option(
    "--session-for",
    type=click.Choice(OBJECTIVES),
    help=f"Settings to take from the file of --session.  [default: {LATENCY}]",
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
@click.option(
    "--exit-confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="CONFIDENCE",
    help="Confidence threshold of variants with exits, one of those that the build measured. A text exits if its "
    "confidence reaches this threshold.  [default: the threshold that the build chose]",
)
@click.option(
    "--push",
    "destination",
    metavar="USER/NAME",
    callback=_parse_destination,
    help="Upload the bundle to this repository of the model hub. A value that begins with . or / is a folder, which "
    "gets the same files. Without VARIANT, the command pushes the existing bundle in the folder --output.",
)
@click.option("--public", is_flag=True, help="--push only: create a public repository.  [default: private]")
@json_option
@results_option
@model_options
@click.pass_context
def ship(
    context: click.Context,
    model: str,
    exported: Path,
    folder_name: str | None,
    variants: tuple[str, ...],
    target: str,
    ort_mobile: str | None,
    output: Path | None,
    demo: bool,
    with_tokenizer: bool,
    session_path: Path | None,
    session_for: str | None,
    exit_confidence: float | None,
    license_: str | None,
    key: Path | None,
    certificate: Path | None,
    destination: Path | str | None,
    public: bool,
    folder: Path,
    as_json: bool,
) -> None:
    """Write VARIANT... to a bundle: a folder that an app loads without this toolchain, and that can check itself.

    A bundle has models, tokenizer, labels, checksums, golden sentences, the processors on which each model is exact,
    benchmark figures, and a README with working code. The command builds missing and stale variants first. It replaces
    an existing bundle in the output folder if nobody modified that bundle. It prints the output folder, the id of the
    bundle and, with --push, the URL of the commit.

    \b
    Examples:
      toolchain ship onnx-int8 --target web
      toolchain ship onnx-int8 --target python --output app/model
      toolchain ship onnx-int8 onnx-int8-portable --target mobile --ort-mobile 1.20
      toolchain ship onnx-std onnx-std-int8 --target other
      toolchain ship onnx-int8 --target python --sign key.pem
      toolchain ship onnx-int8 --target python --session session.json --session-for throughput
      toolchain ship onnx-exits-int8 --target python --exit-confidence 0.98
      toolchain ship onnx-int8 --target web --push user/name
      toolchain ship --output app/model --push user/name
    """
    from toolchain.cli.progress import bar, say
    from toolchain.results.folder import ResultsFolder
    from toolchain.ship import checking
    from toolchain.ship.shipping import Order, default_output
    from toolchain.ship.shipping import ship as write_bundle
    from toolchain.ship.signing import Signer

    if public and not isinstance(destination, str):
        raise click.UsageError("--public needs --push USER/NAME.")
    if not variants:
        existing = _existing_bundle(context, output, destination)
        checking.check_bundle(existing)
        place = _push(existing, destination, public, say)
        _print_bundle(checking.read(existing)[0], existing, place, as_json)
        return
    if not target:
        raise click.UsageError("Missing option '--target'.")
    if ort_mobile and target != "mobile":
        raise click.UsageError(f"--ort-mobile needs --target mobile, not --target {target}.")
    if certificate and not key:
        raise click.UsageError("--certificate needs --sign.")
    if session_path and target not in TUNABLE:
        raise click.UsageError(f"--session needs --target {', '.join(TUNABLE[:-1])} or {TUNABLE[-1]}, not {target}.")
    if session_for and not session_path:
        raise click.UsageError("--session-for needs --session.")
    session = SessionFile.read(session_path) if session_path else None
    signer = Signer.open(key, certificate) if key else None
    workspace = open_workspace(model, exported, folder_name)
    output_folder = output or default_output(workspace, target)
    order = Order(
        variants,
        target,
        license_,
        demo,
        with_tokenizer,
        ort_mobile or DEFAULT,
        ResultsFolder(folder),
        signer,
        session,
        session_for or LATENCY,
        exit_confidence,
    )
    bundle = write_bundle(workspace, order, output_folder, say, bar)
    _print_bundle(bundle, output_folder, _push(output_folder, destination, public, say), as_json)


def _existing_bundle(context: click.Context, output: Path | None, destination: Path | str | None) -> Path:
    """Returns the folder of the bundle for a command without VARIANT.

    Raises:
        UsageError: The command has an option that only a new bundle needs, or lacks --push or --output.
    """
    if output is None or destination is None:
        raise click.UsageError("Missing argument 'VARIANT'. Without it, the command needs both --push and --output.")
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in _PUSH_OPTIONS and source == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} needs a VARIANT, because it changes how a bundle is written.")
    return output


def _push(folder: Path, destination: Path | str | None, public: bool, say: Say) -> str | None:
    """Publishes the bundle if there is a destination; returns its URL or folder."""
    from toolchain.ship.pushing import Repository, push

    if destination is None:
        return None
    return push(folder, Repository(destination, public) if isinstance(destination, str) else destination, say)


def _print_bundle(bundle: dict[str, Any], folder: Path, place: str | None, as_json: bool) -> None:
    if as_json:
        echo_json(bundle)
        return
    echo(folder)
    echo(f"id {bundle['id']}")
    if place:
        echo(f"pushed to {place}")
