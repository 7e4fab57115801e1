"""The trials of a search, kept in a file by Optuna, whose sampler proposes what to try next."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.artifacts.publishing import lock
from toolchain.tuning.candidates import OTHERWISE, SPACE, Candidate, Training, every, worthwhile

if TYPE_CHECKING:
    import optuna
    from optuna.trial import Trial

SEED = 20


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate on held-out rows: the `variant` that was measured and its artifact's id, accuracy points
    lost, how many times as fast as the `baseline` at batch 1 and in batches, bytes, seconds that its training took."""

    variant: str
    artifact_id: str
    drop: float
    latency: float
    throughput: float
    size: int
    training_s: float = 0.0
    baseline: str = "onnx-int8"

    def cost(self, objective: str) -> float:
        """What is made small."""
        return {"latency": 1 / self.latency, "throughput": 1 / self.throughput, "size": self.size / 1e6}[objective]


class Study:
    """Trials of one objective so far, those of earlier runs among them: what was measured, what was given up, of that
    what validation `refused`, and what is known to be `trained` already."""

    def __init__(self, study: optuna.Study, objective: str, max_drop: float) -> None:
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        self.objective, self.max_drop, self._study = objective, max_drop, study
        self.outcomes: dict[Candidate, Outcome] = {}
        self.given_up: set[Candidate] = set()
        self.refused: set[Candidate] = set()
        self.trained: set[Training] = set()
        self._interrupted: list[Candidate] = []
        self._rest, self._weighed = list(every(objective)), 0
        for trial in study.trials:
            candidate = Candidate(**trial.params) if len(trial.params) == len(SPACE[objective]) else None
            if trial.state in (TrialState.RUNNING, TrialState.WAITING):
                study.tell(trial.number, state=TrialState.FAIL)
                self._interrupted += [candidate] if candidate else []
            elif candidate and trial.state == TrialState.COMPLETE:
                self.outcomes[candidate] = Outcome(**trial.user_attrs["outcome"])
            elif candidate and trial.state == TrialState.PRUNED and trial.user_attrs.get("for_good"):
                self.given_up.add(candidate)
                self.refused |= {candidate} if trial.user_attrs.get("refused") else set()
        # By how many there are: the next run proposes something else.
        study.sampler = TPESampler(seed=SEED + len(study.trials))

    @property
    def known(self) -> dict[Candidate, bool]:
        """Whether what was measured keeps the accuracy."""
        return {candidate: self.keeps(outcome) for candidate, outcome in self.outcomes.items()}

    @property
    def over(self) -> dict[Training, float]:
        """How many points more than allowed each training loses, quantised as it loses least; not above 0 keeps the
        accuracy."""
        least: dict[Training, float] = {}
        for candidate, outcome in self.outcomes.items():
            excess = outcome.drop - self.max_drop
            least[candidate.training] = min(excess, least.get(candidate.training, excess))
        return least

    @property
    def rest(self) -> list[Candidate]:
        """All that may still be better than what is known."""
        # One outcome rules out what it does, whatever comes after it: only new ones are looked at.
        known = self.known
        new = dict(itertools.islice(known.items(), self._weighed, None))
        self._rest, self._weighed = worthwhile(self._rest, self.objective, new, self.given_up), len(known)
        settled = self.settled
        self._rest = [each for each in self._rest if not (each.epochs and each.untrained in settled)]
        return self._rest

    @property
    def settled(self) -> set[Candidate]:
        """What was measured untrained and needs no training: it keeps the accuracy as it is, or is no better than the
        best however well it is trained."""
        best = self.best.cost(self.objective) if self.best else math.inf
        plain = ((each, outcome) for each, outcome in self.outcomes.items() if not each.epochs)
        return {each for each, found in plain if self.keeps(found) or found.cost(self.objective) >= best}

    def keeps(self, outcome: Outcome) -> bool:
        """Whether it loses no more than allowed."""
        return outcome.drop <= self.max_drop

    @property
    def best(self) -> Outcome | None:
        """The best that keeps the accuracy."""
        kept = [outcome for outcome in self.outcomes.values() if self.keeps(outcome)]
        return min(kept, key=lambda outcome: outcome.cost(self.objective), default=None)

    @property
    def front(self) -> list[Outcome]:
        """The outcomes that no other betters in both accuracy and objective, the most accurate first."""
        found: list[Outcome] = []
        for outcome in sorted(self.outcomes.values(), key=lambda o: (o.drop, o.cost(self.objective))):
            if not found or outcome.cost(self.objective) < found[-1].cost(self.objective):
                found.append(outcome)
        return found

    def paid_for(self, among: Iterable[Candidate]) -> Candidate | None:
        """Of these one whose training is there already and nearly kept the accuracy, the least that is missing first:
        another way to quantise that costs a minute."""
        near = {training: excess for training, excess in self.over.items() if 0 < excess <= OTHERWISE}
        found = [each for each in among if each.epochs and each.training in near]
        return min(found, key=lambda each: (near[each.training], each.keep_fp32), default=None)

    def at_hand(self, among: Iterable[Candidate]) -> Candidate | None:
        """Of these one that an earlier run has trained, the most pruned first."""
        found = [each for each in among if each.epochs and each.training in self.trained]
        return max(found, key=lambda each: (each.ratio, -each.keep_fp32), default=None)

    def ask(self, start: Candidate | None) -> tuple[Trial, Candidate]:
        """The next trial: `start`, else what an interrupted run had begun, else what the sampler proposes."""
        trial = self.begin(self._interrupted.pop(0) if self._interrupted and start is None else start)
        return trial, Candidate(**trial.params)

    def begin(self, candidate: Candidate | None) -> Trial:
        """A trial of the candidate, or of what the sampler proposes."""
        from optuna.distributions import CategoricalDistribution

        if candidate:
            self._study.enqueue_trial(asdict(candidate))
        return self._study.ask({name: CategoricalDistribution(list(v)) for name, v in SPACE[self.objective].items()})

    def tell(self, trial: Trial, candidate: Candidate, outcome: Outcome) -> None:
        """Ends the trial with what was measured."""
        trial.set_user_attr("outcome", asdict(outcome))
        trial.set_constraint("points too many", outcome.drop - self.max_drop)
        self._study.tell(trial, outcome.cost(self.objective))
        self.outcomes[candidate] = outcome

    def give_up(self, trial: Trial, candidate: Candidate, for_good: bool = True, refused: bool = False) -> None:
        """Ends the trial as one that is not worth the time, and if `for_good` never will be; `refused` says that it
        failed validation."""
        from optuna.trial import TrialState

        trial.set_user_attr("for_good", for_good)
        trial.set_user_attr("refused", refused)
        self._study.tell(trial, state=TrialState.PRUNED)
        if for_good:
            self.given_up.add(candidate)
        if refused:
            self.refused.add(candidate)


@contextmanager
def opened(
    path: Path, objective: str, max_drop: float, about: Sequence[str], waiting: Callable[[], None]
) -> Iterator[Study]:
    """The study of that objective and drop in the file at `path`; `about` tells models, training data and
    releases apart. For one process at a time; `waiting` is called before it blocks."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(logging.ERROR)
    with lock(path, waiting):
        storage = JournalStorage(JournalFileBackend(str(path)))
        # Optuna takes no other choices in a study once begun.
        space = hashlib.sha256(json.dumps(SPACE[objective]).encode()).hexdigest()[:8]
        name = "/".join([objective, f"{max_drop:g}", *about, space])
        yield Study(optuna.create_study(storage=storage, study_name=name, load_if_exists=True), objective, max_drop)
