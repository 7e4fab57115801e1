"""The child process that measures a cell; `toolchain.bench.process` is the parent's handle."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import gc
import importlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import errors
from toolchain.backends import Place, session_class
from toolchain.bench import gpu_memory
from toolchain.bench.scenarios import fits_batch
from toolchain.data import labels
from toolchain.data.encoding import Encoder, pad
from toolchain.data.labels import TOKENS, Tokens
from toolchain.results.measurements import PROBABILITY
from toolchain.results.providers import is_on_gpu
from toolchain.results.session_settings import fixed_width
from toolchain.system.serving import serve

if TYPE_CHECKING:
    import numpy as np

MOST_REPEATS = 50  # maximum number of times that a turn repeats its batches to reach its minimum time


def _reset_peak() -> str:
    """Resets the peak memory if the system can do so, and returns the name of the method that measures the peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "peak resident set since the process started"
    return "VmHWM reset after load"


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


class _Child:
    """One session and the sentences that it answers; the public methods answer the parent's messages."""

    def __init__(self, first: Mapping[str, Any]) -> None:
        self._place = Place.from_json(first["place"])
        self._folder = Path(first["folder"])
        self._metering_s = 0.0
        memory: dict[str, Any] = {"bare": self._unique_bytes()}
        for module in first["imports"]:
            _import_module(module)
        session_type = session_class(first["session"])
        tokenizer = first["tokenizer"]
        self._encoder = Encoder.open(Path(tokenizer["folder"]), tokenizer["names"], tokenizer["max_length"])
        memory["imports"] = self._unique_bytes()
        with self._metering():
            self._gpu = gpu_memory.meter(self._place.device_id) if is_on_gpu(self._place.provider) else None
        started_ns = time.perf_counter_ns()
        self._session = session_type(self._folder, self._place)
        load_us = _elapsed_us(started_ns)
        memory |= {"load": self._unique_bytes(), "method": _reset_peak()}
        with self._metering():
            self._gpu_load = self._gpu.read() if self._gpu else 0
        self._texts, self._ids = [first["text"]], self._encoder.encode([first["text"]])
        answer = self._session.run(self._pad_batch([0]))
        self._check_and_decode([answer], [[0]])
        self.ready = {
            "load_us": load_us,
            "facts": self._session.facts(),
            "memory": memory,
            "metering_us": round(self._metering_s * 1e6),
        }

    def data(self, texts: list[str], lengths: list[int]) -> dict[str, Any]:
        """Stores the sentences that later messages refer to by index, and returns an empty answer.

        Args:
            texts: The texts.
            lengths: Token counts of synthetic sentences. For each token count, the method appends one sentence of this
                length, made of tokens from the texts.
        """
        self._texts = texts
        self._ids = self._encoder.encode(texts)
        tokens = [token for ids in self._ids for token in ids[1:-1]] or self._ids[0]
        first, last = self._ids[0][0], self._ids[0][-1]
        for length in lengths:
            middle = (tokens * (length // len(tokens) + 1))[: max(0, length - 2)]
            self._ids.append(Tokens([first, *middle, last][:length]))
        return {}

    def run(
        self,
        batches: list[list[int]],
        warmup: int,
        repeats: int = 1,
        min_s: float = 0.0,
        tokenizing: bool = False,
        resident: bool = False,
        fixed: bool = False,
    ) -> dict[str, Any]:
        """Runs all batches and measures their times.

        Args:
            batches: Indices of the sentences of each batch.
            warmup: Number of batches at the start of `batches` that run once before the timing starts.
            repeats: Number of repetitions of all batches; 0 repeats them until `min_s` seconds are over.
            min_s: Minimum measuring time in seconds if `repeats` is 0; the method stops earlier after `MOST_REPEATS`
                repetitions.
            tokenizing: Whether to tokenise each batch again in each repetition, and to time the tokenising.
            resident: Whether to time each batch once more with its inputs and logits in the device's memory.
            fixed: Whether to pad each batch to a fixed length; see `fixed_width`.

        Returns:
            ``us`` is the microseconds that the session takes, by repetition and batch. ``tokenizing_us`` is the
            microseconds of tokenising, as one flat list ordered by repetition and batch. ``resident_us`` is the
            microseconds that the session takes for each batch in the device's memory. ``answers`` and ``probabilities``
            come from the first repetition, by batch.
        """
        for batch in batches[:warmup]:
            self._session.run(self._pad_batch(batch, fixed))
        result: dict[str, Any] = {"us": [], "tokenizing_us": [], "resident_us": []}
        outputs: list[np.ndarray] = []
        gc.collect()
        gc.disable()
        try:
            deadline = time.perf_counter() + min_s
            while len(result["us"]) < (repeats or 1) or (
                not repeats and time.perf_counter() < deadline and len(result["us"]) < MOST_REPEATS
            ):
                times, tokenizing_us = [], []
                for batch in batches:
                    batch_started_ns = time.perf_counter_ns()
                    arrays = self._encode_batch(batch) if tokenizing else self._pad_batch(batch, fixed)
                    session_started_ns = time.perf_counter_ns()
                    logits = self._session.run(arrays)
                    times.append(_elapsed_us(session_started_ns))
                    tokenizing_us.append((session_started_ns - batch_started_ns) // 1000)
                    if not result["us"]:
                        outputs.append(logits)
                result["us"].append(times)
                result["tokenizing_us"] += tokenizing_us if tokenizing else []
            for batch in batches if resident else ():
                resident_call = self._session.resident(self._pad_batch(batch))
                resident_call()
                session_started_ns = time.perf_counter_ns()
                resident_call()
                result["resident_us"].append(_elapsed_us(session_started_ns))
        finally:
            gc.enable()
        if self._gpu:
            self._gpu.read()
        return {**result, **self._check_and_decode(outputs, batches)}

    def pauses(self, batches: list[list[int]], pauses_us: list[int]) -> dict[str, Any]:
        """Measures each batch once after each pause, tokenising included, from the planned end of the pause.

        Each batch begins with another pause, so that no pause always follows the same one.

        Args:
            batches: Indices of the sentences of each batch.
            pauses_us: The pauses in microseconds.

        Returns:
            ``us`` is the microseconds by pause and batch. The other values are those of `run`, and empty.
        """
        times = [[0] * len(batches) for _ in pauses_us]
        gc.collect()
        gc.disable()
        try:
            for number, batch in enumerate(batches):
                for offset in range(len(pauses_us)):
                    index = (number + offset) % len(pauses_us)
                    self._session.run(self._encode_batch(batch))
                    planned_ns = time.perf_counter_ns() + 1000 * pauses_us[index]
                    if pauses_us[index]:
                        time.sleep(pauses_us[index] / 1e6)
                    self._session.run(self._encode_batch(batch))
                    times[index][number] = _elapsed_us(planned_ns)
        finally:
            gc.enable()
        return {"us": times, "tokenizing_us": [], "resident_us": [], "answers": [], "probabilities": []}

    def server(
        self, arrivals_us: list[int], sentences: list[int], late_us: int, most_late: int, batch_size: int
    ) -> dict[str, Any]:
        """Answers queries that arrive at given times; see `toolchain.bench.server`.

        Args:
            arrivals_us: Time of arrival of each query, in microseconds after the start.
            sentences: Index of the sentence of each query.
            late_us: Latency in microseconds above which a query is late.
            most_late: Number of late queries above which the method stops.
            batch_size: Maximum number of sentences in a batch.

        Returns:
            ``us`` is the latency of each answered query in microseconds, and ``sizes`` the number of sentences in each
            batch.
        """
        for sentence in sentences[:2]:
            self._session.run(self._encode_batch([sentence]))
        result: dict[str, Any] = {"us": [], "sizes": []}
        late = 0
        gc.collect()
        gc.disable()
        try:
            started_ns = time.perf_counter_ns()
            while (first := len(result["us"])) < len(sentences) and late <= most_late:
                now_us = _elapsed_us(started_ns)
                if arrivals_us[first] > now_us:
                    time.sleep((arrivals_us[first] - now_us) / 1e6)
                    continue
                arrived = bisect.bisect_right(arrivals_us, now_us)
                batch = self._take_batch(sentences[first:arrived], batch_size)
                self._session.run(self._encode_batch(batch))
                now_us = _elapsed_us(started_ns)
                latencies = [max(1, now_us - arrival) for arrival in arrivals_us[first : first + len(batch)]]
                late += sum(latency > late_us for latency in latencies)
                result["us"] += latencies
                result["sizes"].append(len(batch))
        finally:
            gc.enable()
        return result

    def _take_batch(self, waiting: list[int], batch_size: int) -> list[int]:
        """Returns the first of the waiting sentences, as many as fit into one batch."""
        longest, count = 0, 0
        for sentence in waiting:
            longest = max(longest, len(self._ids[sentence]))
            if not fits_batch(count + 1, longest, batch_size):
                break
            count += 1
        return waiting[:count]

    def exactness(self, batches: list[list[int]], rounds: int) -> dict[str, Any]:
        """Compares the times of exact and of saturating 8-bit products in alternating rounds, after one untimed round.

        Args:
            batches: Indices of the sentences of each batch.
            rounds: Number of timed rounds with exact products; the number with saturating products is the same. A round
                runs all batches.

        Returns:
            A dictionary whose keys ``exact`` and ``saturating`` hold the microseconds of each round.
        """
        saturating = type(self._session)(self._folder, dataclasses.replace(self._place, exact=False))
        sessions = {"exact": self._session, "saturating": saturating}
        times: dict[str, list[int]] = {name: [] for name in sessions}
        arrays = [self._pad_batch(batch) for batch in batches]
        for turn in range(rounds + 1):
            for name in sorted(sessions, reverse=turn % 2 == 1):
                started_ns = time.perf_counter_ns()
                for batch in arrays:
                    sessions[name].run(batch)
                if turn:
                    times[name].append(_elapsed_us(started_ns))
        saturating.close()
        return times

    def exits(self, sentences: list[int]) -> dict[str, Any]:
        """Returns the number of exits that each sentence passes at batch 1, as ``exits``.

        A copy of the graph finds the exits, because the measured graph does not output them.
        """
        # An import at the top of the module would count as memory of each cell.
        from toolchain import passes
        from toolchain.exits.use import find_exits

        rows = [self._ids[i] for i in sentences]
        graph = passes.read(self._folder / "model.onnx")
        return {"exits": find_exits(graph, rows, self._encoder, self._place.threads)}

    def _pad_batch(self, batch: list[int], fixed: bool = False) -> dict[str, np.ndarray]:
        rows = [self._ids[i] for i in batch]
        width = fixed_width(max(map(len, rows)), self._encoder.max_length) if fixed else 0
        return pad(rows, self._encoder.names, self._encoder.pad_id, width=width)

    def _encode_batch(self, batch: list[int]) -> dict[str, np.ndarray]:
        ids = self._encoder.encode([self._texts[i] for i in batch])
        return pad(ids, self._encoder.names, self._encoder.pad_id)

    def _check_and_decode(self, outputs: list[np.ndarray], batches: list[list[int]]) -> dict[str, Any]:
        """Returns answers and probabilities for each batch's logits; raises `BenchError` if a logit is not finite.

        In token classification, there are no probabilities.
        """
        import numpy as np

        task = self._encoder.task
        result: dict[str, Any] = {"answers": [], "probabilities": []}
        for logits, batch in zip(outputs, batches, strict=True):
            rows = [self._ids[i] for i in batch]
            # A token classifier may return any logits for padding.
            used = [row[: len(ids)] for row, ids in zip(logits, rows, strict=True)] if task == TOKENS else [logits]
            if not all(np.isfinite(part).all() for part in used):
                raise errors.BenchError(
                    "The model returned a logit that is not finite.",
                    "`toolchain validate` shows for which inputs a logit is not finite.",
                )
            result["answers"].append(labels.answers(logits, task, rows))
            chances = np.empty((len(rows), 0)) if task == TOKENS else labels.label_probabilities(logits, task)
            result["probabilities"].append([[int(p) for p in row] for row in np.rint(chances * PROBABILITY)])
        return result

    @contextlib.contextmanager
    def _metering(self) -> Iterator[None]:
        """Adds the duration of this context to `_metering_s`, the seconds that this process spends on measuring memory.

        The parent process subtracts these seconds from the duration of the cold start.
        """
        started = time.perf_counter()
        yield
        self._metering_s += time.perf_counter() - started

    def _unique_bytes(self) -> int:
        """Returns the unique set size in bytes: the memory that the system would free if this process ended."""
        with self._metering():
            import psutil

            return int(psutil.Process().memory_full_info().uss)

    def memory(self) -> dict[str, Any]:
        """Returns the unique set size in bytes, after a collection of Python's garbage."""
        gc.collect()
        return {"bytes": self._unique_bytes()}

    def peak(self) -> dict[str, Any]:
        """Returns the peak host memory in bytes and, on a GPU, the GPU memory after loading and the GPU peak.

        The peak of host memory covers the time after loading if the system can reset the peak, and otherwise the whole
        life of the process.
        """
        result: dict[str, Any] = {"peak": _peak_bytes()}
        if self._gpu:
            self._gpu.read()
            result["gpu"] = {"load": self._gpu_load, "peak": self._gpu.peak, "method": self._gpu.method}
            allocated = gpu_memory.allocator_peak(self._place.device_id)
            if allocated is not None:
                result["gpu"]["allocator_peak"] = allocated
        return result


def _import_module(module: str) -> None:
    """Imports a module; raises `ProviderError` if it is not installed or does not work on this machine."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise errors.ProviderError(
            f"{module} cannot be imported: {error}.", "`toolchain doctor` lists the packages to install."
        ) from error


def _elapsed_us(started_ns: int) -> int:
    """Returns the whole microseconds since `started_ns`, at least 1."""
    return max(1, round((time.perf_counter_ns() - started_ns) / 1000))


if __name__ == "__main__":
    serve(_Child)
