"""Measures where the time of single texts goes: tokenising, each kind of operator, and the work around operators.

The profiler of ONNX Runtime measures the operators. The work around operators is the time of `Session.run` minus the
time of all operators, for example that of `If` nodes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts.store import Artifact
from toolchain.artifacts.variants import get
from toolchain.backends import ort
from toolchain.data.encoding import Encoder, pad
from toolchain.errors import GraphError, SettingsError

if TYPE_CHECKING:
    import onnxruntime

    from toolchain.data.files import Text

TOKENIZING, AROUND, TOTAL = "tokenising", "around operators", "total"
OTHER_PARTS = "all other parts"
SMALLEST_SHARE = 0.03  # smallest share of the time with which a part has a line of its own
THREADS = 1


class OperatorProfiler:
    """Measures the parts of an ONNX variant's time on the CPU, with one thread.

    Args:
        artifact: The artifact of the variant.
        scratch: Folder for the files of the profiler.

    Raises:
        SettingsError: ONNX Runtime does not run the variant on the CPU.
        GraphError: ONNX Runtime cannot load the graph.
    """

    def __init__(self, artifact: Artifact, scratch: Path) -> None:
        require_profilable(artifact.manifest.variant)
        manifest = artifact.manifest
        self._encoder = Encoder.open(artifact.path, [spec.name for spec in manifest.inputs], manifest.max_length)
        self._artifact, self._scratch = artifact, scratch
        self._session = self._open(profiling=False)

    def measure(self, texts: Sequence[Text]) -> dict[str, float]:
        """Returns the mean microseconds of a text in each part of the work, and in `TOTAL`; runs each text alone."""
        batches = self._batches(texts)
        tokenizing = _mean_us(lambda: self._batches(texts), len(texts))
        running = _mean_us(lambda: [self._session.run(None, batch) for batch in batches], len(texts))
        operators = {operator: us / len(texts) for operator, us in self._profile(batches).items()}
        around = running - sum(operators.values())
        return {TOTAL: tokenizing + running, TOKENIZING: tokenizing, AROUND: around, **operators}

    def _open(self, *, profiling: bool) -> onnxruntime.InferenceSession:
        import onnxruntime

        path, options = self._artifact.onnx_path, ort.session_options(THREADS)
        if profiling:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._scratch / "profile")
        model = ort.exact_model(path, exact=True)
        try:
            return onnxruntime.InferenceSession(model, options, providers=[ort.PROVIDERS["cpu"]])
        except ort.failures() as error:
            raise GraphError(
                f"ONNX Runtime cannot load {path}: {ort.describe(error)}.", "Build the variant again."
            ) from error

    def _batches(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """Tokenises each text, and returns the inputs of the graph for each text alone."""
        return [
            pad([ids], self._encoder.names, self._encoder.pad_id)
            for text in texts
            for ids in self._encoder.encode([text])
        ]

    def _profile(self, batches: Sequence[dict[str, Any]]) -> dict[str, int]:
        session = self._open(profiling=True)
        for batch in batches:
            session.run(None, batch)
        file = Path(session.end_profiling())
        events = json.loads(file.read_text())
        file.unlink()
        return operator_times(events)


def require_profilable(name: str) -> None:
    """Requires that ONNX Runtime runs the variant on the CPU.

    Raises:
        SettingsError: Another runtime runs the variant, or it runs on another execution provider.
    """
    variant = get(name)
    if variant.runtime != "onnx" or "cpu" not in variant.providers:
        place = "PyTorch" if variant.runtime != "onnx" else " and ".join(variant.providers)
        raise SettingsError(
            f"--profile measures ONNX variants on the CPU, but {name} runs on {place}.",
            "Name a variant such as onnx-int8, or leave --profile out.",
        )


def operator_times(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the microseconds of each kind of operator.

    An `If` node has no line of its own: its time contains the time of the nodes in its branch, which have events of
    their own.

    Args:
        events: Events in the file that the profiler of ONNX Runtime writes.
    """
    times: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            if operator != "If":
                times[operator] += event["dur"]
    return dict(times)


def _mean_us(call: Callable[[], object], count: int) -> float:
    """Returns the microseconds of a call, divided by `count`."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6 / count


def median_parts(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the median over the rounds of each part of the work."""
    return {name: round(statistics.median(each.get(name, 0.0) for each in rounds), 1) for name in rounds[0]}


def largest_parts(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    """Returns the large parts and their microseconds, largest first, and last the sum of all other parts.

    Args:
        parts: Microseconds of each part, from `median_parts`.
    """
    ordered = sorted(((us, part) for part, us in parts.items() if part != TOTAL), reverse=True)
    shown = [(part, us) for us, part in ordered if us >= SMALLEST_SHARE * parts[TOTAL]]
    return [*shown, (OTHER_PARTS, parts[TOTAL] - sum(us for _, us in shown))]
