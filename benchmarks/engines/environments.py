"""The Python environment of each tool, made once and kept for later runs."""

from __future__ import annotations

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
TAIL = 600  # number of characters that an error quotes from the end of a command's output
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
    call([sys.executable, "-m", "venv", "--without-pip", folder], INSTALL_S)
    if borrow:
        # `addsitedir` also reads the .pth files of the running environment, one of which may lead to the toolchain.
        own_site = next(folder.glob("lib/python*/site-packages"))
        (own_site / "running_environment.pth").write_text(f"import site; site.addsitedir({site!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    call([*pip, "install", "-q", "-r", requirements], INSTALL_S)
    (folder / MARK).touch()
    return python


def call(command: list[str | Path], limit_s: float, folder: Path | None = None, **variables: str) -> None:
    """Runs a command, and kills it with its child processes when the time limit is over.

    Args:
        command: The command.
        limit_s: The time limit in seconds.
        folder: Working folder of the command; None for the current folder.
        variables: Additional environment variables.

    Raises:
        BenchError: The command fails, does not end in time, or cannot be started.
    """
    words = list(map(str, command))
    try:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise BenchError(f"`{words[0]}` cannot be started: {error}.") from error
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise BenchError(f"`{' '.join(words)}` did not end within {limit_s:.0f} s.") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise BenchError(
            f"`{' '.join(words)}` ended with exit code {process.returncode}: {' '.join(output.split())[-TAIL:]}"
        )
