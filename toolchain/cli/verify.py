"""Verify: checks that a bundle is unmodified and computes its recorded logits on this machine."""

from __future__ import annotations

import re
from pathlib import Path

import click

from toolchain.cli.options import debug_option, json_option
from toolchain.cli.output import echo, echo_json


def _parse_id(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch("[0-9a-fA-F]{64}", value):
        raise click.BadParameter("an id has 64 hexadecimal digits; `toolchain ship` prints it.")
    return value and value.lower()


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--id", "bundle_id", metavar="ID", callback=_parse_id, help="Id that the bundle must have.")
@click.option(
    "--key",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PUBLIC_KEY",
    help="PEM file with the public key of the bundle's author. The bundle must have a signature of this key. Needs the "
    "extra `sign`.",
)
@click.option(
    "--root-certificate",
    "root",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="PEM file with root certificates. The bundle must have a signature by a certificate of one of these roots. "
    "Needs the extra `sign`.",
)
@json_option
@debug_option
def verify(bundle: Path, bundle_id: str | None, key: Path | None, root: Path | None, as_json: bool) -> None:
    """Check that BUNDLE is unmodified; exit code 3 if it is not.

    The command compares the sha256 of every file with the sha256 that the bundle records. Then it runs the models on
    the golden sentences, and compares tokens and logits with those that the bundle records. The bundle's own verify.py
    makes the same comparisons without this toolchain.

    These comparisons find accidents. They do not show who wrote the bundle: use --id, --key or --root-certificate for
    that. The command checks id and signature before it opens a model.

    \b
    Examples:
      toolchain verify exported/reference/bundle-python
      toolchain verify my-bundle --key author.pub
    """
    from toolchain.ship.shipping import verify as verify_bundle
    from toolchain.ship.signing import Verifier

    if key and root:
        raise click.UsageError("--key and --root-certificate exclude each other.")
    verifier = Verifier.from_key(key) if key else Verifier.from_root_certificates(root) if root else None
    report = verify_bundle(bundle, bundle_id, verifier)
    if as_json:
        echo_json(report)
        return
    echo(f"bundle {report['id']}: {report['files']} files are unmodified")
    if report["signature"]:
        echo(f"signature {report['signature']}")
    for variant, result in report["models"].items():
        echo(f"{variant}: largest |Δlogit| {result['largest_delta']:.2g} (limit {result['tolerance']:g})")
