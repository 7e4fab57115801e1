"""A child process that answers messages.

This module runs in the parent process, and `toolchain.system.serving` runs in the child process. Each message and each
answer is one line of JSON, never a pickle.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from toolchain import errors

_TAIL = 400  # number of characters that an error quotes from the end of the child's standard error


class Child(abc.ABC):
    """A new child process that runs a module, which must call `toolchain.system.serving.serve`.

    The code that creates a child must call `close`. The argument `python` is the path of the child's interpreter; by
    default, the child runs in the interpreter of this process.

    Attributes:
        end_s: Seconds that the child may take to end after an interrupt; 0 kills the child at once. If `end_s` is
            above 0, the child starts a new POSIX session, so that an interrupt in the terminal reaches only the parent.
    """

    end_s = 0.0

    def __init__(self, module: str, variables: Mapping[str, str], python: str | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - lives as long as the child
        self._replies: queue.Queue[tuple[str, float] | None] = queue.Queue()
        self._started_at = time.perf_counter()
        # With -P, Python does not search the working directory for modules, so no file there can replace a library.
        self._process = subprocess.Popen(
            [python or sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **variables},
            start_new_session=self.end_s > 0,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._answered_at = self._started_at

    @property
    def pid(self) -> int:
        """Returns the process id of the child."""
        return self._process.pid

    def ask(self, message: Mapping[str, Any], timeout_s: float | None) -> dict[str, Any]:
        """Sends one message and returns the answer.

        Args:
            message: The message.
            timeout_s: Seconds to wait for the answer; None waits without limit.

        Raises:
            OSError: The system refuses to send the message to the running child.
            ToolchainError: The child raised a `ToolchainError`, and the parent raises the same error. The child raised
                another error, and the parent raises a `ToolchainError` with its message. Or the child ended, crashed,
                was killed, or did not answer in time. A subclass of `Child` chooses the class of the last error, whose
                message quotes the end of the child's standard error.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and self._process.poll() is None:
                raise  # the child still runs, so it would never end
            raise self._make_exit_error() from None
        try:
            answer = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            self._process.kill()
            self.close()
            raise self._make_timeout_error(timeout_s or 0.0) from None
        if answer is None:
            raise self._make_exit_error()
        line, self._answered_at = answer
        reply: dict[str, Any] = json.loads(line)
        if error_facts := reply.get("error"):
            raise getattr(errors, error_facts["type"])(error_facts["cause"], error_facts["hint"])
        return reply

    def close(self) -> None:
        """Ends the child: interrupts it and waits up to `end_s` seconds, then kills it if it still runs."""
        if self._process.poll() is None and self.end_s and self._process.stdin is not None:
            # If the child ignores the interrupt, `kill` ends it below.
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.close()
                self._process.send_signal(signal.SIGINT)
                self._process.wait(self.end_s)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None and not stream.closed:
                # `close` flushes unsent data, which fails after the child has ended.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # `close` may close the child's output while this thread reads from it
            for line in self._process.stdout:
                self._replies.put((line, time.perf_counter()))
        self._replies.put(None)

    def _make_timeout_error(self, timeout_s: float) -> errors.ToolchainError:
        """Returns the error for a child that did not answer within `timeout_s` seconds and was killed."""
        return self._make_error(f"The process did not answer within {timeout_s:.0f} s and was killed.")

    def _make_exit_error(self) -> errors.ToolchainError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            ending = "was killed (out of memory, most likely)"
        elif code < 0:
            ending = f"crashed with {signal.Signals(-code).name}"
        else:
            ending = f"ended with exit code {code}"
        self._errors.seek(0)
        output = " ".join(self._errors.read()[-_TAIL:].split())
        return self._make_error(f"The process {ending}." + (f" Last output of the process: {output}" if output else ""))

    @abc.abstractmethod
    def _make_error(self, cause: str) -> errors.ToolchainError:
        """Returns the error for a child that gives no answer; `cause` is one sentence or more."""
