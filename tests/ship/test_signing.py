"""Tests of signed bundles: what `verify` refuses with a key, a certificate or an id, and what `ship` replaces."""

import datetime
import json
import shutil
import sys

import pytest

from toolchain.errors import ProviderError, ShippingError, VerdictError
from toolchain.progress import no_bar
from toolchain.ship import checking, shipping
from toolchain.ship.bundle_files import verify as bundled
from toolchain.ship.shipping import Order
from toolchain.ship.signing import Signer, Verifier

pytest.importorskip("model_signing", reason="needs the extra `sign`")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

PASSWORD = serialization.BestAvailableEncryption(b"secret")


def write_key(path, key=None, encryption=None):
    """Writes a private key to `path` and its public key to `path`.pub, and returns the private key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    encryption = encryption or serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
    )
    public_key = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.with_suffix(".pub").write_bytes(public_key)
    return key


def write_certificate(path, name, key, issuer=None, issuer_key=None, *, may_sign=True):
    """Writes the certificate of `key`, which expired long ago, and returns it; without an issuer, it is a root."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2020, 1, 1))
        .not_valid_after(datetime.datetime(2021, 1, 1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                **usage,
                digital_signature=may_sign,
                key_cert_sign=issuer is None,
                crl_sign=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(issuer_key or key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder with keys: `author`, `other`, `leaf` with its certificate leaf.crt, and its issuer's root.crt."""
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder / "author.pem")
    write_key(folder / "other.pem")
    root_key, leaf_key = write_key(folder / "root.pem"), write_key(folder / "leaf.pem")
    root = write_certificate(folder / "root.crt", "root", root_key)
    write_certificate(folder / "leaf.crt", "leaf", leaf_key, root, root_key)
    write_certificate(folder / "useless.crt", "useless", leaf_key, root, root_key, may_sign=False)
    write_certificate(folder / "other-root.crt", "root", write_key(folder / "other-root.pem"))
    return folder


def make(workspace, output, key=None, certificate=None, say=lambda event: None):
    signer = Signer.open(key, certificate) if key else None
    return shipping.ship(workspace, Order(("onnx-int8",), "python", signer=signer), output, say, no_bar)


@pytest.fixture(scope="module")
def signed(built_tiny, keys, tmp_path_factory):
    """A bundle that `author` signed. Tests must not change this bundle."""
    make(built_tiny, folder := tmp_path_factory.mktemp("signed") / "b", keys / "author.pem")
    return folder


@pytest.fixture
def bundle(signed, tmp_path):
    """A copy of the signed bundle, which a test may change."""
    shutil.copytree(signed, tmp_path / "bundle")
    return tmp_path / "bundle"


def reseal(folder, name):
    """Writes the new digest of a file to bundle.json and computes the id again, as an attacker would."""
    body = json.loads((folder / "bundle.json").read_text())
    entry = next(entry for entry in body["files"] if entry["path"] == name)
    content = (folder / name).read_bytes()
    entry.update(bytes=len(content), sha256=bundled.hashlib.sha256(content).hexdigest())
    body["id"] = bundled.canonical_id(body)
    (folder / "bundle.json").write_text(json.dumps(body))


def test_a_signed_bundle_has_the_files_and_the_id_of_an_unsigned_one(signed, built_tiny, keys, tmp_path):
    body = make(built_tiny, tmp_path / "b")
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (signed, tmp_path / "b")
    ]
    assert contents[0].keys() - contents[1].keys() == {type(signed)("model.sig")}
    assert contents[0].items() >= contents[1].items()
    report = shipping.verify(signed, body["id"], Verifier.from_key(keys / "author.pub"))
    assert (report["id"], report["signature"]) == (body["id"], "valid")
    assert shipping.verify(signed)["signature"] == "not checked"
    assert shipping.verify(tmp_path / "b")["signature"] is None
    assert bundled.main(signed) == 0


def test_a_signature_contains_no_path_of_this_machine(signed, built_tiny, keys):
    envelope = json.loads((signed / "model.sig").read_text())["dsseEnvelope"]
    text = bundled.base64.b64decode(envelope["payload"]).decode()
    for folder in (signed.parent, built_tiny.exported, keys):
        assert str(folder) not in text
    ignored = json.loads(text)["predicate"]["serialization"]["ignore_paths"]
    assert sorted(ignored) == [".cache/huggingface", ".gitattributes", "model.sig"]
    assert json.loads(text)["subject"][0]["name"] == f"{built_tiny.model}-python"


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.onnx", "bundle.json"])
def test_verify_with_a_key_refuses_a_resealed_change(bundle, keys, name):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content.replace(b"a", b"b", 1) if name == "README.md" else content + b"\n")
    if name != "bundle.json":
        reseal(bundle, name)
    with pytest.raises(VerdictError, match=r"the signature is not valid"):
        shipping.verify(bundle, verifier=Verifier.from_key(keys / "author.pub"))


def test_verify_with_a_key_refuses_an_added_file(bundle, keys):
    (bundle / "payload.py").write_text("")
    body = json.loads((bundle / "bundle.json").read_text())
    body["files"].append({"path": "payload.py", "bytes": 0, "sha256": bundled.hashlib.sha256(b"").hexdigest()})
    body["id"] = bundled.canonical_id(body)
    (bundle / "bundle.json").write_text(json.dumps(body))
    assert shipping.verify(bundle)["signature"] == "not checked"  # the bundle agrees with itself
    with pytest.raises(VerdictError, match="the signature is not valid"):
        shipping.verify(bundle, verifier=Verifier.from_key(keys / "author.pub"))


def test_verify_checks_the_signature_before_it_opens_a_model(bundle, keys, monkeypatch):
    (bundle / "model.onnx").write_bytes(b"hostile")
    reseal(bundle, "model.onnx")
    monkeypatch.setattr(checking, "BundleProcess", lambda *arguments: pytest.fail("the model was opened"))
    for choice in ({"verifier": Verifier.from_key(keys / "author.pub")}, {"bundle_id": "0" * 64}):
        with pytest.raises(VerdictError, match=r"signature is not valid|instead of 000"):
            shipping.verify(bundle, **choice)


def change_signature(bundle):
    """Changes the signature in several ways; yields the name of each change."""
    file = bundle / "model.sig"
    original = file.read_bytes()
    body = json.loads(original)
    changes = {
        "empty": b"",
        "no JSON": b"\x00",
        "a list": b"[]",
        "an empty object": b"{}",
        "deeply nested": b"[" * 100_000,
        "truncated": original[: len(original) // 2],
    }
    envelope = body["dsseEnvelope"]
    for name, change in {
        "no signatures": {"signatures": []},
        "a changed signature": {"signatures": [{**envelope["signatures"][0], "sig": "AAAA"}]},
        "a changed payload": {"payload": bundled.base64.b64encode(b"{}").decode()},
    }.items():
        changes[name] = json.dumps({**body, "dsseEnvelope": {**envelope, **change}}).encode()
    for name, content in changes.items():
        file.write_bytes(content)
        yield name


def test_verify_with_a_key_refuses_every_changed_signature(bundle, keys):
    verifier = Verifier.from_key(keys / "author.pub")
    for change in change_signature(bundle):
        with pytest.raises(VerdictError, match="the signature is not valid"):
            pytest.fail(f"accepted: {change}, {shipping.verify(bundle, verifier=verifier)}")


def test_a_signature_stays_valid_beside_the_files_of_the_model_hub(bundle, keys):
    (bundle / ".gitattributes").write_text("*.onnx filter=lfs\n")
    (bundle / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (bundle / ".cache" / "huggingface" / "download" / "README.md.metadata").write_text("1")
    verifier = Verifier.from_key(keys / "author.pub")
    assert shipping.verify(bundle, verifier=verifier)["signature"] == "valid"
    (bundle / ".cache" / "huggingface" / "link").symlink_to(bundle / "README.md")
    with pytest.raises(VerdictError, match=r"\.cache/huggingface/link is not listed"):
        shipping.verify(bundle, verifier=verifier)


def test_a_signature_of_an_older_toolchain_stays_valid(bundle, keys):
    """An older toolchain signed with the signature as the only ignored path."""
    from model_signing import hashing, signing

    (bundle / "model.sig").unlink()
    config = hashing.Config().set_ignored_paths(paths=[bundle / "model.sig"], ignore_git_paths=False)
    signing.Config().use_elliptic_key_signer(private_key=keys / "author.pem").set_hashing_config(config).sign(
        bundle, bundle / "model.sig"
    )
    Verifier.from_key(keys / "author.pub").check(bundle)
    (bundle / ".gitattributes").write_text("*.onnx filter=lfs\n")
    Verifier.from_key(keys / "author.pub").check(bundle)


def test_a_signature_that_omits_a_file_is_refused(bundle, keys):
    """The author may have signed the same files with another tool, which ignores some of them."""
    from model_signing import hashing, signing

    (bundle / "model.sig").unlink()
    config = hashing.Config().set_ignored_paths(paths=[bundle / "model.sig", bundle / "classify.py"])
    signing.Config().use_elliptic_key_signer(private_key=keys / "author.pem").set_hashing_config(config).sign(
        bundle, bundle / "model.sig"
    )
    with pytest.raises(VerdictError, match=r"the signature does not cover classify\.py"):
        shipping.verify(bundle, verifier=Verifier.from_key(keys / "author.pub"))


@pytest.mark.parametrize("kind", ["a link", "a folder with a file", "another name"])
def test_only_the_signature_file_may_be_unlisted(bundle, kind):
    file = bundle / "model.sig"
    file.rename(bundle.parent / "moved")
    if kind == "a link":
        file.symlink_to(bundle.parent / "moved")
    elif kind == "another name":
        (bundle.parent / "moved").rename(bundle / "other.sig")
    else:
        file.mkdir()
        (file / "note").write_text("")
    with pytest.raises(VerdictError, match=r"\.sig(/note)? is not listed"):
        shipping.verify(bundle)
    assert bundled.main(bundle) == 3


def test_a_certificate_signs_and_its_root_verifies(built_tiny, keys, tmp_path):
    make(built_tiny, tmp_path / "b", keys / "leaf.pem", keys / "leaf.crt")
    assert shipping.verify(tmp_path / "b", verifier=Verifier.from_root_certificates(keys / "root.crt"))
    for verifier in (
        Verifier.from_root_certificates(keys / "other-root.crt"),
        Verifier.from_key(keys / "author.pub"),
    ):
        with pytest.raises(VerdictError, match="the signature is not valid"):
            shipping.verify(tmp_path / "b", verifier=verifier)
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes() + b"\n")
    reseal(tmp_path / "b", "config.json")
    with pytest.raises(VerdictError, match="the signature is not valid"):
        shipping.verify(tmp_path / "b", verifier=Verifier.from_root_certificates(keys / "root.crt"))


@pytest.mark.slow
def test_ship_replaces_an_equal_bundle_only_if_its_signature_must_change(built_tiny, keys, tmp_path):
    output, file = tmp_path / "b", tmp_path / "b" / "model.sig"
    make(built_tiny, output)
    make(built_tiny, output, keys / "author.pem")
    first = file.read_bytes()
    make(built_tiny, output, keys / "author.pem")
    make(built_tiny, output)
    assert file.read_bytes() == first  # neither command replaced the valid signature
    make(built_tiny, output, keys / "leaf.pem")
    without_certificate = file.read_bytes()
    assert without_certificate != first
    make(built_tiny, output, keys / "leaf.pem", keys / "leaf.crt")
    with_certificate = file.read_bytes()
    assert "x509CertificateChain" in json.loads(with_certificate)["verificationMaterial"]
    make(built_tiny, output, keys / "leaf.pem", keys / "leaf.crt")
    assert file.read_bytes() == with_certificate
    file.write_text("{}")
    make(built_tiny, output, keys / "author.pem")
    assert shipping.verify(output, verifier=Verifier.from_key(keys / "author.pub"))["signature"] == "valid"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.pem", "cannot be read: No such file"),
        ("author.pub", "cannot be used"),
        ("rsa.pem", "no elliptic-curve key"),
        ("curve.pem", "curve"),
        ("password.pem", "has a password"),
    ],
)
def test_an_unusable_key_gives_an_error_before_anything_is_built(keys, tmp_path, say, name, reason):
    write_key(tmp_path / "rsa.pem", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    write_key(tmp_path / "curve.pem", ec.generate_private_key(ec.SECP256K1()))
    write_key(tmp_path / "password.pem", encryption=PASSWORD)
    shutil.copy(keys / "author.pub", tmp_path)
    options = ("--model", "nothing", "--exported", tmp_path / "exported")
    code, out, err = say("ship", "onnx-int8", "--target", "python", "--sign", tmp_path / name, *options)
    assert (code, out) == (1, "")
    assert reason in err


@pytest.mark.parametrize("name", ["missing.pub", "author.pem", "rsa.pub"])
def test_an_unusable_public_key_is_an_error_and_no_verdict(signed, keys, tmp_path, say, name):
    write_key(tmp_path / "rsa.pem", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    shutil.copy(keys / "author.pem", tmp_path)
    for option in ("--key", "--root-certificate"):
        code, out, err = say("verify", signed, option, tmp_path / name)
        assert (code, out) == (1, "")
        assert f"Error: {tmp_path / name} cannot be" in err


@pytest.mark.parametrize(("key", "certificate"), [("author", "leaf"), ("leaf", "useless"), ("leaf", "missing")])
def test_an_unusable_certificate_is_refused(keys, key, certificate):
    with pytest.raises(ShippingError, match=rf"{certificate}\.crt"):
        Signer.open(keys / f"{key}.pem", keys / f"{certificate}.crt")


def test_without_the_package_an_error_names_the_extra(keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (Signer.open, Verifier.from_key, Verifier.from_root_certificates):
        with pytest.raises(ProviderError, match=r"pip install .*'model-signing"):
            call(keys / "author.pem")


def test_ship_and_verify_exit_with_their_codes(tiny, keys, tmp_path, say):
    model_options = ("--model", tiny.model, "--exported", tiny.exported)
    ship = ("ship", "onnx-int8", "--target", "python", "--output", tmp_path / "b", *model_options)
    code, out, err = say(*ship, "--sign", keys / "author.pem")
    assert code == 0, err
    folder, line = out.splitlines()
    bundle_id = line.removeprefix("id ")
    assert folder == str(tmp_path / "b")
    assert bundle_id == json.loads(say(*ship, "--json")[1])["id"]
    checks = {
        ("--key", keys / "author.pub", "--id", bundle_id.upper()): 0,
        ("--key", keys / "other.pub"): 3,
        ("--root-certificate", keys / "root.crt"): 3,
        ("--id", "0" * 64): 3,
        ("--id", bundle_id[:12]): 2,
        ("--key", keys / "author.pub", "--root-certificate", keys / "root.crt"): 2,
    }
    assert {check: say("verify", tmp_path / "b", *check)[0] for check in checks} == checks
    assert "signature valid" in say("verify", tmp_path / "b", "--key", keys / "author.pub")[1]
    (tmp_path / "b" / "model.sig").unlink()
    code, _, err = say("verify", tmp_path / "b", "--key", keys / "author.pub")
    assert code == 3
    assert "has no signature" in err
    assert say(*ship, "--certificate", keys / "leaf.crt")[0] == 2
