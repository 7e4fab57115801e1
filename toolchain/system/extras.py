"""Builds the hint with the command that installs optional packages."""

from __future__ import annotations

import importlib.metadata
import shlex


def install_hint(extra: str) -> str:
    """Returns a sentence with the command that installs the packages of an extra, such as ``ray``.

    The command names the packages instead of the extra, so it works for every kind of installation of the toolchain.

    Args:
        extra: Name of the extra in the package's metadata.
    """
    from packaging.requirements import Requirement

    packages = []
    for requirement in map(Requirement, importlib.metadata.requires("toolchain") or []):
        if requirement.marker and requirement.marker.evaluate({"extra": extra}):
            requirement.marker = None
            packages.append(str(requirement))
    return f"Install the missing packages with `pip install {shlex.join(packages)}`."
