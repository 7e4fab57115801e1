"""Runs programs with qemu, which emulates processors that this machine does not have.

qemu runs one program and passes its system calls to the kernel of this machine, so the program reads this machine's
files. `make test-clients` installs Python for x86-64, and a Debian root folder for 64-bit ARM. ONNX Runtime uses the
kernels of the emulated processor, so the logits are those of that processor. Times measured under qemu have no meaning.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

AVX2, ARM = "AVX2 without VNNI", "64-bit ARM"
# The option `-cpu` switches off the features of Haswell that qemu cannot emulate. The files that `arm_root.sh` writes
# describe the ARM core neoverse-n1, so qemu must emulate this core.
_EMULATORS = {
    AVX2: ("qemu-x86_64", "-cpu", "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid"),
    ARM: ("qemu-aarch64", "-cpu", "neoverse-n1"),
}


def program(processor: str, *command: str | Path) -> list[str]:
    """Returns the command that runs `command` (a program and its arguments) on the emulated `processor`."""
    return [*_EMULATORS[processor], *map(str, command)]


def python(processor: str, clients: Path) -> list[str]:
    """Returns the command that starts Python, with the packages that a bundle needs, on the emulated `processor`.

    Args:
        processor: `AVX2` or `ARM`.
        clients: the folder that `make test-clients` fills.
    """
    if processor == AVX2:
        return program(AVX2, clients / "python" / "bin" / "python")
    root = clients / "arm"
    return [*_EMULATORS[ARM], "-L", str(root), str(root / "usr" / "bin" / "python3")]


def reason_to_skip(processor: str, clients: Path) -> str:
    """Returns why this machine cannot run Python on the emulated `processor`.

    If this machine can run Python on the emulated processor, the function returns an empty string.
    """
    emulator = _EMULATORS[processor][0]
    if shutil.which(emulator) is None:
        return f"needs {emulator} (Debian: qemu-user)"
    if processor == AVX2 and platform.machine() != "x86_64":
        return "needs a Python for x86-64"
    if not Path(python(processor, clients)[-1]).exists():
        return "needs `make test-clients`" + (f" with {emulator}" if processor == ARM else "")
    return ""
