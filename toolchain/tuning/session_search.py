"""The search of `tune --session`: the best settings of ONNX Runtime for one artifact on this machine.

The search has two parts. First, it *screens*: it compares each alternative, which changes one setting, with the default
settings in a few short rounds. Then it *confirms*: for each objective, it combines the alternatives that looked better,
and compares the combination with the default settings on other sentences, in new processes. Only the second comparison
decides. So it does not matter that the best of many alternatives looks better than it is.
"""

from __future__ import annotations

import datetime
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import toolchain
from toolchain.artifacts import variants
from toolchain.artifacts.store import Artifact
from toolchain.bench import run
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import BenchError, DataError
from toolchain.progress import Bar, Progress, Say
from toolchain.results.session_file import (
    LATENCY,
    MEMORY,
    OBJECTIVES,
    THROUGHPUT,
    Choice,
    Screened,
    SessionData,
    SessionFile,
)
from toolchain.results.session_settings import FIXED, AppSettings
from toolchain.results.statistics import FEWEST_ROUNDS, Ratio, ratio
from toolchain.system import hardware
from toolchain.tuning.session_measuring import BATCH_SIZE, Figures, Meter, bytes_needed

FEWEST_SENTENCES = 20
SCREEN_SHARE = 0.6  # share of the time budget after which the screening of further alternatives ends
# The screening weighs one process for each settings, so memory has no interval there. A smaller gain is not worth a
# comparison.
SCREEN_MEMORY = 1.01
MOST_PROCESSES = 8  # largest number of alternatives that run beside each other; idle processes use only memory
BATCH_SIZES = (8, 16, 64, 128)


@dataclass(frozen=True)
class Plan:
    """The extent of a search.

    Attributes:
        budget_s: Time for the search, in seconds.
        screen_rounds: Number of rounds in which an alternative is screened.
        confirm_rounds: Number of rounds in which a combination is confirmed; each round starts new processes.
        turn_s: Largest value of the minimum seconds of a turn.
    """

    budget_s: float
    screen_rounds: int = FEWEST_ROUNDS
    confirm_rounds: int = 2 * FEWEST_ROUNDS
    turn_s: float = 1.0

    def turn_seconds(self, alternatives: int) -> float:
        """Returns the minimum seconds of a turn, with which the turns take less than half of the time budget."""
        turns = 2 * (self.screen_rounds * (alternatives + 1) + self.confirm_rounds * (len(OBJECTIVES) + 1))
        return min(self.turn_s, 0.5 * self.budget_s / turns)


@dataclass(frozen=True)
class Alternative:
    """Settings that change one factor of the default settings.

    Attributes:
        factor: Name of the factor, a field of `AppSettings` or `SessionSettings`.
        settings: The settings.
        objectives: The objectives that the factor concerns.
    """

    factor: str
    settings: AppSettings
    objectives: tuple[str, ...] = OBJECTIVES


def default_settings(cores: int) -> dict[str, AppSettings]:
    """Returns the default settings for each objective; only those for throughput state how batches are formed."""
    settings = AppSettings(cores)
    return {LATENCY: settings, THROUGHPUT: replace(settings, batch_size=BATCH_SIZE), MEMORY: settings}


def list_alternatives(cores: int) -> list[Alternative]:
    """Returns the alternatives to the default settings.

    Args:
        cores: Number of cores that this process may use. With a single core, no setting of threads can help.
    """
    default = AppSettings(cores)

    def change(factor: str, **fields: Any) -> Alternative:
        return Alternative(factor, replace(default, session=replace(default.session, **fields)))

    counts = sorted({1 << power for power in range(cores.bit_length())} | {3}) if cores > 1 else []
    alternatives = [Alternative("threads", replace(default, threads=n)) for n in counts if n < cores]
    if cores > 1:
        alternatives.append(change("spinning", spinning=False))
        alternatives.append(change("execution_mode", execution_mode="parallel", inter_op_threads=2))
    alternatives += [change("graph_optimization", graph_optimization=level) for level in ("extended", "basic")]
    alternatives += [change("memory_arena", memory_arena=False), change("memory_pattern", memory_pattern=False)]
    batched = default_settings(cores)[THROUGHPUT]
    alternatives += [
        Alternative("batch_size", replace(batched, batch_size=size), (THROUGHPUT,)) for size in BATCH_SIZES
    ]
    return [*alternatives, Alternative("padding", replace(batched, padding=FIXED), (THROUGHPUT,))]


def tune_session(workspace: Workspace, request: run.Request, plan: Plan, say: Say, bar: Bar) -> SessionFile:
    """Searches for the best settings of ONNX Runtime for one variant on this machine.

    Args:
        workspace: The workspace of the model.
        request: The variant, and the data whose sentences the search runs.
        plan: The extent of the search.
        say: Called with each message to the user.
        bar: Makes a progress bar.

    Raises:
        BenchError: The variant does not run on ONNX Runtime on the CPU, or cannot be measured with default settings.
        DataError: The data cannot be used, or has too few sentences.
    """
    (name,) = request.names
    run.planned_pairs([name], ["cpu"])  # raises the error for a variant that does not run on the CPU
    if variants.get(name).runtime != "onnx":
        raise BenchError(f"{name} does not run on ONNX Runtime.", "Name an ONNX variant such as onnx-int8.")
    root, data = run.evaluation_data(workspace, request, say)
    if len(data.texts) < FEWEST_SENTENCES:
        raise DataError(
            f"The data has {len(data.texts)} rows; the search needs at least {FEWEST_SENTENCES}.",
            "Pass a file with more rows as --data.",
        )
    artifact = ensure(workspace, [name], {}, say, bar)[name]
    names = [spec.name for spec in root.inputs]
    encoder = Encoder.open(artifact.path, names, root.max_length)
    order = random.Random(0).sample(range(len(data.texts)), len(data.texts))
    with bar("session") as progress:
        search = _Search(artifact, Meter(artifact, encoder, data, say), order, plan, say, progress)
        screened = search.screen()
        choices = search.confirm(screened)
    return _make_file(workspace.model, artifact, data, screened, choices)


def _make_file(
    model: str, artifact: Artifact, data: Data, screened: Sequence[Screened], choices: Mapping[str, Choice]
) -> SessionFile:
    return SessionFile(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        toolchain=toolchain.__version__,
        machine=hardware.machine(),
        model=model,
        variant=artifact.manifest.variant,
        artifact_id=artifact.manifest.id,
        data=SessionData(data.name, data.sha256, len(data.texts)),
        latency=choices[LATENCY],
        throughput=choices[THROUGHPUT],
        memory=choices[MEMORY],
        screened=tuple(screened),
    )


class _Search:
    """One search: the two parts use disjoint halves of the sentences."""

    def __init__(
        self, artifact: Artifact, meter: Meter, order: Sequence[int], plan: Plan, say: Say, progress: Progress
    ) -> None:
        self._meter, self._plan, self._say, self._progress = meter, plan, say, progress
        self._screen_sentences, self._confirm_sentences = order[::2], order[1::2]
        cores = hardware.cores()
        self._defaults = default_settings(cores)
        self._alternatives = list_alternatives(cores)
        self._at_once = _processes_that_fit(artifact)
        self._turn_s = plan.turn_seconds(len(self._alternatives))
        self._deadline = time.monotonic() + plan.budget_s
        self._screen_deadline = time.monotonic() + SCREEN_SHARE * plan.budget_s
        self._rng = random.Random(1)

    def screen(self) -> list[Screened]:
        """Compares each alternative with the default settings; the time budget may end the screening early."""
        screened: list[Screened] = []
        total = len(self._alternatives)
        for start in range(0, total, self._at_once):
            if time.monotonic() > self._screen_deadline:
                self._say(f"the time budget ended the screening after {start} of {total} alternatives")
                break
            self._progress(start, total, "screening")
            group = self._alternatives[start : start + self._at_once]
            needs = self._default_needs({name for each in group for name in each.objectives})
            needs |= {each.settings: set(each.objectives) for each in group}
            figures = self._meter.measure(
                needs, self._screen_sentences, self._plan.screen_rounds, self._turn_s, self._rng
            )
            screened += self._compare_with_default(group, figures)
        return screened

    def _default_needs(self, objectives: set[str]) -> dict[AppSettings, set[str]]:
        needs: dict[AppSettings, set[str]] = {}
        for objective in sorted(objectives):
            needs.setdefault(self._defaults[objective], set()).add(objective)
        return needs

    def _compare_with_default(
        self, group: Sequence[Alternative], figures: Mapping[AppSettings, Figures]
    ) -> Iterator[Screened]:
        for each in group:
            for objective in each.objectives:
                if each.settings in figures:
                    default = self._default_values(figures, objective)
                    compared = ratio(default, figures[each.settings].values[objective])
                    yield Screened(each.factor, objective, each.settings, Ratio(**compared.to_json()))

    def _default_values(self, figures: Mapping[AppSettings, Figures], objective: str) -> list[float]:
        if self._defaults[objective] not in figures:
            raise BenchError(
                "The artifact cannot be measured with default settings.", "`toolchain bench` shows whether it runs."
            )
        return figures[self._defaults[objective]].values[objective]

    def confirm(self, screened: Sequence[Screened]) -> dict[str, Choice]:
        """Compares the best combination for each objective with the default settings, and returns the choices."""
        tried = {name: combine(self._defaults[name], name, screened) for name in OBJECTIVES}
        tried = {name: settings for name, settings in tried.items() if settings != self._defaults[name]}
        values: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in tried}
        needs = self._default_needs(set(tried))
        for objective, settings in tried.items():
            needs.setdefault(settings, set()).add(objective)
        for turn in range(self._plan.confirm_rounds if tried else 0):
            if time.monotonic() > self._deadline:
                self._say(f"the time budget ended the comparison after {turn} of {self._plan.confirm_rounds} rounds")
                break
            self._progress(turn, self._plan.confirm_rounds, "comparing the best settings with the default settings")
            start = turn * len(self._confirm_sentences) // self._plan.confirm_rounds
            sentences = [*self._confirm_sentences[start:], *self._confirm_sentences[:start]]
            figures = self._meter.measure(needs, sentences, 1, 2 * self._turn_s, self._rng)
            for objective, settings in tried.items():
                if settings in figures:
                    values[objective][0].extend(self._default_values(figures, objective))
                    values[objective][1].extend(figures[settings].values[objective])
        return {name: self._choose(name, tried.get(name), values.get(name, ([], []))) for name in OBJECTIVES}

    def _choose(
        self, objective: str, tried: AppSettings | None, values: tuple[Sequence[float], Sequence[float]]
    ) -> Choice:
        default = self._defaults[objective]
        if tried is None or not values[0]:
            return Choice(default, default)
        return Choice.from_comparison(default, tried, ratio(*values))


def combine(default: AppSettings, objective: str, screened: Sequence[Screened]) -> AppSettings:
    """Returns the default settings with the best alternative of each factor that looked better in the screening.

    Args:
        default: The default settings for the objective.
        objective: One of `OBJECTIVES`.
        screened: All alternatives.
    """
    best: dict[str, Screened] = {}
    for each in screened:
        if each.objective == objective and _looks_better(each):
            rival = best.get(each.factor)
            best[each.factor] = each if rival is None or each.ratio.value > rival.ratio.value else rival
    settings = default
    for factor, each in best.items():
        if factor in ("threads", "batch_size", "padding"):
            settings = replace(settings, **{factor: getattr(each.settings, factor)})
            continue
        fields = {factor: getattr(each.settings.session, factor)}
        if factor == "execution_mode":
            fields["inter_op_threads"] = each.settings.session.inter_op_threads
        settings = replace(settings, session=replace(settings.session, **fields))
    if settings.threads == 1 and settings.session.execution_mode == default.session.execution_mode:
        # A single thread never waits for others, so spinning cannot act.
        settings = replace(settings, session=replace(settings.session, spinning=default.session.spinning))
    return settings


def _looks_better(each: Screened) -> bool:
    """Returns whether an alternative is worth a comparison; the screening alone decides nothing."""
    if each.objective == MEMORY:
        return each.ratio.value >= SCREEN_MEMORY
    return each.ratio.low is not None and each.ratio.low > 1


def _processes_that_fit(artifact: Artifact) -> int:
    """Returns the number of alternatives that may run beside the default settings, at least 1."""
    import psutil

    fitting = psutil.virtual_memory().available // bytes_needed(artifact) - 1
    return max(1, min(MOST_PROCESSES, int(fitting)))
