"""Bundles for apps, and their check."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import SettingsError
from toolchain.interface.calls import calling
from toolchain.ship import shipping
from toolchain.ship.signing import Verifier


@dataclass(frozen=True)
class Bundle:
    """A bundle that `Model.ship` wrote.

    Attributes:
        path: The folder.
        id: The id, which `verify` can require.
        target: Kind of app.
        variants: Names of the variants, in order.
    """

    path: Path
    id: str
    target: str
    variants: tuple[str, ...]


@calling()
def verify(
    bundle: Bundle | str | Path,
    *,
    id: str | None = None,
    key: str | Path | None = None,
    root_certificate: str | Path | None = None,
) -> dict[str, Any]:
    """Checks that a bundle is unmodified, and that its models compute the recorded logits on this machine.

    Args:
        bundle: A bundle, or its folder.
        id: Id that the bundle must have; None for any id.
        key: PEM file with the public key of the bundle's author; None for no check of the signature.
        root_certificate: PEM file with root certificates, one of which must confirm the signature.

    Returns:
        The bundle's ``id``, ``target``, number of ``files`` and ``signature``; and for each model, its
        ``largest_delta`` from the recorded logits, and the ``tolerance``.

    Raises:
        VerdictError: The bundle was modified, has another id or no valid signature, or computes other logits.
        ShippingError: The folder holds no bundle.
        SettingsError: The id is invalid, or both `key` and `root_certificate` are given.

    Examples:
        >>> bundle = tc.open("my-checkpoint").ship("onnx-int8", target="python", output="app/model")
        >>> report = tc.verify("app/model", id=bundle.id)
        >>> list(report["models"])
        ['onnx-int8']
    """
    if key and root_certificate:
        raise SettingsError("`key` and `root_certificate` exclude each other.", "Give only one of them.")
    if id is not None and not re.fullmatch("[0-9a-fA-F]{64}", id):
        raise SettingsError(f"`id` is {id!r}, but an id has 64 hexadecimal digits.", "`Bundle.id` is the id.")
    verifier = None
    if key or root_certificate:
        verifier = (
            Verifier.from_key(Path(key)) if key else Verifier.from_root_certificates(Path(root_certificate or ""))
        )
    return shipping.verify(bundle.path if isinstance(bundle, Bundle) else Path(bundle), id and id.lower(), verifier)
