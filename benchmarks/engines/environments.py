"""The Python environment of each tool, made once and kept for later runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

from toolchain.errors import BenchError

INSTALL_S = 2400  # seconds that an installation may take; llama.cpp is compiled from source
LINES, CHARACTERS = 3, 400  # how much an error quotes from the end of a command's output, at most
MARK = "installed"  # a file with this name marks an environment whose installation is complete


def environment(parent: Path, requirements: Path, borrow: bool) -> Path:
    """Returns the interpreter of an environment with the required packages; makes the environment if it does not exist.

    Args:
        parent: Folder of the environments.
        requirements: The requirements file. An environment belongs to one content of this file.
        borrow: Whether the environment also finds the packages of the running environment, such as PyTorch and the
            toolchain. If both environments have a package, the new environment uses its own.

    Raises:
        BenchError: The packages cannot be installed.
    """
    site = sysconfig.get_path("purelib")
    key = hashlib.sha256(f"{requirements.read_text()}{sys.executable}{site}{borrow}".encode()).hexdigest()[:12]
    folder = (parent / f"{requirements.stem}-{key}").resolve()
    python = folder / "bin" / "python"
    if (folder / MARK).is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    work = f"The installation of {requirements.stem}"
    call(work, [sys.executable, "-m", "venv", "--without-pip", folder], INSTALL_S)
    if borrow:
        # `addsitedir` also reads the .pth files of the running environment, one of which may lead to the toolchain.
        own_site = next(folder.glob("lib/python*/site-packages"))
        (own_site / "running_environment.pth").write_text(f"import site; site.addsitedir({site!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    call(work, [*pip, "install", "-q", "-r", requirements], INSTALL_S)
    (folder / MARK).touch()
    return python


def call(work: str, command: list[str | Path], limit_s: float, folder: Path | None = None) -> None:
    """Runs a command, and kills it with its child processes when the time limit is over.

    Args:
        work: What the command does, the subject of an error.
        command: The command.
        limit_s: The time limit in seconds.
        folder: Working folder of the command; None for the current folder.

    Raises:
        BenchError: The command fails, does not end in time, or cannot be started.
    """
    try:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise BenchError(f"{work} cannot be started: {error}.") from error
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{work} did not end within {limit_s:.0f} s.") from None
    finally:
        # After a normal end, the group of processes is empty.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        last = " ".join(lines[-LINES:])[-CHARACTERS:]
        raise BenchError(f"{work} ended with exit code {process.returncode}: {last}")
