"""Signatures of bundles: `Signer` signs a bundle with a private key, and `Verifier` checks the signature of a bundle.

A signature has the format of OpenSSF Model Signing 1.0: a DSSE envelope in a Sigstore bundle, which lists the sha256 of
every file. Signing and checking need no network.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ProviderError, ShippingError, ToolchainError, VerdictError, first_line
from toolchain.ship.bundle_files.verify import HUB_FILE, HUB_FOLDER, MAX_RECORD_BYTES, SIGNATURE, is_unlisted
from toolchain.system.decoding import decode_object
from toolchain.system.extras import install_hint
from toolchain.system.files import temporary_folder

if TYPE_CHECKING:
    from model_signing import hashing, verifying

KEY_HINT = "Name a PEM file with an elliptic-curve key on the curve P-256, P-384 or P-521."


@dataclass(frozen=True)
class Signer:
    """A private key that signs bundles.

    Attributes:
        key: PEM file with the private key.
        certificate: PEM file with the certificate of the key, followed by the intermediate certificates; None to sign
            without a certificate.
        public_key: The public key in PEM format.
    """

    key: Path
    certificate: Path | None
    public_key: bytes

    @classmethod
    def open(cls, key: Path, certificate: Path | None = None) -> Signer:
        """Reads the key and the certificate, and returns the signer.

        Raises:
            ProviderError: The package model-signing is not installed.
            ShippingError: The key or the certificate is unreadable; the key has a password; the certificate belongs to
                another key, or may not sign.
        """
        with _signing_errors(key, KEY_HINT):
            from cryptography.hazmat.primitives import serialization
            from model_signing import signing

            try:
                private_key = serialization.load_pem_private_key(key.read_bytes(), None)
            except TypeError as error:  # the class of the error that asks for a password
                raise ShippingError(
                    f"{key} has a password, which `ship` does not support.",
                    "Write the key without its password to a folder that only you can read: "
                    f"`openssl pkey -in {shlex.quote(str(key))} -out OTHER_KEY`.",
                ) from error
            _require_elliptic_curve(private_key.public_key())
            signing.Config().use_elliptic_key_signer(private_key=key)
            public_key = private_key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        if certificate:
            _check_certificate(key, certificate)
        return cls(key, certificate, public_key)

    def sign(self, folder: Path) -> None:
        """Writes the signature into the folder of a bundle, and checks it with the public key.

        Args:
            folder: Folder of a bundle without a signature.
        """
        from model_signing import signing

        config = signing.Config().set_hashing_config(_hashing_config(folder))
        with _signing_errors(self.key, KEY_HINT):
            if self.certificate:
                # The library needs a list of more certificates. The whole file is this list, because it may hold the
                # intermediate certificates.
                config.use_certificate_signer(
                    private_key=self.key, signing_certificate=self.certificate, certificate_chain=[self.certificate]
                )
            else:
                config.use_elliptic_key_signer(private_key=self.key)
        config.sign(folder, folder / SIGNATURE)
        self._check(folder)

    def has_signed(self, folder: Path, signature: Path) -> bool:
        """Returns whether a bundle has a valid signature of this key with the same certificates.

        Two signatures of the same key differ, because the signature algorithm ECDSA uses a random number.

        Args:
            folder: Folder of the bundle.
            signature: Signature that this signer made.
        """
        try:
            self._check(folder)
            existing, new = _read_signature(folder / SIGNATURE), _read_signature(signature)
        except VerdictError:
            return False
        return bool(existing["verificationMaterial"] == new["verificationMaterial"])

    def _check(self, folder: Path) -> None:
        """Checks the signature with the public key instead of the certificates, whose root may be elsewhere."""
        with temporary_folder() as scratch:
            key, copy = scratch / "public.pem", scratch / SIGNATURE
            key.write_bytes(self.public_key)
            material = {"publicKey": {"hint": hashlib.sha256(self.public_key).hexdigest()}}
            signature = {**_read_signature(folder / SIGNATURE), "verificationMaterial": material}
            copy.write_text(json.dumps(signature), encoding="utf-8")
            Verifier.from_key(key).check(folder, copy)


@dataclass(frozen=True)
class Verifier:
    """A public key or root certificates, with which signatures of bundles are checked."""

    config: verifying.Config

    @classmethod
    def from_key(cls, public_key: Path) -> Verifier:
        """Returns the verifier for the signatures of one key.

        Args:
            public_key: PEM file with the public key.

        Raises:
            ProviderError: The package model-signing is not installed.
            ShippingError: The key is unreadable.
        """
        with _signing_errors(public_key, KEY_HINT):
            from cryptography.hazmat.primitives import serialization
            from model_signing import verifying

            _require_elliptic_curve(serialization.load_pem_public_key(public_key.read_bytes()))
            return cls(verifying.Config().use_elliptic_key_verifier(public_key=public_key))

    @classmethod
    def from_root_certificates(cls, certificates: Path) -> Verifier:
        """Returns the verifier for the signatures of all certificates that have one of the root certificates.

        Args:
            certificates: PEM file with the root certificates.

        Raises:
            ProviderError: The package model-signing is not installed.
            ShippingError: The certificates are unreadable.
        """
        with _signing_errors(certificates, "Name a PEM file with the root certificates that you trust."):
            from model_signing import verifying

            return cls(verifying.Config().use_certificate_verifier(certificate_chain=[certificates]))

    def check(self, folder: Path, signature: Path | None = None) -> None:
        """Checks that the signature of a bundle is valid, and that it covers every file except the unlisted ones.

        Args:
            folder: Folder of a bundle that `read_bundle` has checked.
            signature: File with the signature; None for the file in the bundle.

        Raises:
            VerdictError: The bundle has no signature, or the signature is not valid for these files and this key.
        """
        folder = folder.resolve()  # the library refuses a link to the folder
        file = signature or folder / SIGNATURE
        if not file.is_file():
            raise VerdictError(
                f"{folder} has no signature: {SIGNATURE} is missing.", "Ask the author of the bundle for a signed one."
            )
        self.config.set_hashing_config(_hashing_config(folder))
        try:
            content = _read_signature(file)
            # The library prints warnings to standard output, which is for data.
            with contextlib.redirect_stdout(sys.stderr):
                self.config.verify(folder, file)
            payload = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
            signed = {str(resource["name"]) for resource in payload["predicate"]["resources"]}
        except (OSError, MemoryError):
            raise
        # The signature may come from an attacker, and the libraries that read it raise many classes of errors.
        except Exception as error:
            raise VerdictError(
                f"{folder}: the signature is not valid for these files and this key: {first_line(error)}.",
                "Do not use this bundle; get it again from its author, with the author's public key.",
            ) from error
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        if missing := sorted(file for file in files - signed if not is_unlisted(file)):
            raise VerdictError(f"{folder}: the signature does not cover {missing[0]}.", "Do not use this bundle.")


@contextlib.contextmanager
def _signing_errors(file: Path, hint: str) -> Iterator[None]:
    """Turns a missing package, or an unreadable key or certificate, into a `ToolchainError`."""
    try:
        yield
    except ImportError as error:
        raise ProviderError(
            f"Signatures need the package {error.name}, which is not installed.", install_hint("sign")
        ) from error
    except ToolchainError:
        raise
    except OSError as error:
        raise ShippingError(f"{file} cannot be read: {error.strerror or error}.", hint) from error
    except Exception as error:  # the errors of the package cryptography have no common base class but Exception
        raise ShippingError(f"{file} cannot be used: {first_line(error)}.", hint) from error


def _check_certificate(key: Path, certificate: Path) -> None:
    """Raises `ShippingError` unless the certificate belongs to the key and may sign, as `Verifier` requires."""
    hint = "Name the PEM file with the certificate of the private key, which must allow digital signatures."
    with _signing_errors(certificate, hint):
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID
        from model_signing import signing

        signing.Config().use_certificate_signer(
            private_key=key, signing_certificate=certificate, certificate_chain=[certificate]
        )
        extensions = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions
        uses = [each.value for each in extensions]
        may_sign = any(isinstance(use, x509.KeyUsage) and use.digital_signature for use in uses)
        may_sign |= any(
            isinstance(use, x509.ExtendedKeyUsage) and ExtendedKeyUsageOID.CODE_SIGNING in use for use in uses
        )
        if not may_sign:
            raise ShippingError(f"{certificate} does not allow digital signatures.", hint)


def _hashing_config(folder: Path) -> hashing.Config:
    """Returns the settings for the digests: every file except the unlisted files (`is_unlisted`), and no link."""
    from model_signing import hashing

    paths = [folder / SIGNATURE, folder / HUB_FILE, folder / HUB_FOLDER]
    return hashing.Config().set_ignored_paths(paths=paths, ignore_git_paths=False)


def _require_elliptic_curve(public_key: object) -> None:
    """Raises `ValueError` for a key of another kind, such as RSA."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    if not isinstance(public_key, EllipticCurvePublicKey):
        raise ValueError("it is no elliptic-curve key")


def _read_signature(file: Path) -> dict[str, Any]:
    """Returns the content of a signature.

    Raises:
        VerdictError: The file is not a signature.
    """
    try:
        if file.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError("the file is too large")
        body = decode_object(file.read_bytes())
        return {key: body[key] for key in ("mediaType", "verificationMaterial", "dsseEnvelope")}
    except (FileNotFoundError, ValueError, LookupError) as error:
        raise VerdictError(f"{file} is not a signature.", "Sign the bundle again.") from error
