"""Processes that answer questions, one for each cell: the parent's handle. `toolchain.bench.worker` runs in the child.

JSON a line each way, no pickle.
"""

from __future__ import annotations

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain import errors
from toolchain.backends import Place
from toolchain.data.files import Text
from toolchain.data.inputs import Encoder

_TAIL = 400  # characters of standard error that a failed row quotes


class Child:
    """A fresh process of a module that calls `toolchain.bench.worker.serve`. Close it, or use its owner as a context.

    Where it has something to end itself, `end_s` is how long that may take once it is interrupted; a terminal's
    interrupt is then for its parent alone.
    """

    end_s = 0.0

    def __init__(self, module: str, variables: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the child
        self._replies: queue.Queue[tuple[str, float] | None] = queue.Queue()
        self._started = time.perf_counter()
        # -P: a file of the working directory must not stand in for a library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **variables},
            start_new_session=self.end_s > 0,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._arrived = self._started

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def ask(self, message: Mapping[str, Any], timeout_s: float | None) -> dict[str, Any]:
        """Sends one message and waits for its answer.

        Raises what the child raised where that was a `ToolchainError`, else `BenchError` with what the child said last:
        it failed, crashed, was killed, or did not answer within `timeout_s` (None: it is waited for).
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None
        try:
            answer = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            self._process.kill()
            self.close()
            raise self._lost(f"It did not answer within {timeout_s:.0f} s and was stopped.") from None
        if answer is None:
            raise self._death()
        line, self._arrived = answer
        reply: dict[str, Any] = json.loads(line)
        if failure := reply.get("error"):
            kind = getattr(errors, failure["type"], errors.BenchError)
            raise kind(failure["cause"], failure["mend"])
        return reply

    def close(self) -> None:
        """Ends the child, by force where it does not end by itself."""
        if self._process.poll() is None and self.end_s and self._process.stdin is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # it is ended by force below
                self._process.stdin.close()
                self._process.send_signal(signal.SIGINT)
                self._process.wait(self.end_s)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):  # a dead child's; there is nothing more to say to it
                    stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # `close` may close it while this thread reads
            for line in self._process.stdout:
                self._replies.put((line, time.perf_counter()))
        self._replies.put(None)

    def _death(self) -> errors.ToolchainError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            how = "was killed (out of memory, most likely)"
        elif code < 0:
            how = f"crashed with {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        self._errors.seek(0)
        said = " ".join(self._errors.read()[-_TAIL:].split())
        return self._lost(f"Its process {how}." + (f" It said: {said}" if said else ""))

    def _lost(self, what: str) -> errors.ToolchainError:
        """The error that a child without an answer is."""
        return errors.BenchError(what)


class Worker(Child):
    """A fresh process with one loaded session."""

    def __init__(
        self, session: str, folder: Path, place: Place, encoder: Encoder, text: Text, imports: Sequence[str] = ()
    ) -> None:
        super().__init__("toolchain.bench.worker", environment(place.threads))
        tokenizer = {"folder": str(encoder.folder), "names": encoder.names, "max_length": encoder.max_length}
        self._first = {
            "session": session,
            "folder": str(folder),
            "place": asdict(place),
            "tokenizer": tokenizer,
            "text": text,
            "imports": list(imports),
        }

    def load(self, timeout_s: float) -> dict[str, Any]:
        """Loads the session and answers one text: the session's facts, the memory of each stage, microseconds from file
        to session (`load_us`) and from the start of the process to the answer (`cold_start_us`)."""
        reply = self.ask(self._first, timeout_s)
        # What it spent on reading its own memory is not part of a start.
        reply["cold_start_us"] = round((self._arrived - self._started) * 1e6) - reply.pop("metering_us")
        return reply


def environment(threads: int) -> dict[str, str]:
    """What a measured process has set beside what this one has."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # a measured process asks nobody for anything
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # a GPU's number is the same for CUDA, NVML and nvidia-smi
    }
