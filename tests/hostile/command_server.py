"""Starts commands of the toolchain quickly: a process that imports modules once and forks for each command.

The arguments of the process are the names of the modules. No module may start a thread, because a thread does not
survive a fork.

The process reads one request per line from standard input: a JSON object with ``arguments``, ``folder`` and ``output``.
It replies with the process id of the new command, which waits for the signal SIGCONT. When the command ends, it replies
with the status of `os.waitpid`.
"""

import importlib
import json
import os
import signal
import sys


def run_command(arguments: list[str], folder: str, output: str) -> None:
    """Runs one command in this process, after SIGCONT, and ends the process with the command's exit code."""
    from toolchain.cli import main

    os.setsid()
    os.chdir(folder)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    code = 70
    try:
        code = main(arguments)
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(code)


def serve() -> None:
    """Answers requests until standard input ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run_command(**json.loads(line))
        os.waitpid(pid, os.WUNTRACED)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
