"""Optional packages: whether they fit the installed packages, and the command that installs them."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def install_hint(extra: str) -> str:
    """Returns a sentence with the command that installs the packages of an extra, such as ``ray``.

    The command names the packages instead of the extra, so it works for every kind of installation of the toolchain.

    Args:
        extra: Name of the extra in the package's metadata.
    """
    return f"Install the missing packages with `pip install {shlex.join(map(str, requirements_of_extra(extra)))}`."


def requirements_of_extra(extra: str) -> list[Requirement]:
    """Returns the requirements of one extra of the toolchain, without their markers.

    Args:
        extra: Name of the extra in the package's metadata.
    """
    from packaging.requirements import Requirement

    requirements = []
    for requirement in map(Requirement, importlib.metadata.requires("toolchain") or []):
        if requirement.marker and requirement.marker.evaluate({"extra": extra}):
            requirement.marker = None
            requirements.append(requirement)
    return requirements


def requirements_of(package: str) -> Iterator[tuple[Requirement, str | None]]:
    """Yields each requirement of a package, except the requirements of its extras, with the installed version.

    The version is None if the required package is not installed.

    Args:
        package: Name of the package on PyPI.

    Raises:
        PackageNotFoundError: The package itself is not installed.
    """
    from packaging.requirements import Requirement

    for requirement in map(Requirement, importlib.metadata.requires(package) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            yield requirement, importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield requirement, None


def unmet_requirement(package: str) -> str:
    """Returns why a package cannot work beside the installed packages, or an empty string if it can.

    The function reads only the metadata of the packages, so it is fast.

    Args:
        package: Name of the package on PyPI; a range of versions may follow, as in ``torch>=2.13``.
    """
    from packaging.requirements import Requirement

    name, versions = Requirement(package).name, Requirement(package).specifier
    try:
        installed = importlib.metadata.version(name)
        if not versions.contains(installed, prereleases=True):
            return f"{name} {versions} is needed, but {installed} is installed"
        for requirement, version in requirements_of(name):
            if version is None:
                return f"{name} needs {requirement.name}, which is not installed"
            if not requirement.specifier.contains(version, prereleases=True):
                return f"{name} needs {requirement.name} {requirement.specifier}, but {version} is installed"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed"
    return ""
