"""One cell, one process: both ends of the line between `bench` and the child a session is measured in.

JSON a line each way, no pickle. The child answers on what was its standard output; whatever libraries print there goes
to standard error, which the parent keeps and quotes where a child dies.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain import errors, gpu_memory
from toolchain.backends import Place, session_class

_TAIL = 400  # characters of standard error that a failed row quotes


class Worker:
    """The parent's end: a fresh process with one loaded session. Close it, or use it as a context."""

    def __init__(self, session: str, folder: Path, place: Place, imports: Sequence[str] = ()) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the child
        self._replies: queue.Queue[str | None] = queue.Queue()
        # -P: a file of the working directory must not stand in for a library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "toolchain.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **_environment(place.threads)},
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._first = {
            "session": session,
            "folder": str(folder),
            "place": asdict(place),
            "imports": list(imports),
        }

    def load(self, timeout_s: float) -> dict[str, Any]:
        """Loads the session: its facts, the memory of each stage, and the seconds it took."""
        return self.ask(self._first, timeout_s)

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Sends one message and waits for its answer.

        Raises what the child raised where that was a `ToolchainError`, else `BenchError` with what the child said last:
        it failed, crashed, was killed, or did not answer within `timeout_s`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None
        try:
            line = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise errors.BenchError(f"It did not answer within {timeout_s:.0f} s and was stopped.") from None
        if line is None:
            raise self._death()
        reply: dict[str, Any] = json.loads(line)
        if failure := reply.get("error"):
            kind = getattr(errors, failure["type"], errors.BenchError)
            raise kind(failure["cause"], failure["mend"])
        return reply

    def close(self) -> None:
        """Ends the child, by force where it does not end by itself."""
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
                self._replies.put(line)
        self._replies.put(None)

    def _death(self) -> errors.BenchError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            how = "was killed (out of memory, most likely)"
        elif code < 0:
            how = f"crashed with {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        self._errors.seek(0)
        said = " ".join(self._errors.read()[-_TAIL:].split())
        return errors.BenchError(f"Its process {how}." + (f" It said: {said}" if said else ""))


def _environment(threads: int) -> dict[str, str]:
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # a measured process asks nobody for anything
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # a GPU's number is the same for CUDA, NVML and nvidia-smi
    }


def _uss() -> int:
    """Memory that would be freed if this process ended."""
    import psutil

    return int(psutil.Process().memory_full_info().uss)


def _reset_peak() -> str:
    """Forgets the peak of loading where the system can; says how the peak is then read."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "peak resident set since the process started"
    return "VmHWM reset after load"


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


class _Child:
    """The child's end: one session and the sentences it is asked about."""

    def __init__(self, first: Mapping[str, Any]) -> None:
        self._place = Place(**first["place"])
        memory: dict[str, Any] = {"bare": _uss()}
        for module in first["imports"]:
            _import(module)
        kind = session_class(first["session"])
        memory["imports"] = _uss()
        self._gpu = gpu_memory.meter(self._place.device_id) if self._place.provider == "cuda" else None
        started = time.perf_counter()
        self._session = kind(Path(first["folder"]), self._place)
        load_s = round(time.perf_counter() - started, 4)
        memory |= {"load": _uss(), "method": _reset_peak()}
        self._gpu_load = self._gpu.read() if self._gpu else 0
        self.ready = {"load_s": load_s, "facts": self._session.facts(), "memory": memory}
        self._ids: list[list[int]] = []
        self._names: list[str] = []
        self._pad_id = 0

    def data(self, ids: list[list[int]], names: list[str], pad_id: int) -> dict[str, Any]:
        """The token ids of every sentence, referred to by index from now on."""
        self._ids, self._names, self._pad_id = ids, names, pad_id
        return {}

    def run(self, batches: list[list[int]], warmup: int, repeat: int, resident: bool = False) -> dict[str, Any]:
        """Runs the batches `repeat` times after `warmup` untimed ones: microseconds of each, and the answers; with
        `resident`, also once each with batch and logits left on the device."""
        from toolchain.inputs import pad

        arrays = [pad([self._ids[i] for i in batch], self._names, self._pad_id) for batch in batches]
        for array in arrays[:warmup]:
            self._session.run(array)
        times: list[list[int]] = []
        there: list[int] = []
        answers: list[list[int]] = []
        gc.collect()
        gc.disable()
        try:
            for turn in range(repeat):
                spent = []
                for array in arrays:
                    started = time.perf_counter_ns()
                    logits = self._session.run(array)
                    spent.append(_since(started))
                    if turn == 0:
                        answers.append([int(i) for i in logits.argmax(axis=1)])
                times.append(spent)
            for array in arrays if resident else ():
                answer = self._session.resident(array)
                answer()
                started = time.perf_counter_ns()
                answer()
                there.append(_since(started))
        finally:
            gc.enable()
        if self._gpu:
            self._gpu.read()
        return {"us": times, "resident_us": there, "answers": answers}

    def peak(self) -> dict[str, Any]:
        """The peaks since the session was loaded: of the host's memory, and of the GPU's where there is one."""
        found: dict[str, Any] = {"peak": _peak()}
        if self._gpu:
            self._gpu.read()
            found["gpu"] = {"load": self._gpu_load, "peak": self._gpu.peak, "method": self._gpu.method}
            allocated = gpu_memory.allocator_peak(self._place.device_id)
            if allocated is not None:
                found["gpu"]["allocator_peak"] = allocated
        return found


def _import(module: str) -> None:
    """Raises `ProviderError` where it is not installed, or not for this machine."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise errors.ProviderError(
            f"{module} cannot be imported: {error}.", "`toolchain doctor` says what to install."
        ) from error


def _since(started_ns: int) -> int:
    """Whole microseconds since then, at least one."""
    return max(1, round((time.perf_counter_ns() - started_ns) / 1000))


def main() -> None:
    """Reads messages until standard input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child: _Child | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if child is None:
                child = _Child(message)
                reply = child.ready
            else:
                reply = getattr(child, message.pop("do"))(**message)
        except errors.ToolchainError as error:
            reply = {"error": {"type": type(error).__name__, "cause": error.cause, "mend": error.mend}}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": {"type": "BenchError", "cause": f"{type(error).__name__}: {error}", "mend": ""}}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
