"""Stores the trials of a search with Optuna, whose sampler proposes the next candidates."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from toolchain.artifacts.publishing import lock
from toolchain.errors import ArtifactError, first_line
from toolchain.system.decoding import Amount, Count, Line, Name, convert, decode_object, read_bytes, strict
from toolchain.tuning.candidates import (
    REQUANTISATION_GAIN,
    SPACE,
    Candidate,
    Training,
    all_candidates,
    select_worthwhile,
)

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

SEED = 20


@strict
@dataclass(frozen=True)
class Outcome:
    """Measurements of one candidate on held-out rows.

    Attributes:
        variant: Name of the measured variant.
        artifact_id: Id of the variant's artifact.
        drop: Accuracy drop below `onnx-fp32`, in percentage points.
        latency: Speed-up over `baseline` at batch 1.
        throughput: Speed-up over `baseline` in batches.
        size: Size of the artifact in bytes.
        training_s: Duration of the variant's training, in seconds; 0 without training.
        baseline: Name of the variant that the speed-ups refer to.
        without_exits: Measurements of the variant's parent, if the variant has exits.
    """

    variant: Name
    artifact_id: Line
    drop: float
    latency: Amount
    throughput: Amount
    size: Count
    training_s: Amount = 0.0
    baseline: Name = "onnx-int8"
    without_exits: Outcome | None = None

    def __post_init__(self) -> None:
        if not (self.latency and self.throughput):
            raise ValueError("a speed-up is 0")

    def cost(self, objective: str) -> float:
        """Returns the value to minimise: the inverse speed-up, or the size in megabytes."""
        return {"latency": 1 / self.latency, "throughput": 1 / self.throughput, "size": self.size / 1e6}[objective]

    def cost_without_exits(self, objective: str) -> float:
        """Returns the value of `cost` for the same candidate without exits."""
        return (self.without_exits or self).cost(objective)


class Study:
    """The trials of a search for one objective, including the trials of earlier runs of the search.

    Attributes:
        outcomes: The measured candidates, each with its measurements.
        given_up: Candidates that the search does not try again.
        refused: Candidates that failed validation.
        trained: Trainings that an earlier run of the search has finished.
    """

    def __init__(self, study: optuna.Study, objective: str, max_drop: float) -> None:
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        self.objective, self.max_drop, self._study = objective, max_drop, study
        self.outcomes: dict[Candidate, Outcome] = {}
        self.given_up: set[Candidate] = set()
        self.refused: set[Candidate] = set()
        self.trained: set[Training] = set()
        self._interrupted: list[Candidate] = []
        self._remaining, self._compared = list(all_candidates(objective)), 0
        while any(trial.state == TrialState.WAITING for trial in study.trials):  # a run was killed before it asked
            study.tell(study.ask(), state=TrialState.FAIL)
        distributions = _distributions(objective)
        for trial in study.trials:
            if any(distributions.get(name) != distribution for name, distribution in trial.distributions.items()):
                raise ValueError(f"trial {trial.number} has other settings than this search")
            candidate = Candidate(**trial.params) if len(trial.params) == len(SPACE[objective]) else None
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
                self._interrupted += [candidate] if candidate else []
            elif candidate and trial.state == TrialState.COMPLETE:
                self.outcomes[candidate] = convert(Outcome, trial.user_attrs.get("outcome"))
            elif candidate and trial.state == TrialState.PRUNED and trial.user_attrs.get("for_good"):
                self.given_up.add(candidate)
                self.refused |= {candidate} if trial.user_attrs.get("refused") else set()
        # The seed depends on the number of trials, so each run of the search gets new candidates from the sampler.
        study.sampler = TPESampler(seed=SEED + len(study.trials))

    @property
    def kept_by_candidate(self) -> dict[Candidate, bool]:
        """Returns, for each measured candidate, whether its accuracy drop is within the limit."""
        return {candidate: self.keeps(outcome) for candidate, outcome in self.outcomes.items()}

    @property
    def excess_drops(self) -> dict[Training, float]:
        """Returns, for each training, by how many points the trained model exceeds the allowed accuracy drop.

        The function uses the best measured quantisation of each trained model. A value of 0 or less means that the
        accuracy drop is within the limit.
        """
        smallest: dict[Training, float] = {}
        for candidate, outcome in self.outcomes.items():
            excess = outcome.drop - self.max_drop
            smallest[candidate.training] = min(excess, smallest.get(candidate.training, excess))
        return smallest

    @property
    def remaining(self) -> list[Candidate]:
        """Returns all candidates that may still be better than the measured candidates."""
        # Each read of the property `remaining` removes the candidates that the measurements so far rule out. So
        # `select_worthwhile` gets only the measurements that are newer than the previous read.
        kept_by_candidate = self.kept_by_candidate
        new_outcomes = dict(itertools.islice(kept_by_candidate.items(), self._compared, None))
        self._remaining, self._compared = (
            select_worthwhile(self._remaining, self.objective, new_outcomes, self.given_up),
            len(kept_by_candidate),
        )
        without_training = self.candidates_without_training
        self._remaining = [
            candidate
            for candidate in self._remaining
            if not (candidate.epochs and candidate.untrained in without_training)
        ]
        return self._remaining

    @property
    def candidates_without_training(self) -> set[Candidate]:
        """Returns the measured, untrained candidates that the search need not train.

        The search need not train a candidate whose accuracy drop is within the limit without training. The search also
        need not train a candidate if another measured candidate within the limit is at least as fast (for the objective
        ``size``, at least as small). Training changes neither the speed nor the size of a candidate, so training cannot
        make such a candidate the best. The function compares candidates without exits, because it assumes that exits
        speed up all of them alike.
        """
        costs = {candidate: outcome.cost_without_exits(self.objective) for candidate, outcome in self.outcomes.items()}
        best = min((costs[candidate] for candidate, keeps in self.kept_by_candidate.items() if keeps), default=math.inf)
        untrained = ((candidate, outcome) for candidate, outcome in self.outcomes.items() if not candidate.epochs)
        return {candidate for candidate, outcome in untrained if self.keeps(outcome) or costs[candidate] >= best}

    def keeps(self, outcome: Outcome) -> bool:
        """Returns whether the accuracy drop of a measured candidate is within the limit."""
        return outcome.drop <= self.max_drop

    @property
    def best(self) -> Outcome | None:
        """Returns the measurements of the fastest measured candidate whose accuracy drop is within the limit.

        For the objective ``size``, the function returns the measurements of the smallest of these candidates. The
        function returns None if no measured candidate has an accuracy drop within the limit.
        """
        keeping = [outcome for outcome in self.outcomes.values() if self.keeps(outcome)]
        return min(keeping, key=lambda outcome: outcome.cost(self.objective), default=None)

    @property
    def front(self) -> list[Outcome]:
        """Returns the measured candidates on the Pareto front of accuracy and objective, the most accurate first."""
        front: list[Outcome] = []
        for outcome in sorted(self.outcomes.values(), key=lambda o: (o.drop, o.cost(self.objective))):
            if not front or outcome.cost(self.objective) < front[-1].cost(self.objective):
                front.append(outcome)
        return front

    def nearest_trained(self, candidates: Iterable[Candidate]) -> Candidate | None:
        """Returns the candidate whose trained model exceeds the allowed accuracy drop by the fewest points, or None.

        The function considers only trained models that exceed the allowed accuracy drop by at most
        `REQUANTISATION_GAIN` points. To quantise a trained model again takes only about a minute.
        """
        excess_by_training = {
            training: excess for training, excess in self.excess_drops.items() if 0 < excess <= REQUANTISATION_GAIN
        }
        trained = [
            candidate for candidate in candidates if candidate.epochs and candidate.training in excess_by_training
        ]
        return min(
            trained, key=lambda candidate: (excess_by_training[candidate.training], candidate.keep_fp32), default=None
        )

    def most_pruned_trained(self, candidates: Iterable[Candidate]) -> Candidate | None:
        """Returns the most pruned candidate that an earlier run of the search has trained, or None."""
        trained = [candidate for candidate in candidates if candidate.epochs and candidate.training in self.trained]
        return max(trained, key=lambda candidate: (candidate.ratio, -candidate.keep_fp32), default=None)

    def ask(self, start: Candidate | None) -> tuple[Trial, Candidate]:
        """Begins a trial of the candidate `start`, and returns the trial and its candidate.

        If `start` is None, the trial tries the candidate of an interrupted run, or else the sampler's proposal.
        """
        trial = self.begin(self._interrupted.pop(0) if self._interrupted and start is None else start)
        return trial, Candidate(**trial.params)

    def begin(self, candidate: Candidate | None) -> Trial:
        """Begins a trial of the candidate, or of the sampler's proposal if the candidate is None."""
        if candidate:
            self._study.enqueue_trial(asdict(candidate))
        return self._study.ask(_distributions(self.objective))

    def tell(self, trial: Trial, candidate: Candidate, outcome: Outcome) -> None:
        """Ends the trial and stores the measurements of its candidate."""
        trial.set_user_attr("outcome", asdict(outcome))
        trial.set_constraint("points too many", outcome.drop - self.max_drop)
        self._study.tell(trial, outcome.cost(self.objective))
        self.outcomes[candidate] = outcome

    def give_up(self, trial: Trial, candidate: Candidate, for_good: bool = True, refused: bool = False) -> None:
        """Ends the trial without measurements of its candidate.

        Args:
            trial: The trial to end.
            candidate: The candidate of the trial.
            for_good: Whether the search never tries the candidate again.
            refused: Whether the candidate failed validation.
        """
        from optuna.trial import TrialState

        trial.set_user_attr("for_good", for_good)
        trial.set_user_attr("refused", refused)
        self._study.tell(trial, state=TrialState.PRUNED)
        if for_good:
            self.given_up.add(candidate)
        if refused:
            self.refused.add(candidate)


def _check_lines(path: Path) -> None:
    """Removes an incomplete last line, which a killed run left, and requires that each line is a JSON object."""
    if path.is_file():
        content = read_bytes(path)
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            os.truncate(path, len(complete))
        for line in complete.splitlines():
            decode_object(line)


def _distributions(objective: str) -> dict[str, BaseDistribution]:
    """Returns the allowed values of each setting of a candidate."""
    from optuna.distributions import CategoricalDistribution

    return {name: CategoricalDistribution(list(values)) for name, values in SPACE[objective].items()}


class _HeldLock:
    """Takes the place of the lock file of Optuna, because this process already holds a lock on the study's file.

    A killed process would leave Optuna's lock file, and the next search would then wait for ever.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Does nothing."""


@contextmanager
def open_study(
    path: Path, objective: str, max_drop: float, identity: Sequence[str], on_wait: Callable[[], None]
) -> Iterator[Study]:
    """Opens the Optuna study of an objective and an allowed accuracy drop; locks the study's file for this process.

    Args:
        path: File that holds the trials.
        objective: Objective of the search, one of `candidates.OBJECTIVES`.
        max_drop: Largest allowed accuracy drop, in percentage points.
        identity: Values that identify the model, the training data, the step versions and the baseline.
        on_wait: Function that is called before `open_study` waits for the lock.

    Raises:
        ArtifactError: The file is damaged, or another program wrote it.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(logging.ERROR)
    with lock(path, on_wait):
        # Optuna accepts no new parameter values in an existing study, so the study's name contains a hash of all
        # parameter values.
        space = hashlib.sha256(json.dumps(SPACE[objective]).encode()).hexdigest()[:8]
        name = "/".join([objective, f"{max_drop:g}", *identity, space])
        try:
            _check_lines(path)
            storage = JournalStorage(JournalFileBackend(str(path), cast(JournalFileOpenLock, _HeldLock())))
            stored = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
            study = Study(stored, objective, max_drop)
        except OSError as error:
            raise ArtifactError.unwritable(path.parent, error) from error
        except Exception as error:  # Optuna raises errors of many classes for a damaged file
            raise ArtifactError(
                f"{path} does not hold the trials of a search: {first_line(error)}.",
                "Delete this file to begin the search again.",
            ) from error
        yield study
