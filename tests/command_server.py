"""Starts commands of the toolchain quickly: a process that imports libraries once, and forks for each command.

The arguments of the process are the path of a socket and the names of the modules to import. No module may start a
thread, because a thread does not survive a fork.

A client connects, and sends one byte with three file descriptors: standard input, output and error of the command. One
line of JSON follows: ``arguments``, ``folder``, ``environment``, and ``stop``. With ``stop``, the command waits for the
signal SIGCONT before it starts. The answer is a line with the process id of the command. At the end of the command, a
line with its exit code follows, which is negative after a signal. Each command has its own session.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# Modules that the commands would import one by one.
MODULES = (
    *("datasets", "onnx_ir", "onnxruntime", "safetensors.torch", "torch", "transformers.models.auto.modeling_auto"),
    *("transformers.models.distilbert.modeling_distilbert", "toolchain.predict", "toolchain.ship.shipping"),
    *("toolchain.tuning", "toolchain.finetune"),
)
# A program that sends its arguments to the server, and ends with the exit code of the command.
PROGRAM = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({path!r})
socket.send_fds(connection, [b"."], [0, 1, 2])
request = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ), "stop": False}}
connection.sendall(json.dumps(request).encode() + b"\\n")
_, code = connection.makefile().read().split()
sys.exit(int(code) % 256)
"""


class Started:
    """A command that the server has started.

    Attributes:
        pid: Process id of the command, which is also the id of its session.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile()
        self.pid = int(self._lines.readline())

    def wait(self) -> int:
        """Returns the exit code of the command when it ends; the code is negative after a signal."""
        code = int(self._lines.readline())
        self._connection.close()
        return code


class CommandServer:
    """A new server process.

    Args:
        modules: Modules that the server imports.
        environment: Environment variables of the server, which its imports may read.
    """

    def __init__(self, modules: Sequence[str] = MODULES, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()  # a short path, because the path of a socket is limited
        self.path = str(Path(self._folder.name) / "socket")
        self._environment = dict(environment or os.environ)
        command = [sys.executable, __file__, self.path, *modules]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self._environment)
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the command server failed")

    def start(self, arguments: Sequence[str], folder: Path, output: IO[Any], stop: bool = False) -> Started:
        """Starts a command without input.

        Args:
            arguments: Arguments of the command.
            folder: Working directory.
            output: File for the output and the errors of the command.
            stop: Whether the command waits for the signal SIGCONT.
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        with open(os.devnull) as nothing:
            socket.send_fds(connection, [b"."], [nothing.fileno(), output.fileno(), output.fileno()])
        request = {
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": self._environment,
            "stop": stop,
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Started(connection)

    def write_program(self, path: Path) -> None:
        """Writes a program that takes the place of the command ``toolchain``."""
        path.write_text(PROGRAM.format(python=sys.executable, path=self.path))
        path.chmod(0o755)

    def close(self) -> None:
        """Ends the server."""
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


def _run_command(descriptors: Sequence[int], request: Mapping[str, Any]) -> None:
    """Runs one command in this process, and ends the process with the command's exit code."""
    from toolchain.cli import main

    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    # New streams, because the streams of the server suit the files that it had at its start.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - for the whole command
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["stop"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    code = 70
    try:
        code = main(request["arguments"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _answer(connection: socket.socket) -> None:
    """Starts the command that the connection asks for, and sends its process id and its exit code."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        _run_command(descriptors, request)
    for descriptor in descriptors:
        os.close(descriptor)
    if request["stop"]:
        os.waitpid(pid, os.WUNTRACED)
    connection.sendall(f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(f"{code}\n".encode())


def main() -> None:
    """Answers requests until the process is terminated."""
    path, *modules = sys.argv[1:]
    for name in modules:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so the system frees the processes of ended requests
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                _answer(connection)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    main()
