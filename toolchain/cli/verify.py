"""Verify: checks that a bundle is unmodified and computes its recorded logits on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import debug_option, json_option
from toolchain.cli.output import echo, echo_json


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
@debug_option
def verify(bundle: Path, as_json: bool) -> None:
    """Check that BUNDLE is unmodified; exit code 3 if it is not.

    The command compares the sha256 of every file with the sha256 that the bundle records. Then it runs the models on
    the golden sentences, and compares tokens and logits with those that the bundle records. The bundle's own verify.py
    makes the same comparisons without this toolchain.

    \b
    Example:
      toolchain verify exported/reference/bundle-python
    """
    from toolchain.ship.shipping import verify as verify_bundle

    report = verify_bundle(bundle)
    if as_json:
        echo_json(report)
        return
    echo(f"bundle {report['id'][:12]}: {report['files']} files are unmodified")
    for variant, result in report["models"].items():
        echo(f"{variant}: largest |Δlogit| {result['largest_delta']:.2g} (limit {result['tolerance']:g})")
