"""How sure a figure is: intervals over rounds, and tests of two models that answered the same sentences.

Rounds are the unit that is drawn again, not single times: what disturbs a machine lasts longer than one sentence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from toolchain.results.measurements import Samples

CONFIDENCE = 0.95
FEWEST_ROUNDS = 6  # below, an interval would say more of the method than of the machine
RESAMPLES = 2000
BINS = 10
_SEED = 20


@dataclass(frozen=True)
class Ratio:
    """How many times better, above 1 is better; `low` and `high` bound it at `CONFIDENCE`, None where no rounds are."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def differs(self) -> bool | None:
        """Whether the interval excludes 1; None where there is none."""
        return None if self.low is None or self.high is None else not self.low <= 1 <= self.high

    def to_json(self) -> dict[str, float]:
        """As a file holds it."""
        bounds = {} if self.low is None or self.high is None else {"low": self.low, "high": self.high}
        return {name: round(value, 4) for name, value in {"value": self.value, **bounds}.items()}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """The geometric mean over rounds of the first figure over the second, both of the same rounds."""
    logs = [math.log(one / other) for one, other in zip(slower, faster, strict=True)]
    value = math.exp(sum(logs) / len(logs))
    if len(logs) < FEWEST_ROUNDS:
        return Ratio(value)
    low, high = _bounds(tuple(logs))
    return Ratio(value, math.exp(low), math.exp(high))


@functools.lru_cache(maxsize=1024)
def _bounds(values: tuple[float, ...]) -> tuple[float, float]:
    """Of the mean."""
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (np.array(values),),
        np.mean,
        confidence_level=_expanded(len(values)),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=_SEED,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _expanded(count: int) -> float:
    """The level at which a percentile interval over so few covers what it should: its bounds are Gaussian and too
    narrow by the square root of n / (n - 1). After Hesterberg 2015, "What Teachers Should Know About the Bootstrap"."""
    from scipy import stats

    wide = math.sqrt(count / (count - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(1 - 2 * stats.norm.sf(wide))


def median_interval(samples: Samples) -> tuple[float, float] | None:
    """Of the median in milliseconds, rounds drawn again; None for too few."""
    rounds = samples.rounds
    return _median_bounds(rounds) if len(rounds) >= FEWEST_ROUNDS else None


@functools.lru_cache(maxsize=1024)
def _median_bounds(rounds: tuple[tuple[int, ...], ...]) -> tuple[float, float]:
    import numpy as np
    from scipy import stats

    table = np.full((len(rounds), max(map(len, rounds))), np.nan)
    for index, row in enumerate(rounds):
        table[index, : len(row)] = row

    def median(drawn: np.ndarray, axis: int = -1) -> Any:
        chosen = table[np.moveaxis(drawn, axis, -1).astype(int)]
        return np.nanmedian(chosen.reshape(*chosen.shape[:-2], -1), axis=-1)

    found = stats.bootstrap(
        (np.arange(len(rounds)),),
        median,
        confidence_level=_expanded(len(rounds)),
        n_resamples=RESAMPLES // 4,
        method="percentile",
        rng=_SEED,
    ).confidence_interval
    return float(found.low) / 1000, float(found.high) / 1000


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Wilson's interval of a share of right answers."""
    from scipy import stats

    found = stats.binomtest(right, asked).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p of McNemar's test: that as many answers turned wrong as turned right."""
    from scipy import stats

    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def by_label(predictions: Sequence[int], labels: Sequence[int], multi: bool) -> list[dict[str, int]]:
    """For every label that occurs, asked or answered, the rows that are ``right`` (both), ``asked``, ``answered``, and
    ``neither``; answers as `toolchain.data.labels` has them, sets of labels where `multi`."""
    pairs = list(zip(predictions, labels, strict=True))
    if multi:
        bits = max((answer.bit_length() for pair in pairs for answer in pair), default=0)
        judged = [[(bool(mine >> at & 1), bool(its >> at & 1)) for mine, its in pairs] for at in range(bits)]
    else:
        occurring = sorted({*predictions, *labels})
        judged = [[(mine == label, its == label) for mine, its in pairs] for label in occurring]
    return [
        {
            "right": sum(mine and its for mine, its in rows),
            "asked": sum(its for _, its in rows),
            "answered": sum(mine for mine, _ in rows),
            "neither": sum(not (mine or its) for mine, its in rows),
        }
        for rows in judged
        if any(mine or its for mine, its in rows)
    ]


def macro_f1(counts: Sequence[Mapping[str, int]]) -> float | None:
    """The mean over labels of F1; None where no label occurs."""
    scores = [2 * each["right"] / (each["asked"] + each["answered"]) for each in counts]
    return sum(scores) / len(scores) if scores else None


def balanced_accuracy(counts: Sequence[Mapping[str, int]], multi: bool) -> float | None:
    """The mean of recall over the labels that are asked; of sets, of each label's recall and that of its absence. None
    where there is none."""
    recalls = [each["right"] / each["asked"] for each in counts if each["asked"]]
    if multi:
        # What is neither asked nor answered is right, what is answered and not asked is wrong.
        absent = [(each["neither"], each["neither"] + each["answered"] - each["right"]) for each in counts]
        recalls += [right / count for right, count in absent if count]
    return sum(recalls) / len(recalls) if recalls else None


def calibration_error(probabilities: Sequence[Sequence[float]], labels: Sequence[int], multi: bool) -> float:
    """Expected calibration error over `BINS` equal bins of confidence (Guo et al. 2017), 0 to 1; of sets, over every
    label's yes or no."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    count = 0
    for row, label in zip(probabilities, labels, strict=True):
        if multi:
            judged = [(max(p, 1 - p), (p > 0.5) == bool(label >> at & 1)) for at, p in enumerate(row)]
        else:
            judged = [(max(row), row[label] == max(row))]
        for sure, is_right in judged:
            bins[min(BINS - 1, int(sure * BINS))].append((sure, is_right))
            count += 1
    return sum(abs(sum(c for c, _ in part) - sum(r for _, r in part)) for part in bins) / count
