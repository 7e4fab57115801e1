"""What every release of ONNX Runtime reads, has and answers: the table that `ship` and `verify` go by.

    python benchmarks/releases.py
    python benchmarks/releases.py --check PYTHON [--check PYTHON ...]

Installs the newest wheel of every minor release from 1.15 on, each in an environment of its own, and asks it the
questions of release_questions.py. Writes toolchain/ship/targets/releases.json. With --check, asks the runtime of each
PYTHON instead, installs nothing, and compares the answers with the table: exit 3 where they differ.

Where this processor does not saturate, the questions about 8-bit products are asked under `qemu-x86_64 -cpu Haswell`
(Debian: qemu-user).
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

FIRST = 15  # of 1.x: the oldest that --ort-mobile names
PROBE = Path(__file__).with_name("release_probe.py")
SATURATING = ("qemu-x86_64", "-cpu", "Haswell")
# ONNX Runtime's operators that variants use or that its optimiser makes of them on the CPU.
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
Facts = dict[str, Any]  # of one release: kind → name → fact, as `facts` gives them


def newest_patches() -> dict[str, str]:
    """Minor release → its newest patch, of all that pip finds for this Python, from 1.15 on."""
    command = [sys.executable, "-m", "pip", "index", "versions", "onnxruntime", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {tuple(map(int, version)) for version in re.findall(r"\b(\d+)\.(\d+)\.(\d+)\b", listed)}
    newest = {f"{major}.{minor}": f"{major}.{minor}.{patch}" for major, minor, patch in sorted(found)}
    return {release: version for release, version in newest.items() if int(release.split(".")[1]) >= FIRST}


def install(version: str, folder: Path) -> Path:
    """The Python of a new environment with that ONNX Runtime."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    # Wheels up to 1.18 are built for the first numpy.
    packages = [f"onnxruntime=={version}", "numpy<2"]
    subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", "-q", *packages], check=True)
    return python


def asked_by() -> list[str] | None:
    """What starts a Python where 8-bit products saturate; None where nothing does."""
    if not hardware.exact_int8():
        return []
    return list(SATURATING) if shutil.which(SATURATING[0]) else None


def ask(python: Path, folder: Path) -> Facts:
    """Puts the questions in `folder` to the ONNX Runtime of that Python."""
    answers = _probe([], python, folder, questions.VERSIONS, questions.ATTENTION)
    emulator = asked_by()
    if emulator is not None:
        answers["answers"] |= _probe(emulator, python, folder, questions.PRECISION)["answers"]
    return facts(answers)


def _probe(before: Sequence[str], python: Path, folder: Path, *sets: str) -> dict[str, Any]:
    done = subprocess.run([*before, python, "-I", PROBE, folder, *sets], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{python} cannot be asked: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def facts(probed: Mapping[str, Any]) -> Facts:
    """What a release answered, in the words of the table."""
    answers = probed["answers"]
    read: dict[str, int] = {}
    for name, state in answers[questions.VERSIONS].items():
        kind, number = name.split()
        read[kind] = max(read.get(kind, 0), int(number) if state == RIGHT else 0)
    padded: dict[str, str] = {}
    for name, state in answers[questions.ATTENTION].items():
        about = name.split(", ")[0]
        padded[about] = max(padded.get(about, state), state, key=STATES.index)
    return {
        "version": probed["version"],
        "read": read,
        "operators": probed["operators"]
        and {
            name: sorted([*found["attributes"], *(f"input {index}" for index in range(found["inputs"]))])
            for name, found in probed["operators"].items()
        },
        "standard": probed["standard"],
        "answers": padded,
        "precision": _precision(answers.get(questions.PRECISION, {})),
    }


def _precision(answers: Mapping[str, str]) -> dict[str, str]:
    """Operator and format → exact, exact with the option, saturates, or refused."""
    found = {}
    for name in sorted({name.rsplit(", ", 1)[0] for name in answers}):
        without, given = (answers[f"{name}, {way} the option"] for way in ("without", "with"))
        if REFUSED in (without, given):
            found[name] = REFUSED
        elif without == RIGHT:
            found[name] = "exact"
        else:
            found[name] = "exact with the option" if given == RIGHT else "saturates"
    return found


def table(asked: Mapping[str, Facts]) -> dict[str, Any]:
    """The table of all releases, oldest first: what a release reads, and from which release on the rest holds."""
    order = list(asked)
    precise = [release for release in order if asked[release]["precision"]]
    if len(precise) < len(order):
        raise click.ClickException("No processor here saturates. Install qemu-x86_64 (Debian: qemu-user).")
    newest = asked[order[-1]]
    return {
        "releases": {r: {"version": asked[r]["version"], **asked[r]["read"]} for r in order},
        "operators": {name: _operator(name, asked) for name in OPERATORS},
        "late": _late(asked),
        **{
            kind: {name: _changes({r: asked[r][kind][name] for r in order}) for name in sorted(newest[kind])}
            for kind in ("answers", "precision")
        },
    }


def _operator(name: str, asked: Mapping[str, Facts]) -> dict[str, list[str]]:
    """Release → attributes and inputs that came with it; the operator with the first."""
    known: set[str] | None = None
    found = {}
    for release, each in asked.items():
        if each["operators"] is None:
            continue
        has = each["operators"].get(name)
        if has is None and known is None:
            continue
        if has is None or (known or set()) - set(has):
            raise click.ClickException(f"{release} lost something of {name}, which the table cannot say.")
        if known is None or set(has) - known:
            found[release] = sorted(set(has) - (known or set()))
        known = set(has)
    if known is None:
        raise click.ClickException(f"No release has a CPU kernel of {name}.")
    return found


def _late(asked: Mapping[str, Facts]) -> dict[str, str]:
    """Standard operators that a release read before it had a CPU kernel → the first that has."""
    first: dict[str, int] = {}
    for schema in defs.get_all_schemas_with_history():
        if not schema.domain:
            first[schema.name] = min(first.get(schema.name, schema.since_version), schema.since_version)
    kernels = {release: each for release, each in asked.items() if each["standard"] is not None}
    late = {}
    for name, opset in sorted(first.items()):
        reading = [release for release, each in kernels.items() if each["read"]["opset"] >= opset]
        having = [release for release in reading if name in asked[release]["standard"]]
        if having and having != reading:
            if having != reading[-len(having) :]:
                raise click.ClickException(f"A release lost {name}, which the table cannot say.")
            late[name] = having[0]
    return late


def _changes(states: Mapping[str, str]) -> dict[str, str]:
    """Release → its state, where it differs from the release before."""
    found: dict[str, str] = {}
    for release, state in states.items():
        if not found or state != list(found.values())[-1]:
            found[release] = state
    return found


def differences(body: Mapping[str, Any], found: Facts) -> list[str]:
    """Where a release answers otherwise than the table says; a line each."""
    release = ".".join(found["version"].split(".")[:2])
    order = list(body["releases"])
    if release not in order:
        return [f"{release} is not in the table"]
    until = order[: order.index(release) + 1]
    stated = {"read " + kind: number for kind, number in body["releases"][release].items() if kind != "version"}
    stated |= {
        "operator " + name: sorted(what for each in until for what in by_release.get(each, ())) or None
        for name, by_release in body["operators"].items()
    }
    stated |= {"kernel " + name: first in until for name, first in body["late"].items()}
    seen = {"read " + kind: number for kind, number in found["read"].items()}
    seen |= {"operator " + name: found["operators"].get(name) for name in body["operators"]}
    seen |= {"kernel " + name: name in found["standard"] for name in body["late"]}
    for kind in ("answers", "precision"):
        if found[kind]:  # else not asked
            seen |= {f"{kind} {name}": state for name, state in found[kind].items()}
            stated |= {
                f"{kind} {name}": next(by_release[each] for each in reversed(until) if each in by_release)
                for name, by_release in body[kind].items()
            }
    return [
        f"{name}: the table says {stated.get(name)}, {found['version']} says {seen.get(name)}"
        for name in sorted(stated.keys() | seen.keys())
        if stated.get(name) != seen.get(name)
    ]


def write(body: Mapping[str, Any]) -> None:
    """The table as JSON, a line for every release, operator and question."""
    rooms = []
    for name, entries in body.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        rooms.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    TABLE.write_text("{\n" + ",\n".join(rooms) + "\n}\n", encoding="utf-8")


def build(folder: Path) -> None:
    """Asks every release and writes the table."""
    asked = {}
    with bar("releases") as progress:
        versions = newest_patches()
        for done, (release, version) in enumerate(versions.items()):
            progress(done, len(versions), version)
            environment = folder / version
            asked[release] = ask(install(version, environment), folder)
            shutil.rmtree(environment)
    write(table(asked))
    click.echo(TABLE)


@click.command()
@click.option(
    "--check",
    "pythons",
    multiple=True,
    metavar="PYTHON",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare the ONNX Runtime of PYTHON with the table; can be given again.",
)
def main(pythons: tuple[Path, ...]) -> None:
    """Write the table of releases, or compare releases with it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        questions.write(folder)
        if not pythons:
            build(folder)
            return
        body = json.loads(TABLE.read_text(encoding="utf-8"))
        wrong = False
        for python in pythons:
            found = ask(python, folder)
            lines = differences(body, found)
            wrong = wrong or bool(lines)
            told = "" if found["precision"] else "; 8-bit products not asked: no qemu-x86_64 (Debian: qemu-user)"
            click.echo(f"{found['version']}: {len(lines) or 'no'} differences from the table{told}")
            for line in lines:
                click.echo(f"  {line}")
    sys.exit(3 if wrong else 0)


if __name__ == "__main__":
    main()
