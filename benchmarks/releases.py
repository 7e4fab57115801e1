"""Builds the table of ONNX Runtime releases for `ship`: file formats, operators and wrong results of each release.

    python benchmarks/releases.py
    python benchmarks/releases.py --check PYTHON [--check PYTHON ...]

The script installs the newest wheel of every ONNX Runtime minor release from 1.15 on, each in a separate environment.
Each ONNX Runtime release runs the test models of release_questions.py. The script writes the results as a table to
toolchain/ship/targets/releases.json. With --check, the script installs nothing: it runs the test models with the ONNX
Runtime of each PYTHON and compares the results with releases.json. With --check, the exit code is 3 if a result differs
from releases.json.

If this processor does not saturate 8-bit products, the test models of 8-bit products run under
`qemu-x86_64 -cpu Haswell` (Debian package: qemu-user).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import release_questions as questions
from onnx import defs

from toolchain.cli.progress import bar
from toolchain.ship.targets.releases import REFUSED, RIGHT, STATES, TABLE
from toolchain.system import hardware

FIRST_MINOR = 15  # ONNX Runtime 1.15 is the oldest release that --ort-mobile accepts
PROBE = Path(__file__).with_name("release_probe.py")
SATURATING = ("qemu-x86_64", "-cpu", "Haswell")
# Variants contain these operators, or ONNX Runtime's optimiser for the CPU creates them.
OPERATORS = (
    "Attention",
    "BiasGelu",
    "DequantizeLinear",
    "DynamicQuantizeMatMul",
    "EmbedLayerNormalization",
    "FastGelu",
    "FusedGemm",
    "FusedMatMul",
    "GatherBlockQuantized",
    "Gelu",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MultiHeadAttention",
    "QAttention",
    "QLinearAdd",
    "QLinearMul",
    "QLinearSoftmax",
    "QuantizeLinear",
    "QuickGelu",
    "SkipLayerNormalization",
)
# The results of one ONNX Runtime release, such as the file formats that it reads and the operators that it has.
Facts = dict[str, Any]


def newest_patches() -> dict[str, str]:
    """Returns the newest patch of each ONNX Runtime minor release from 1.15 on that pip finds for this Python."""
    command = [sys.executable, "-m", "pip", "index", "versions", "onnxruntime", "--disable-pip-version-check"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, version)) for version in re.findall(r"\b(\d+)\.(\d+)\.(\d+)\b", listing)}
    newest = {f"{major}.{minor}": f"{major}.{minor}.{patch}" for major, minor, patch in sorted(versions)}
    return {release: version for release, version in newest.items() if int(release.split(".")[1]) >= FIRST_MINOR}


def install(version: str, folder: Path) -> Path:
    """Creates a Python environment with ONNX Runtime `version` and returns the path of its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    # ONNX Runtime's wheels up to 1.18 need numpy 1.
    packages = [f"onnxruntime=={version}", "numpy<2"]
    subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", "-q", *packages], check=True)
    return python


def emulator_command() -> list[str] | None:
    """Returns the command that emulates a processor whose 8-bit products saturate.

    Returns:
        Words to put before a command: an empty list if this processor itself saturates 8-bit products. Returns None if
        qemu is missing on a processor that does not saturate 8-bit products.
    """
    if not hardware.exact_int8():
        return []
    return list(SATURATING) if shutil.which(SATURATING[0]) else None


def ask(python: Path, folder: Path) -> Facts:
    """Runs the test models in `folder` with the ONNX Runtime of `python` and returns the results of this release."""
    answers = _probe([], python, folder, questions.VERSIONS, questions.ATTENTION)
    emulator = emulator_command()
    if emulator is not None:
        answers["answers"] |= _probe(emulator, python, folder, questions.PRECISION)["answers"]
    return facts(answers)


def _probe(prefix: Sequence[str], python: Path, folder: Path, *sets: str) -> dict[str, Any]:
    process = subprocess.run([*prefix, python, "-I", PROBE, folder, *sets], capture_output=True, text=True, check=False)
    if process.returncode:
        raise click.ClickException(f"{python} cannot run the test models: {process.stderr.strip().splitlines()[-1]}")
    answers: dict[str, Any] = json.loads(process.stdout)
    return answers


def facts(probed: Mapping[str, Any]) -> Facts:
    """Converts the output of `release_probe.py` to the results that the table of releases stores."""
    answers = probed["answers"]
    versions_read: dict[str, int] = {}
    for name, state in answers[questions.VERSIONS].items():
        kind, number = name.split()
        versions_read[kind] = max(versions_read.get(kind, 0), int(number) if state == RIGHT else 0)
    padded: dict[str, str] = {}
    for name, state in answers[questions.ATTENTION].items():
        kind = name.split(", ")[0]
        padded[kind] = max(padded.get(kind, state), state, key=STATES.index)
    return {
        "version": probed["version"],
        "read": versions_read,
        "operators": probed["operators"]
        and {
            name: sorted([*operator["attributes"], *(f"input {index}" for index in range(operator["inputs"]))])
            for name, operator in probed["operators"].items()
        },
        "standard": probed["standard"],
        "answers": padded,
        "precision": _precision(answers.get(questions.PRECISION, {})),
    }


def _precision(answers: Mapping[str, str]) -> dict[str, str]:
    """Returns a result for each operator and file format: exact, exact with a session option, saturates, or refused."""
    results = {}
    for name in sorted({name.rsplit(", ", 1)[0] for name in answers}):
        plain, with_option = (
            answers[f"{name}, {way} the option session.x64quantprecision"] for way in ("without", "with")
        )
        if REFUSED in (plain, with_option):
            results[name] = REFUSED
        elif plain == RIGHT:
            results[name] = "exact"
        else:
            results[name] = "exact with the option" if with_option == RIGHT else "saturates"
    return results


def table(facts_by_release: Mapping[str, Facts]) -> dict[str, Any]:
    """Returns the table of all ONNX Runtime releases, oldest first.

    For file formats, the table stores the highest version that each release reads. For operators and test results, the
    table names only the releases in which they changed.
    """
    order = list(facts_by_release)
    with_precision = [release for release in order if facts_by_release[release]["precision"]]
    if len(with_precision) < len(order):
        raise click.ClickException(
            "This processor does not saturate 8-bit products. Install qemu-x86_64 (Debian package: qemu-user)."
        )
    newest = facts_by_release[order[-1]]
    return {
        "releases": {r: {"version": facts_by_release[r]["version"], **facts_by_release[r]["read"]} for r in order},
        "operators": {name: _operator(name, facts_by_release) for name in OPERATORS},
        "late": _first_kernels(facts_by_release),
        **{
            kind: {name: _changes({r: facts_by_release[r][kind][name] for r in order}) for name in sorted(newest[kind])}
            for kind in ("answers", "precision")
        },
    }


def _operator(name: str, facts_by_release: Mapping[str, Facts]) -> dict[str, list[str]]:
    """Returns release → attributes and inputs that the release added to the operator `name`.

    The first key of the result is the first release that has the operator.
    """
    known_traits: set[str] | None = None
    additions = {}
    for release, each in facts_by_release.items():
        if each["operators"] is None:
            continue
        names = each["operators"].get(name)
        if names is None and known_traits is None:
            continue
        if names is None or (known_traits or set()) - set(names):
            raise click.ClickException(
                f"ONNX Runtime {release} removed an attribute or an input of {name}, which the table cannot express."
            )
        if known_traits is None or set(names) - known_traits:
            additions[release] = sorted(set(names) - (known_traits or set()))
        known_traits = set(names)
    if known_traits is None:
        raise click.ClickException(f"No release has a CPU kernel of {name}.")
    return additions


def _first_kernels(facts_by_release: Mapping[str, Facts]) -> dict[str, str]:
    """Returns standard operator → first release with a CPU kernel of the operator.

    An operator's opset is the first opset that contains the operator. The result omits an operator if every release
    that reads the operator's opset has a CPU kernel of the operator. The result also omits an operator if no release
    has a CPU kernel of the operator.
    """
    first: dict[str, int] = {}
    for schema in defs.get_all_schemas_with_history():
        if not schema.domain:
            first[schema.name] = min(first.get(schema.name, schema.since_version), schema.since_version)
    kernels = {release: each for release, each in facts_by_release.items() if each["standard"] is not None}
    first_kernels = {}
    for name, opset in sorted(first.items()):
        readers = [release for release, each in kernels.items() if each["read"]["opset"] >= opset]
        runners = [release for release in readers if name in facts_by_release[release]["standard"]]
        if runners and runners != readers:
            if runners != readers[-len(runners) :]:
                raise click.ClickException(f"A release of ONNX Runtime removed {name}, which the table cannot express.")
            first_kernels[name] = runners[0]
    return first_kernels


def _changes(states: Mapping[str, str]) -> dict[str, str]:
    """Returns release → test result, without the releases that have the same test result as the previous release."""
    changes: dict[str, str] = {}
    for release, state in states.items():
        if not changes or state != list(changes.values())[-1]:
            changes[release] = state
    return changes


def differences(body: Mapping[str, Any], release_facts: Facts) -> list[str]:
    """Returns a line for each result of an ONNX Runtime release that differs from the table of releases."""
    release = ".".join(release_facts["version"].split(".")[:2])
    order = list(body["releases"])
    if release not in order:
        return [f"ONNX Runtime {release} is not in the table of releases"]
    releases = order[: order.index(release) + 1]
    expected = {"read " + kind: number for kind, number in body["releases"][release].items() if kind != "version"}
    expected |= {
        "operator " + name: sorted(trait for each in releases for trait in by_release.get(each, ())) or None
        for name, by_release in body["operators"].items()
    }
    expected |= {"kernel " + name: first in releases for name, first in body["late"].items()}
    actual = {"read " + kind: number for kind, number in release_facts["read"].items()}
    actual |= {"operator " + name: release_facts["operators"].get(name) for name in body["operators"]}
    actual |= {"kernel " + name: name in release_facts["standard"] for name in body["late"]}
    for kind in ("answers", "precision"):
        if release_facts[kind]:  # without qemu, a release may have no results of the kind `precision`
            actual |= {f"{kind} {name}": state for name, state in release_facts[kind].items()}
            expected |= {
                f"{kind} {name}": next(by_release[each] for each in reversed(releases) if each in by_release)
                for name, by_release in body[kind].items()
            }
    return [
        f"{name}: the table of releases has the result {expected.get(name)!r}, but ONNX Runtime "
        f"{release_facts['version']} gives {actual.get(name)!r}"
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]


def write(body: Mapping[str, Any]) -> None:
    """Writes the table of releases as JSON with a line for each release, operator and test."""
    sections = []
    for name, entries in body.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        sections.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    TABLE.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


def build(folder: Path) -> None:
    """Installs every ONNX Runtime release, runs all test models with it and writes the table of releases."""
    facts_by_release = {}
    with bar("releases") as progress:
        versions = newest_patches()
        for done, (release, version) in enumerate(versions.items()):
            progress(done, len(versions), version)
            environment = folder / version
            facts_by_release[release] = ask(install(version, environment), folder)
            shutil.rmtree(environment)
    write(table(facts_by_release))
    click.echo(TABLE)


@click.command()
@click.option(
    "--check",
    "pythons",
    multiple=True,
    metavar="PYTHON",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare the ONNX Runtime of the interpreter PYTHON with the table of releases. Can be repeated.",
)
def main(pythons: tuple[Path, ...]) -> None:
    """Write the table of ONNX Runtime releases, or compare installed releases with the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        questions.write(folder)
        if not pythons:
            build(folder)
            return
        body = json.loads(TABLE.read_text(encoding="utf-8"))
        differs = False
        for python in pythons:
            release_facts = ask(python, folder)
            lines = differences(body, release_facts)
            differs = differs or bool(lines)
            note = (
                ""
                if release_facts["precision"]
                else "; 8-bit products not tested: qemu-x86_64 is missing (Debian: qemu-user)"
            )
            version, count = release_facts["version"], len(lines) or "no"
            click.echo(f"ONNX Runtime {version}: {count} differences from the table of releases{note}")
            for line in lines:
                click.echo(f"  {line}")
    sys.exit(3 if differs else 0)


if __name__ == "__main__":
    main()
