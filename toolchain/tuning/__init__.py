"""Search for the fastest or the smallest artifact that keeps the accuracy, by building and measuring on this machine.

The search avoids costly work. It does not build a candidate that earlier results prove worse. It measures a candidate
before training it, since training changes neither speed nor size. It does not train a candidate that cannot win. All
choices are made on held-out rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.steps import Recover
from toolchain.artifacts.store import Artifact
from toolchain.bench.cells import Cell
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import Protocol
from toolchain.build.pipeline import STEPS, ensure, without_fresh
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import BenchError, CheckpointError, PruningError, VerdictError
from toolchain.models import checkpoints
from toolchain.passes.model_shape import layers_in
from toolchain.progress import Bar, Say
from toolchain.results import statistics
from toolchain.results.measurements import Measurement, Samples
from toolchain.system import hardware
from toolchain.tuning.candidates import Candidate, Training, as_baseline, every, next_start
from toolchain.tuning.study import Outcome, Study, opened

if TYPE_CHECKING:
    from optuna.trial import Trial

EXACT, BASELINE = "onnx-fp32", "onnx-int8"
PROTOCOL = Protocol(passes=1, min_s=3.0, pass_s=20.0, starts=4, threads=1)  # a single start may be fast by chance
PROPOSALS = 4  # after this many useless proposals of the sampler in a row, the search chooses a candidate itself


@dataclass(frozen=True)
class Request:
    """Goal of a search.

    Attributes:
        objective: One of `candidates.OBJECTIVES`.
        max_drop: Largest allowed accuracy drop, in percentage points.
        budget_s: Time for the search, in seconds.
    """

    objective: str
    max_drop: float
    budget_s: float


def tune(workspace: Workspace, request: Request, say: Say, bar: Bar) -> tuple[Outcome, list[Outcome]]:
    """Searches for the best artifact that keeps the accuracy.

    The search continues from earlier runs with the same objective and allowed drop. A trial that is running at the end
    of the budget still finishes.

    Returns:
        The best outcome that keeps the accuracy, and the Pareto front of all outcomes, earlier runs included.

    Raises:
        VerdictError: No measured candidate keeps the accuracy.
    """
    digest = workspace.train.digest  # reports a missing file before anything is built
    judge = _Judge.of(workspace, say, bar)
    built_by = ".".join(str(version) for _, version in STEPS.values())  # a new version may change the speed
    # Speed-ups over different baselines are not comparable.
    about = (judge.root.id, digest, built_by, judge.baseline.manifest.variant)
    path = workspace.cache / "tune" / f"{workspace.model}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = "another run is tuning this model, waiting"
    with opened(path, request.objective, request.max_drop, about, lambda: say(waiting)) as study:
        study.trained |= judge.trained(every(request.objective))
        same = as_baseline(request.objective)
        if judge.baseline.manifest.variant != BASELINE and same not in study.given_up:
            study.give_up(study.begin(same), same, refused=True)
        if study.outcomes:
            say(f"going on from {len(study.outcomes)} trials of earlier runs")
        search(study, judge.outcome, time.monotonic() + request.budget_s, say)
        if study.best is None:
            raise _no_candidate(study)
        return study.best, study.front


def _no_candidate(study: Study) -> VerdictError:
    """Returns the error if no candidate keeps the accuracy, with the smallest drop and the failed validations."""
    least = min(study.outcomes.values(), key=lambda outcome: outcome.drop, default=None)
    tried = len(study.outcomes) + len(study.refused)
    cause = [f"Nothing of {tried} candidates loses at most {study.max_drop:g} points"]
    cause += [f"the least any lost was {least.drop:.2f}, {least.variant}"] if least else []
    cause += [f"{len(study.refused)} failed validation"] if study.refused else []
    hint = ["Allow a larger --max-drop or --budget; the same command goes on from here."]
    if study.refused:
        hint.append("Of a model trained longer or on more rows, fewer fail validation.")
    return VerdictError(f"{'; '.join(cause)}.", " ".join(hint))


Measure = Callable[[Candidate], Outcome]


def search(study: Study, measure: Measure, deadline: float, say: Say) -> None:
    """Runs trials until `deadline`, or until no remaining candidate can be better.

    Args:
        study: The trials so far, which the function extends.
        measure: Builds and measures a candidate.
        deadline: End of the search, as a value of `time.monotonic`.
        say: Called with each message to the user.
    """
    idle = 0
    while time.monotonic() < deadline:
        rest = study.rest
        if not rest:
            say("nothing is left that could be better")
            return
        fitting = _in_time(study, rest, deadline - time.monotonic())
        if not fitting:
            say("no time is left to train what could be better; the same command goes on")
            return
        # One training takes as long as many quantisations, so finished trainings are quantised again first.
        start = study.paid_for(fitting) or _start(study, rest)
        if start in rest and start not in fitting:
            start = study.at_hand(fitting)
        trial, candidate = study.ask(fitting[0] if idle >= PROPOSALS else start)
        if candidate not in fitting:
            # A proposal stays possible: its untrained result may later show whether training is worth the time.
            study.give_up(trial, candidate, for_good=candidate == start)
            idle += 1
            continue
        idle = 0
        say(f"trial {trial.number}: {candidate}")
        try:
            _tried(study, measure, trial, candidate, say)
        except (CheckpointError, PruningError, VerdictError) as error:  # not possible for this model, or failed
            say(f"given up: {error.cause}")
            study.give_up(trial, candidate, refused=isinstance(error, VerdictError))
            if isinstance(error, PruningError):  # more pruning is not possible either
                study.given_up |= {each for each in rest if each.cut_as_far_as(candidate)}


def _start(study: Study, rest: Sequence[Candidate]) -> Candidate | None:
    """Returns the next candidate of `next_start`, or one with its training that may still keep the accuracy."""
    start = next_start(study.objective, study.over, study.given_up, study.max_drop)
    if start is None or start in rest:
        return start
    alike = [each for each in rest if each.training == start.training]
    return min(alike, key=lambda each: each.keep_fp32, default=start)


def _in_time(study: Study, candidates: Sequence[Candidate], left_s: float) -> list[Candidate]:
    """Returns the candidates whose training exists, or ends within `left_s` seconds at the slowest speed so far."""
    spent = [outcome.training_s / each.epochs for each, outcome in study.outcomes.items() if outcome.training_s]
    there = study.trained | {each.training for each in study.outcomes}
    return [each for each in candidates if not spent or each.training in there or max(spent) * each.epochs <= left_s]


def _tried(study: Study, measure: Measure, trial: Trial, candidate: Candidate, say: Say) -> None:
    """Measures the candidate without training first, and then with training if it can win."""
    plain = candidate.untrained
    if plain not in study.outcomes and plain not in study.given_up:
        first = trial if plain == candidate else study.begin(plain)
        try:
            _measured(study, measure, first, plain, say)
        except VerdictError as error:
            say(f"given up: {error.cause}")
            study.give_up(first, plain, refused=True)  # training may widen its margins enough to pass
    if plain == candidate:
        return
    if plain in study.settled:
        say("not trained: that makes nothing better")
        study.give_up(trial, candidate)
        return
    _measured(study, measure, trial, candidate, say)


def _measured(study: Study, measure: Measure, trial: Trial, candidate: Candidate, say: Say) -> None:
    outcome = measure(candidate)
    study.tell(trial, candidate, outcome)
    say(f"{sentence(outcome)}{'; the best so far' if outcome == study.best else ''}")


def sentence(outcome: Outcome) -> str:
    """Returns a one-line summary of an outcome."""
    return (
        f"{outcome.variant}: {outcome.drop:+.2f} points lost, {outcome.latency:.2f} × as fast as {outcome.baseline}, "
        f"{outcome.throughput:.2f} × in batches, {outcome.size / 1e6:.1f} MB"
    )


@dataclass(frozen=True)
class _Judge:
    """Builds candidates and measures each next to the baseline, on held-out rows.

    The baseline is `onnx-int8`, or `onnx-fp32` if `onnx-int8` failed validation.
    """

    workspace: Workspace
    root: Manifest
    layers: int
    held: Data
    encoder: Encoder
    baseline: Artifact
    exact: float
    say: Say
    bar: Bar

    @classmethod
    def of(cls, workspace: Workspace, say: Say, bar: Bar) -> _Judge:
        """Builds the baseline and measures the accuracy of `onnx-fp32`.

        Raises:
            DataError: The training data do not fit the model.
        """
        built = ensure(workspace, [EXACT], {}, say, bar)
        root, baseline = built[checkpoints.ROOT_VARIANT], built[EXACT]
        manifest = root.manifest
        data = workspace.train.load(root.label_set)
        _, rows = inputs.hold_out(data)
        held = data.only(rows)
        names = [spec.name for spec in manifest.inputs]
        encoder = Encoder.open(workspace.path(checkpoints.ROOT_VARIANT), names, manifest.max_length)
        layers = layers_in(workspace.path(checkpoints.ROOT_VARIANT))
        try:
            baseline = ensure(workspace, [BASELINE], {}, without_fresh(say), bar)[BASELINE]
        except VerdictError as error:
            say(f"{error.cause} The search goes on without it; speed-ups refer to {EXACT}.")
        judge = cls(workspace, manifest, layers, held, encoder, baseline, 0.0, say, bar)
        return replace(judge, exact=_accuracy(judge._measured([built[EXACT]])[0]))

    def outcome(self, candidate: Candidate) -> Outcome:
        """Builds the missing variants of the candidate and measures it."""
        chain = candidate.chain(self.layers)
        name = list(chain)[-1]
        artifact = ensure(self.workspace, [name], chain, without_fresh(self.say), self.bar)[name]
        beside, row = self._measured([self.baseline, artifact])
        trained = self._trained(candidate)
        return Outcome(
            variant=name,
            artifact_id=artifact.manifest.id,
            drop=round(100 * (self.exact - _accuracy(row)), 2),
            latency=_times(beside.latency, row.latency),
            throughput=_times(beside.batches, row.batches),
            size=artifact.manifest.size_bytes,
            training_s=trained.manifest.facts["recovery"]["seconds"] if trained else 0.0,
            baseline=self.baseline.manifest.variant,
        )

    def trained(self, candidates: Iterable[Candidate]) -> set[Training]:
        """Returns the trainings of these candidates that an earlier run has finished."""
        one_of_each = {each.training: each for each in candidates if each.epochs}
        return {training for training, each in one_of_each.items() if self._trained(each)}

    def _trained(self, candidate: Candidate) -> Artifact | None:
        steps = candidate.chain(self.layers).items()
        name = next((name for name, step in steps if isinstance(step, Recover)), None)
        return self.workspace.load(name) if name else None

    def _measured(self, artifacts: list[Artifact]) -> list[Measurement]:
        cells = [
            Cell(
                self.workspace.model,
                artifact.manifest.variant,
                artifact.manifest.variant.parts.runtime,
                "cpu",
                artifact,
            ).with_own_encoder(self.root)
            for artifact in artifacts
        ]
        protocol = replace(PROTOCOL, threads=hardware.cores())
        with self.bar("tune") as progress:
            rows, _ = bench(cells, self.held, self.encoder, protocol, progress)
        for row in rows:
            if row.status != "ok":
                raise BenchError(f"{row.cell} could not be measured: {row.reason}", row.mend)
        return rows


def _accuracy(row: Measurement) -> float:
    assert row.accuracy is not None  # the benchmark runs every held-out row
    return row.accuracy.value


def _times(slower: Samples | None, faster: Samples | None) -> float:
    assert slower is not None  # the benchmark measured every cell
    assert faster is not None
    return round(statistics.ratio(slower.spent_each(), faster.spent_each()).value, 4)
