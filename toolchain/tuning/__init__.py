"""Searches for the fastest or smallest artifact within an allowed accuracy drop; builds and measures candidates.

The search avoids unnecessary builds and trainings. The search does not build a candidate if earlier results prove that
another candidate is better. The search measures a candidate before training, since training changes neither speed nor
size. The search does not train a candidate that cannot become the best. All choices are made on held-out rows. An
artifact *keeps the accuracy* if its accuracy drop is within the limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from toolchain.artifacts.manifest import Manifest
from toolchain.artifacts.names import VariantName
from toolchain.artifacts.steps import EXITS_WEIGHT, Exits, Recover, Step
from toolchain.artifacts.store import Artifact
from toolchain.artifacts.variants import derive_variant
from toolchain.bench.cells import Cell
from toolchain.bench.runner import bench
from toolchain.bench.scenarios import Protocol
from toolchain.build.pipeline import STEPS, ensure, skip_fresh_events
from toolchain.build.workspace import Workspace
from toolchain.data import inputs
from toolchain.data.encoding import Encoder
from toolchain.data.inputs import Data
from toolchain.errors import BenchError, CheckpointError, DataError, GraphError, PruningError, VerdictError
from toolchain.exits.choice import CONFIDENT_TASKS
from toolchain.models import checkpoints
from toolchain.passes.model_shape import layers_in
from toolchain.progress import Bar, Say
from toolchain.results import statistics
from toolchain.results.measurements import Measurement, Samples
from toolchain.system import hardware
from toolchain.tuning.candidates import LABEL, Candidate, Training, all_candidates, baseline_candidate, next_start
from toolchain.tuning.study import Outcome, Study, open_study

if TYPE_CHECKING:
    from optuna.trial import Trial

EXACT, BASELINE = "onnx-fp32", "onnx-int8"
# The benchmark starts several processes for each cell, since a single process may be fast by chance.
PROTOCOL = Protocol(passes=1, min_s=3.0, pass_s=20.0, starts=4, threads=1)
EXITS_DROP_STEP = 0.05  # The accuracy drop that exits may cost is a multiple of this number of percentage points.
PROPOSALS = 4  # After this many unusable proposals by the sampler in a row, the search itself chooses a candidate.


@dataclass(frozen=True)
class Request:
    """Goal of a search.

    Attributes:
        objective: Objective of the search, one of `candidates.OBJECTIVES`.
        max_drop: Largest allowed accuracy drop, in percentage points.
        budget_s: Time for the search, in seconds.
    """

    objective: str
    max_drop: float
    budget_s: float


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        best: The best measured candidate within the allowed accuracy drop.
        front: The Pareto front of all measured candidates, including those of earlier runs.
        spent_s: Seconds that this run spent on ``training``, on ``building`` (everything else that makes artifacts) and
            on ``measuring``.
    """

    best: Outcome
    front: list[Outcome]
    spent_s: dict[str, float]


def tune(workspace: Workspace, request: Request, say: Say, bar: Bar) -> Found:
    """Searches for the best artifact within the allowed accuracy drop.

    The search continues from earlier runs with the same objective and the same allowed accuracy drop. A trial that is
    running at the end of the time budget still finishes.

    Raises:
        VerdictError: No measured candidate is within the allowed accuracy drop.
    """
    # `digest` reads the training file, so `tune` reports a missing training file before it builds anything.
    digest = workspace.train.digest
    judge = _Judge.open(workspace, request, say, bar)
    # The identity of a search contains the versions of all steps, because a new version of a step may change the speed
    # of a variant. The identity of a search contains the baseline, because speed-ups over different baselines are not
    # comparable.
    built_by = ".".join(str(version) for _, version in STEPS.values())
    identity = (judge.root.id, digest, built_by, judge.baseline.manifest.variant)
    path = workspace.cache / "tune" / f"{workspace.model}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting_text = "another run is tuning this model; waiting for its end"
    with open_study(path, request.objective, request.max_drop, identity, lambda: say(waiting_text)) as study:
        study.trained |= judge.trained(all_candidates(request.objective))
        candidate = baseline_candidate(request.objective)
        if judge.baseline.manifest.variant != BASELINE and candidate not in study.given_up:
            study.give_up(study.begin(candidate), candidate, refused=True)
        if study.outcomes:
            say(f"continuing from {len(study.outcomes)} trials of earlier runs")
        search(study, judge.outcome, time.monotonic() + request.budget_s, say)
        if study.best is None:
            raise _no_candidate(study)
        return Found(study.best, study.front, {name: round(value, 1) for name, value in judge.spent_s.items()})


def _no_candidate(study: Study) -> VerdictError:
    """Returns the error for a search without a result; it states the smallest accuracy drop."""
    closest = min(study.outcomes.values(), key=lambda outcome: outcome.drop, default=None)
    count = len(study.outcomes) + len(study.refused)
    cause = [f"None of {count} candidates has an accuracy drop of at most {study.max_drop:g} points"]
    cause += [f"the smallest accuracy drop is {closest.drop:.2f}, of {closest.variant}"] if closest else []
    cause += [f"{len(study.refused)} failed validation"] if study.refused else []
    hint = ["Raise --max-drop or --budget; the same command continues the search."]
    if study.refused:
        hint.append("A model that is trained longer or on more rows passes validation more often.")
    return VerdictError(f"{'; '.join(cause)}.", " ".join(hint))


Measure = Callable[[Candidate], Outcome]


def search(study: Study, measure: Measure, deadline: float, say: Say) -> None:
    """Runs trials until `deadline`, or until no remaining candidate can be better than the measured candidates.

    Args:
        study: The trials of the search so far; the function adds new trials.
        measure: Function that builds and measures a candidate.
        deadline: End of the search, as a value of `time.monotonic`.
        say: Called with each message to the user.
    """
    idle = 0
    while time.monotonic() < deadline:
        remaining = study.remaining
        if not remaining:
            say("finished: no remaining candidate can be better than the measured candidates")
            return
        in_time = _fit_in_time(study, remaining, deadline - time.monotonic())
        if not in_time:
            say("no time is left for another training; the same command continues the search")
            return
        # One training takes as long as many quantisations, so the search first tries more quantisations of models that
        # are already trained.
        start = study.nearest_trained(in_time) or _choose_start(study, remaining)
        if start in remaining and start not in in_time:
            start = study.most_pruned_trained(in_time)
        trial, candidate = study.ask(in_time[0] if idle >= PROPOSALS else start)
        if candidate not in in_time:
            # If the search itself chose the candidate, the search never tries the candidate again. If the sampler
            # proposed the candidate, a later trial may measure the candidate. For example, a later trial may measure an
            # untrained candidate to decide whether training is worthwhile.
            study.give_up(trial, candidate, for_good=candidate == start)
            idle += 1
            continue
        idle = 0
        say(f"trial {trial.number}: {candidate}")
        try:
            _run_trial(study, measure, trial, candidate, say)
        except (CheckpointError, PruningError, VerdictError) as error:
            # The candidate cannot be built from this model, or failed validation.
            say(f"given up: {error.cause}")
            study.give_up(trial, candidate, refused=isinstance(error, VerdictError))
            if isinstance(error, PruningError):  # if pruning fails at one ratio, it fails at every higher ratio too
                study.given_up |= {other for other in remaining if other.prunes_as_much_as(candidate)}


def _choose_start(study: Study, remaining: Sequence[Candidate]) -> Candidate | None:
    """Returns the next candidate in the search for the largest pruning ratio within the allowed accuracy drop.

    The function returns None if this largest pruning ratio is already known. The function `next_start` proposes the
    candidate. If earlier measurements rule out the proposed candidate, the function returns a candidate with the same
    training settings but another quantisation. If no such candidate remains, the function returns the proposed
    candidate.
    """
    start = next_start(study.objective, study.excess_drops, study.given_up, study.max_drop)
    if start is None or start in remaining:
        return start
    candidates = [candidate for candidate in remaining if candidate.training == start.training]
    return min(candidates, key=lambda candidate: candidate.keep_fp32, default=start)


def _fit_in_time(study: Study, candidates: Sequence[Candidate], remaining_s: float) -> list[Candidate]:
    """Returns the candidates whose training is finished, or fits into `remaining_s`.

    The function estimates the duration of a training from the slowest epoch of the measured candidates.
    """
    epoch_seconds = [
        outcome.training_s / candidate.epochs for candidate, outcome in study.outcomes.items() if outcome.training_s
    ]
    finished_trainings = study.trained | {candidate.training for candidate in study.outcomes}
    return [
        candidate
        for candidate in candidates
        if not epoch_seconds
        or candidate.training in finished_trainings
        or max(epoch_seconds) * candidate.epochs <= remaining_s
    ]


def _run_trial(study: Study, measure: Measure, trial: Trial, candidate: Candidate, say: Say) -> None:
    """Measures the candidate first without training, and then with training if it can become the best."""
    untrained = candidate.untrained
    if untrained not in study.outcomes and untrained not in study.given_up:
        untrained_trial = trial if untrained == candidate else study.begin(untrained)
        try:
            _measure_candidate(study, measure, untrained_trial, untrained, say)
        except VerdictError as error:
            say(f"given up: {error.cause}")
            # The untrained candidate failed validation, but the trained candidate may pass.
            study.give_up(untrained_trial, untrained, refused=True)
    if untrained == candidate:
        return
    if untrained in study.candidates_without_training:
        say("not trained: training cannot make this candidate the best")
        study.give_up(trial, candidate)
        return
    _measure_candidate(study, measure, trial, candidate, say)


def _measure_candidate(study: Study, measure: Measure, trial: Trial, candidate: Candidate, say: Say) -> None:
    outcome = measure(candidate)
    study.tell(trial, candidate, outcome)
    best = "; best so far" if outcome == study.best else ""
    say(f"{summary(outcome)}{best}")


def summary(outcome: Outcome) -> str:
    """Returns a one-line summary of the measurements of a candidate."""
    return (
        f"{outcome.variant}: accuracy drop {outcome.drop:.2f} points, speed-up over {outcome.baseline} "
        f"{outcome.latency:.2f}× at batch 1 and {outcome.throughput:.2f}× in batches, size {outcome.size / 1e6:.1f} MB"
    )


@dataclass(frozen=True)
class _Judge:
    """Builds candidates and measures each candidate together with the baseline, on held-out rows.

    The baseline is `onnx-int8`, or `onnx-fp32` if `onnx-int8` failed validation.
    """

    workspace: Workspace
    request: Request
    root: Manifest
    layers: int
    held_out: Data
    encoder: Encoder
    baseline: Artifact
    exact_accuracy: float
    say: Say
    bar: Bar
    spent_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("training", "building", "measuring"), 0.0))

    @classmethod
    def open(cls, workspace: Workspace, request: Request, say: Say, bar: Bar) -> _Judge:
        """Builds the baseline and measures the accuracy of `onnx-fp32`.

        Raises:
            DataError: The training data do not fit the model.
        """
        artifacts = ensure(workspace, [EXACT], {}, say, bar)
        root, baseline = artifacts[checkpoints.ROOT_VARIANT], artifacts[EXACT]
        manifest = root.manifest
        data = workspace.train.load(root.label_set)
        _, held_out_rows = inputs.hold_out(data)
        held_out = data.select(held_out_rows)
        names = [spec.name for spec in manifest.inputs]
        encoder = Encoder.open(workspace.path(checkpoints.ROOT_VARIANT), names, manifest.max_length)
        layers = layers_in(workspace.path(checkpoints.ROOT_VARIANT))
        try:
            baseline = ensure(workspace, [BASELINE], {}, skip_fresh_events(say), bar)[BASELINE]
        except VerdictError as error:
            say(f"{error.cause} The search continues without {BASELINE}; speed-ups refer to {EXACT}.")
        judge = cls(workspace, request, manifest, layers, held_out, encoder, baseline, 0.0, say, bar)
        return replace(judge, exact_accuracy=_accuracy(judge._measure([artifacts[EXACT]])[0]))

    @property
    def _exits_weight(self) -> float | None:
        """Returns the weight of exits in a recovery; None if the predictions of the model have no confidence."""
        return EXITS_WEIGHT if self.baseline.label_set.task in CONFIDENT_TASKS else None

    def outcome(self, candidate: Candidate) -> Outcome:
        """Builds the missing variants of the candidate and measures it, with exits if they make it better."""
        chain = candidate.chain(self.layers, self._exits_weight)
        name = list(chain)[-1]
        outcome = self._measure_variant(name, chain, candidate)
        exits = self._exits(outcome)
        if exits is None:
            return outcome
        label = VariantName(name).parts.label or LABEL
        exits_name = derive_variant(name, exits, f"{label}-drop{exits.max_drop * 100:.0f}").name
        try:
            with_exits = self._measure_variant(exits_name, {**chain, exits_name: exits}, candidate)
        except (DataError, GraphError, VerdictError) as error:
            # The rows are too few, the graph has no place for exits, or no exits save work or pass validation.
            self.say(f"without exits: {error.cause}")
            return outcome
        objective = self.request.objective
        if with_exits.drop > self.request.max_drop or with_exits.cost(objective) >= outcome.cost(objective):
            return outcome
        return replace(with_exits, without_exits=outcome)

    def _exits(self, outcome: Outcome) -> Exits | None:
        """Returns the exits that may lose the rest of the allowed accuracy drop; None if they cannot help."""
        rest = math.floor((self.request.max_drop - outcome.drop) / EXITS_DROP_STEP + 1e-9) * EXITS_DROP_STEP
        if self._exits_weight is None or self.request.objective == "size" or rest < EXITS_DROP_STEP:
            return None
        return Exits(max_drop=round(rest, 2))

    def _measure_variant(self, name: str, chain: Mapping[str, Step], candidate: Candidate) -> Outcome:
        start, earlier_training = time.monotonic(), self._load_training(candidate)
        artifact = ensure(self.workspace, [name], chain, skip_fresh_events(self.say), self.bar)[name]
        training = self._load_training(candidate)
        seconds = training.manifest.facts["recovery"]["seconds"] if training else 0.0
        new_seconds = seconds if training and not earlier_training else 0.0
        self.spent_s["training"] += new_seconds
        self.spent_s["building"] += time.monotonic() - start - new_seconds
        start = time.monotonic()
        baseline_row, row = self._measure([self.baseline, artifact])
        self.spent_s["measuring"] += time.monotonic() - start
        return Outcome(
            variant=name,
            artifact_id=artifact.manifest.id,
            drop=round(100 * (self.exact_accuracy - _accuracy(row)), 2),
            latency=_speedup(baseline_row.latency, row.latency),
            throughput=_speedup(baseline_row.batches, row.batches),
            size=artifact.manifest.size_bytes,
            training_s=seconds,
            baseline=self.baseline.manifest.variant,
        )

    def trained(self, candidates: Iterable[Candidate]) -> set[Training]:
        """Returns the trainings of `candidates` that an earlier run of the search has finished."""
        candidate_by_training = {candidate.training: candidate for candidate in candidates if candidate.epochs}
        return {training for training, candidate in candidate_by_training.items() if self._load_training(candidate)}

    def _load_training(self, candidate: Candidate) -> Artifact | None:
        steps = candidate.chain(self.layers, self._exits_weight).items()
        name = next((name for name, step in steps if isinstance(step, Recover)), None)
        return self.workspace.load(name) if name else None

    def _measure(self, artifacts: list[Artifact]) -> list[Measurement]:
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
            rows, _ = bench(cells, self.held_out, self.encoder, protocol, progress)
        for row in rows:
            if row.status != "ok":
                raise BenchError(f"{row.cell} could not be measured: {row.reason}", row.mend)
        return rows


def _accuracy(row: Measurement) -> float:
    assert row.score is not None  # the benchmark predicts every held-out row, so each cell has an accuracy
    return row.score.value


def _speedup(slower: Samples | None, faster: Samples | None) -> float:
    assert slower is not None  # `_Judge._measure` raises an error if a cell was not measured
    assert faster is not None
    return round(statistics.ratio(slower.sentence_times(), faster.sentence_times()).value, 4)
