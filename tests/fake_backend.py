"""A fake session whose artifact states its behaviour: it answers, sleeps, leaks memory, crashes, hangs or refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.backends import Place
from toolchain.errors import DeviceMemoryError, ProviderError


class FakeSession:
    """Answers 1 for an even sum of ids; `behaviour.json` in its folder states all other behaviour."""

    def __init__(self, folder: Path, place: Place) -> None:
        self._does = json.loads((folder / "behaviour.json").read_text())
        self._runs = 0
        self._kept: list[bytes] = []
        self._place = place
        if self._does.get("refuse"):
            raise ProviderError(self._does["refuse"], "Use another one.")
        print("a library that prints to standard output must not break the line to the parent")

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        self._runs += 1
        does = self._does
        if self._runs > does.get("after", 0):
            if "exit" in does:
                print("last words of a dying library", flush=True)
                os._exit(does["exit"])
            if "signal" in does:
                os.kill(os.getpid(), getattr(signal, does["signal"]))
            if "hang" in does:
                time.sleep(does["hang"])
            if "ask_for" in does:
                raise DeviceMemoryError.failed_allocation(does["ask_for"])
            if "raise" in does:
                raise RuntimeError(does["raise"])
        if "leak" in does:
            self._kept.append(bytes(does["leak"]))
        spend = does.get("us", 200) * len(batch["input_ids"]) / 1e6
        if not self._place.exact:
            spend /= does["option_time"]
        until = time.perf_counter() + spend
        while time.perf_counter() < until:
            pass
        even = batch["input_ids"].sum(axis=1) % 2 == 0
        if does.get("moody") and len(even) > 1:
            even = ~even
        if self._runs > does.get("nan_after", float("inf")):
            return np.full((len(even), 2), np.nan, np.float32)
        return np.stack([~even, even], axis=1).astype(np.float32)

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        until_s = self._does.get("resident_us", 100) / 1e6
        return lambda: time.sleep(until_s)

    def facts(self) -> dict[str, Any]:
        return {
            "provider": "fake",
            "threads": self._place.threads,
            "omp": os.environ.get("OMP_NUM_THREADS"),
            "hub": os.environ.get("HF_HUB_OFFLINE"),
            "pid": os.getpid(),
            "device_id": self._place.device_id,
            "device_order": os.environ.get("CUDA_DEVICE_ORDER"),
            **({"option": ["an.option", "1"]} if "option_time" in self._does else {}),
        }

    def close(self) -> None:
        self._kept.clear()
