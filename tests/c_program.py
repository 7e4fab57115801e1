"""Compiles programs in C and C++ for the library of the installed Python package onnxruntime.

No package has both the header and the library. `make test-clients` downloads the header of an older release, because a
library accepts older headers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime

LIBRARY = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime.so.{onnxruntime.__version__}"
# Compiler, name of the language for the compiler, and standard
COMPILERS = {"C": ("cc", "c", "c99"), "C++": ("c++", "c++", "c++17")}
WARNINGS = ("-Wall", "-Wextra", "-pedantic", "-Werror")


def reason_to_skip(clients: Path) -> str:
    """Returns why this machine cannot compile the program; an empty string if it can.

    Args:
        clients: The folder that `make test-clients` fills.
    """
    if missing := [compiler for compiler, _, _ in COMPILERS.values() if not shutil.which(compiler)]:
        return f"needs {missing[0]}"
    if not LIBRARY.exists():
        return f"this onnxruntime has no {LIBRARY.name}"
    return "" if (clients / "c").exists() else "needs `make test-clients`, on a system with apt"


def compile_program(bundle: Path, folder: Path, clients: Path, language: str = "C") -> Path:
    """Compiles the program in the README of a bundle, and returns its path in `folder`."""
    block = re.search(r"```c\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL)
    assert block
    source = folder / "classify.c"
    source.write_text(block[1])
    return compile_source(source, folder, clients, language)


def compile_source(source: Path, folder: Path, clients: Path, language: str) -> Path:
    """Compiles a program, with all warnings as errors, and returns its path in `folder`."""
    compiler, name, standard = COMPILERS[language]
    program = folder / "classify"
    (folder / "libonnxruntime.so.1").symlink_to(LIBRARY)  # the name by which programs load the library
    command = [compiler, *WARNINGS, f"-std={standard}", "-isystem", clients / "c", "-x", name, source, "-x", "none"]
    subprocess.run([*command, LIBRARY, f"-Wl,-rpath,{folder}", "-o", program], check=True)
    return program
