"""Doctor: what this machine has, what of it stands in the way, and the line that mends each."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolchain import hardware

LEAST_DISK = 5e9
LEAST_MEMORY = 4e9
REINSTALL = "pip install -c constraints.txt -e '.[cpu]'"


@dataclass(frozen=True)
class Finding:
    """`level` is ok, note (works, but) or problem (does not work); `mend` is a line to type or do."""

    level: str
    what: str
    mend: str = ""


def examine(exported: Path) -> list[Finding]:
    """Everything looked at, in order."""
    checks: list[Callable[[], list[Finding]]] = [
        _python,
        _requirements,
        _onnxruntimes,
        _processor,
        _memory,
        lambda: _disk(exported),
        _gpu,
    ]
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    where = sys.prefix if sys.prefix != sys.base_prefix else f"{sys.prefix} (no virtual environment)"
    return [Finding("ok", f"Python {platform.python_version()} in {where}")]


def _requirements() -> list[Finding]:
    from packaging.requirements import Requirement

    findings = []
    for text in importlib.metadata.requires("toolchain") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("problem", f"{requirement.name} is missing", f"pip install '{requirement}'"))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            findings.append(Finding("ok", f"{requirement.name} {version}"))
        else:
            what = f"{requirement.name} {version} does not satisfy {requirement.specifier}"
            findings.append(Finding("problem", what, f"pip install '{requirement}'"))
    return findings


def _onnxruntimes() -> list[Finding]:
    found = {name: v for name, v in hardware.versions().items() if name in ("onnxruntime", "onnxruntime-gpu")}
    if len(found) == 2:
        return [
            Finding(
                "problem",
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
                f"pip uninstall -y onnxruntime onnxruntime-gpu && {REINSTALL}",
            )
        ]
    if not found:
        return [Finding("problem", "no ONNX Runtime is installed", REINSTALL)]
    return [Finding("ok", f"{name} {version}") for name, version in found.items()]


def _processor() -> list[Finding]:
    processor = hardware.processor()
    isa = processor["isa"]
    text = f"{processor['cpu']}, {hardware.cores()} cores, {', '.join(isa) or 'no known vector extension'}"
    if platform.machine().lower() in ("x86_64", "amd64") and not {"avx512_vnni", "avx_vnni"} & set(isa):
        return [
            Finding(
                "note", f"{text}: no VNNI, so int8 is slower here and can saturate", "Compare accuracy on this machine."
            )
        ]
    return [Finding("ok", text)]


def _memory() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free"
    if memory.available < LEAST_MEMORY:
        return [Finding("note", text, "Close other programs, or measure fewer variants at once with --variant.")]
    return [Finding("ok", text)]


def _disk(exported: Path) -> list[Finding]:
    there = exported.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.1f} GB free where {exported} lies"
    if free < LEAST_DISK:
        return [Finding("note", text, "make clean, or --exported on another disk")]
    return [Finding("ok", text)]


def _gpu() -> list[Finding]:
    devices, driver = hardware.gpus()
    if not devices:
        return [
            Finding(
                "note", "no NVIDIA GPU answers: cells @cuda are listed as unavailable", "Nothing to mend for CPU work."
            )
        ]
    return [
        Finding(
            "ok",
            f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
            f"compute capability {gpu['compute_capability']}, driver {driver}",
        )
        for gpu in devices
    ]
