"""Tests of the Python packages that a bundle names: its lock files pin what its ranges allow, with sha256."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from toolchain.ship.targets import BUNDLE_FILES, KSERVE, LOCK, TARGETS
from toolchain.ship.targets.releases import ORDER

PYTHON = ROOT / "exported" / ".cache" / "test-clients" / "python" / "bin" / "python"
NAMES = ["requirements", "requirements_text", "requirements_mlflow", "requirements_ray_serve"]
SERVER = "requirements_kserve"


def read_lock(name):
    """Returns (requirement, list of sha256) for each package of a lock file."""
    text = (BUNDLE_FILES / f"{name}.lock").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [
        (Requirement(line.split(" --hash=")[0].strip()), re.findall(r"--hash=sha256:([0-9a-f]{64})(?: |$)", line))
        for line in lines
    ]


@pytest.mark.parametrize("name", [*NAMES, SERVER])
def test_a_lock_pins_every_package_with_its_sha256(name):
    for requirement, digests in read_lock(name):
        assert re.fullmatch(r"==[0-9.]+(b[0-9]+|\.post[0-9]+)?", str(requirement.specifier)), requirement
        assert digests, requirement
    assert "http:" not in (text := (BUNDLE_FILES / f"{name}.lock").read_text())
    assert "https:" not in text


@pytest.mark.parametrize("name", [*NAMES, SERVER])
def test_a_lock_agrees_with_the_ranges_of_every_release(name):
    template = (BUNDLE_FILES / f"{name}.txt.j2").read_text()
    pinned = {}
    for requirement, _ in read_lock(name):
        pinned.setdefault(requirement.name, []).append(str(requirement.specifier).removeprefix("=="))
    for release in ORDER:
        for line in template.replace("{{ bundle.onnxruntime }}", release).splitlines():
            allowed = Requirement(line)
            assert all(version in allowed.specifier for version in pinned[allowed.name]), line


def test_the_locks_differ_only_in_the_operators_of_the_tokenizer():
    shorter, longer = ({str(package): digests for package, digests in read_lock(name)} for name in NAMES[:2])
    assert longer.items() >= shorter.items()
    assert {Requirement(line).name for line in longer.keys() - shorter.keys()} == {"onnxruntime-extensions"}


@pytest.mark.parametrize("name", NAMES[2:])
def test_a_longer_lock_has_the_releases_of_the_first_lock(name):
    # A package of MLflow or Ray needs some of these packages on every platform, so the markers differ.
    first, longer = (
        {(package.name, str(package.specifier)): digests for package, digests in read_lock(each)}
        for each in (NAMES[0], name)
    )
    assert longer.items() >= first.items()


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_has_the_releases_that_tests_run_with(name):
    lines = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    tested = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    for requirement, _ in read_lock(name):
        package = canonicalize_name(requirement.name)
        if package in tested and (requirement.marker is None or "win32" not in str(requirement.marker)):
            assert requirement.specifier == f"=={tested[package]}", "run `make locks`"


def test_the_server_has_the_releases_of_the_other_lock():
    """KServe takes only an older release of protobuf."""

    def pins(name):
        return {(package.name, str(package.specifier)): digests for package, digests in read_lock(name)}

    others, packages = pins("requirements_text"), pins(SERVER)
    assert {name for name, _ in others.keys() - packages.keys()} == {"protobuf"}
    assert all(packages[pin] == digests for pin, digests in others.items() if pin in packages)


def test_every_bundle_with_requirements_has_the_lock_of_the_same_packages():
    for target in TARGETS.values():
        for files in (target.files, target.text_files):
            for path, template in files.items():
                if path.endswith("requirements.txt"):
                    assert files[path.replace("requirements.txt", LOCK)] == template.replace(".txt.j2", ".lock")
    assert LOCK in TARGETS["python"].files
    assert f"{KSERVE}/{LOCK}" in TARGETS["server"].files


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="needs `make test-clients`")
def test_pip_accepts_a_lock():
    """Without --no-deps, pip also refuses a dependency that the lock does not pin.

    The other lock has fewer packages, with the same lines.
    """
    options = ("--dry-run", "--ignore-installed", "--require-hashes", "--quiet", "--retries", "1")
    pip = (sys.executable, "-m", "pip", "--python", PYTHON)
    command = [*pip, "install", *options, "-r", BUNDLE_FILES / "requirements_text.lock"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "Failed to establish a new connection" in run.stderr:
        pytest.skip("needs a package index")
    assert run.returncode == 0, run.stderr
