"""A fake session with the behaviour that its artifact states: it can answer, sleep, leak, crash, hang or refuse."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.backends import Place
from toolchain.errors import DeviceMemoryError, ProviderError


class Clock:
    """Takes the place of the module `time` in the child process, so that the load of the machine changes no time."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._noise = random.Random(0)

    def pass_us(self, duration_us: float) -> None:
        """Lets a time of about `duration_us` microseconds pass."""
        self._now_ns += round(1000 * duration_us * self._noise.uniform(0.95, 1.05))

    def sleep(self, duration_s: float) -> None:
        self._now_ns += round(1e9 * duration_s)

    def perf_counter(self) -> float:
        return self._now_ns / 1e9

    def perf_counter_ns(self) -> int:
        return self._now_ns


class FakeSession:
    """Answers 1 for an even sum of token ids; `behaviour.json` in the artifact's folder states all other behaviour."""

    def __init__(self, folder: Path, place: Place) -> None:
        self._behaviour = json.loads((folder / "behaviour.json").read_text())
        self._runs = 0
        self._leaked: list[bytes] = []
        self._place = place
        if "clock_us" in self._behaviour:
            self._clock = Clock()
            sys.modules["__main__"].time = self._clock  # type: ignore[attr-defined]  # the module of the child process
        if self._behaviour.get("refuse"):
            raise ProviderError(self._behaviour["refuse"], "Use another one.")
        print("a library that prints to standard output must not disturb the replies to the parent process")

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        self._runs += 1
        behaviour = self._behaviour
        if self._runs > behaviour.get("after", 0):
            if "exit" in behaviour:
                print("last words of a dying library", flush=True)
                os._exit(behaviour["exit"])
            if "signal" in behaviour:
                os.kill(os.getpid(), getattr(signal, behaviour["signal"]))
            if "hang" in behaviour:
                time.sleep(behaviour["hang"])
            if "ask_for" in behaviour:
                raise DeviceMemoryError.failed_allocation(behaviour["ask_for"])
            if "raise" in behaviour:
                raise RuntimeError(behaviour["raise"])
        if "leak" in behaviour:
            self._leaked.append(bytes(behaviour["leak"]))
        if "clock_us" in behaviour:
            self._clock.pass_us(behaviour["clock_us"] * len(batch["input_ids"]))
        duration_s = behaviour.get("us", 200) * len(batch["input_ids"]) / 1e6
        if not self._place.exact:
            duration_s /= behaviour["option_time"]
        end = time.perf_counter() + duration_s
        while time.perf_counter() < end:
            pass
        is_even = batch["input_ids"].sum(axis=1) % 2 == 0
        if behaviour.get("moody") and len(is_even) > 1:
            is_even = ~is_even
        if self._runs > behaviour.get("nan_after", float("inf")):
            return np.full((len(is_even), 2), np.nan, np.float32)
        return np.stack([~is_even, is_even], axis=1).astype(np.float32)

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        duration_s = self._behaviour.get("resident_us", 100) / 1e6
        return lambda: time.sleep(duration_s)

    def facts(self) -> dict[str, Any]:
        return {
            "provider": "fake",
            "threads": self._place.threads,
            "omp": os.environ.get("OMP_NUM_THREADS"),
            "hub": os.environ.get("HF_HUB_OFFLINE"),
            "pid": os.getpid(),
            "device_id": self._place.device_id,
            "device_order": os.environ.get("CUDA_DEVICE_ORDER"),
            **({"option": ["an.option", "1"]} if "option_time" in self._behaviour else {}),
        }

    def close(self) -> None:
        self._leaked.clear()
