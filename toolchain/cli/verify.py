"""Verify: whether a bundle is unmodified and answers right here."""

from __future__ import annotations

import json
from pathlib import Path

import click

from toolchain.cli.options import debug_option, json_option


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
