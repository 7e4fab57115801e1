"""Measures where the time of single texts goes: tokenising, the graph, and each kind of operator of the graph.

The profiler of ONNX Runtime measures the operators. The profiler itself takes time for each node, so the operators of a
profile take longer than the graph without the profiler, and only their shares count.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

OTHERS = "all other operators"
SMALLEST_SHARE = 0.03  # smallest share of the operators' time with which an operator has a line of its own
THREADS = 1


@dataclass(frozen=True)
class Profile:
    """The mean time of a text in the parts of the work.

    Attributes:
        tokenizing_us: Microseconds of tokenising.
        graph_us: Microseconds of the graph, without the profiler.
        operators_us: Microseconds of each kind of operator, with the profiler.
    """

    tokenizing_us: float
    graph_us: float
    operators_us: Mapping[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Returns the share of each kind of operator in the time of all operators, the largest first."""
        total = sum(self.operators_us.values())
        return {name: us / total for name, us in sorted(self.operators_us.items(), key=lambda item: -item[1])}


class OperatorProfiler:
    """Measures the time of an ONNX variant on the CPU, with one thread.

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

    def measure(self, texts: Sequence[Text]) -> Profile:
        """Returns the mean time of a text; runs each text alone."""
        batches = self._batches(texts)
        tokenizing = _mean_us(lambda: self._batches(texts), len(texts))
        running = _mean_us(lambda: [self._session.run(None, batch) for batch in batches], len(texts))
        operators = {operator: us / len(texts) for operator, us in self._profile(batches).items()}
        return Profile(tokenizing, running, operators)

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


def median_profile(rounds: Sequence[Profile]) -> Profile:
    """Returns the median over the rounds of each part of the work; an operator that a round lacks took no time."""
    names = sorted({name for each in rounds for name in each.operators_us})
    return Profile(
        round(statistics.median(each.tokenizing_us for each in rounds), 1),
        round(statistics.median(each.graph_us for each in rounds), 1),
        {name: round(statistics.median(each.operators_us.get(name, 0.0) for each in rounds), 1) for name in names},
    )


def largest_shares(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    """Returns the operators with large shares, largest first, and last the sum of all other shares."""
    shown = [(name, share) for name, share in shares.items() if share >= SMALLEST_SHARE]
    return [*shown, (OTHERS, 1 - sum(share for _, share in shown))]
