"""Statistics: confidence intervals over rounds, tests of two models on the same sentences, and scores by label.

The bootstrap resamples rounds, not single times, because a disturbance of the machine lasts longer than one sentence.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.system.decoding import strict

if TYPE_CHECKING:
    import numpy as np

    from toolchain.results.measurements import Samples

CONFIDENCE = 0.95
FEWEST_ROUNDS = 6  # with fewer rounds, a confidence interval depends more on the method than on the measured times
RESAMPLES = 2000
BINS = 10
_SEED = 20


@strict
@dataclass(frozen=True)
class Ratio:
    """A ratio of two figures; above 1 is better for a speed-up or gain, and worse for a cost.

    Attributes:
        value: The ratio.
        low: Lower bound of the confidence interval at `CONFIDENCE`; None if there is no interval.
        high: Upper bound of the confidence interval at `CONFIDENCE`; None if there is no interval.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def differs(self) -> bool | None:
        """Whether the confidence interval excludes 1; None if there is no interval."""
        return None if self.low is None or self.high is None else not self.low <= 1 <= self.high

    def to_json(self) -> dict[str, float]:
        """Returns the ratio as JSON, with the bounds of the confidence interval if there is one."""
        bounds = {} if self.low is None or self.high is None else {"low": self.low, "high": self.high}
        return {name: round(value, 4) for name, value in {"value": self.value, **bounds}.items()}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """Returns the geometric mean of `slower` / `faster` over rounds.

    The ratio has a confidence interval if there are at least `FEWEST_ROUNDS` rounds.

    Args:
        slower: One figure for each round, such as the baseline's time.
        faster: One figure for each round, such as the time of the row that is compared with the baseline.
    """
    logs = [math.log(one / other) for one, other in zip(slower, faster, strict=True)]
    value = math.exp(sum(logs) / len(logs))
    if len(logs) < FEWEST_ROUNDS:
        return Ratio(value)
    low, high = _bounds(tuple(logs))
    return Ratio(value, math.exp(low), math.exp(high))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the confidence interval of the mean of one figure for each round; None below `FEWEST_ROUNDS` rounds."""
    return _bounds(tuple(values)) if len(values) >= FEWEST_ROUNDS else None


@functools.lru_cache(maxsize=1024)
def _bounds(values: tuple[float, ...]) -> tuple[float, float]:
    """Returns the bootstrap confidence interval of the mean of `values`."""
    import numpy as np
    from scipy import stats

    result = stats.bootstrap(
        (np.array(values),),
        np.mean,
        confidence_level=_expand_level(len(values)),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=_SEED,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _expand_level(count: int) -> float:
    """Returns the confidence level to request for a bootstrap percentile interval over `count` values.

    For a small number n of values, a percentile interval of the bootstrap is too narrow. The interval then contains the
    true value less often than the requested level promises. With the returned, higher level, the interval contains the
    true value in about the share `CONFIDENCE` of all cases. The percentile interval is too narrow for two reasons. The
    percentile interval corresponds to the normal distribution instead of Student's t. In addition, every bootstrap
    interval over n values is too narrow by the factor sqrt((n - 1) / n). The correction follows Hesterberg 2015, "What
    Teachers Should Know About the Bootstrap".
    """
    from scipy import stats

    width = math.sqrt(count / (count - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(1 - 2 * stats.norm.sf(width))


def median_interval(samples: Samples) -> tuple[float, float] | None:
    """Returns the confidence interval of the median time, in milliseconds; None below `FEWEST_ROUNDS` rounds."""
    rounds = samples.rounds
    return _median_bounds(rounds) if len(rounds) >= FEWEST_ROUNDS else None


@functools.lru_cache(maxsize=1024)
def _median_bounds(rounds: tuple[tuple[int, ...], ...]) -> tuple[float, float]:
    import numpy as np
    from scipy import stats

    table = np.full((len(rounds), max(map(len, rounds))), np.nan)
    for index, row in enumerate(rounds):
        table[index, : len(row)] = row

    def median(indices: np.ndarray, axis: int = -1) -> Any:
        chosen = table[np.moveaxis(indices, axis, -1).astype(int)]
        return np.nanmedian(chosen.reshape(*chosen.shape[:-2], -1), axis=-1)

    interval = stats.bootstrap(
        (np.arange(len(rounds)),),
        median,
        confidence_level=_expand_level(len(rounds)),
        n_resamples=RESAMPLES // 4,
        method="percentile",
        rng=_SEED,
    ).confidence_interval
    return float(interval.low) / 1000, float(interval.high) / 1000


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Returns Wilson's confidence interval of the share of correct predictions.

    Args:
        correct: Number of correct predictions.
        count: Number of sentences.
    """
    from scipy import stats

    interval = stats.binomtest(correct, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(lost: int, won: int) -> float:
    """Returns the exact two-sided p-value of McNemar's test; the p-value is 1 if no prediction changed.

    The null hypothesis is that predictions are as likely to change from correct to wrong as from wrong to correct.

    Args:
        lost: Number of predictions that changed from correct to wrong.
        won: Number of predictions that changed from wrong to correct.
    """
    from scipy import stats

    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


@functools.lru_cache(maxsize=1024)
def r2_interval(scores: tuple[float, ...], labels: tuple[float, ...]) -> tuple[float, float]:
    """Returns the bootstrap confidence interval of the coefficient of determination R², over sentences.

    Args:
        scores: Predicted score of each sentence.
        labels: Correct score of each sentence.
    """
    import numpy as np
    from scipy import stats

    def r2(predicted: np.ndarray, correct: np.ndarray, axis: int = -1) -> np.ndarray:
        variance = correct.var(axis=axis)
        # A sample whose labels are all equal has no variance to explain.
        return np.asarray(1 - np.square(predicted - correct).mean(axis=axis) / np.where(variance > 0, variance, np.nan))

    data = (np.array(scores, float), np.array(labels, float))
    if not data[1].var():  # with equal labels, R² has only the value that `score_answers` defines for them
        value = float(np.array_equal(*data))
        return value, value
    samples = stats.bootstrap(
        data, r2, paired=True, n_resamples=RESAMPLES, method="percentile", rng=_SEED, batch=100
    ).bootstrap_distribution
    # If the labels of a sample are nearly equal, the quotient overflows.
    low, high = np.quantile(samples[np.isfinite(samples)], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=1024)
def f1_interval(counts: tuple[tuple[int, int, int], ...]) -> tuple[float, float]:
    """Returns the bootstrap confidence interval of the F1 of entities, over sentences.

    Args:
        counts: For each sentence, the number of found, predicted and labelled entities.
    """
    import numpy as np

    table, rng = np.array(counts), np.random.default_rng(_SEED)
    samples = []
    for _ in range(RESAMPLES):
        found, predicted, labelled = table[rng.integers(len(table), size=len(table))].sum(axis=0)
        samples.append(2 * found / (predicted + labelled) if predicted + labelled else 1.0)
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def correlations(scores: Sequence[float], labels: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns Pearson's and Spearman's correlation; both are None if all scores or all labels are equal.

    Args:
        scores: Predicted score of each sentence.
        labels: Correct score of each sentence.
    """
    from scipy import stats

    if len(set(scores)) < 2 or len(set(labels)) < 2:
        return None, None
    return float(stats.pearsonr(scores, labels).statistic), float(stats.spearmanr(scores, labels).statistic)


def wilcoxon(scores: Sequence[float], baseline_scores: Sequence[float], labels: Sequence[float]) -> float:
    """Returns the two-sided p-value of Wilcoxon's signed-rank test on the absolute errors of two models.

    The null hypothesis is that the differences of the absolute errors are distributed symmetrically around 0. The
    p-value is 1 if the two models have the same errors.

    Args:
        scores: Score of each sentence, predicted by one model.
        baseline_scores: Score of each sentence, predicted by the other model.
        labels: Correct score of each sentence.
    """
    from scipy import stats

    pairs = zip(scores, baseline_scores, labels, strict=True)
    differences = [abs(score - label) - abs(baseline - label) for score, baseline, label in pairs]
    return float(stats.wilcoxon(differences).pvalue) if any(differences) else 1.0


def count_by_label(predictions: Sequence[int], labels: Sequence[int], multi: bool) -> list[dict[str, int]]:
    """Counts labelled, predicted and correct rows for every label that occurs in the data or in the predictions.

    Args:
        predictions: Predicted label indices, or sets of labels as bit masks; see `toolchain.data.labels`.
        labels: Correct labels of the predicted rows, in the same form as `predictions`.
        multi: Whether predictions and labels are sets of labels.

    Returns:
        One dict for each label, with four counts of rows. ``labelled``: rows that have the label in the data.
        ``predicted``: rows that have the label in the prediction. ``correct``: rows that have the label in the data and
        in the prediction. ``neither``: rows that have the label neither in the data nor in the prediction.
    """
    pairs = list(zip(predictions, labels, strict=True))
    if multi:
        bits = max((answer.bit_length() for pair in pairs for answer in pair), default=0)
        outcomes = [
            [(bool(prediction >> bit & 1), bool(label >> bit & 1)) for prediction, label in pairs]
            for bit in range(bits)
        ]
    else:
        labelled, predicted = Counter(labels), Counter(predictions)
        correct = Counter(prediction for prediction, label in pairs if prediction == label)
        return [
            {
                "correct": correct[value],
                "labelled": labelled[value],
                "predicted": predicted[value],
                "neither": len(pairs) - labelled[value] - predicted[value] + correct[value],
            }
            for value in sorted({*predictions, *labels})
        ]
    return [
        {
            "correct": sum(prediction and label for prediction, label in rows),
            "labelled": sum(label for _, label in rows),
            "predicted": sum(prediction for prediction, _ in rows),
            "neither": sum(not (prediction or label) for prediction, label in rows),
        }
        for rows in outcomes
        if any(prediction or label for prediction, label in rows)
    ]


def macro_f1(counts: Sequence[Mapping[str, int]]) -> float | None:
    """Returns the mean F1 over labels, from the counts of `count_by_label`; None if no label occurs."""
    scores = [2 * count["correct"] / (count["labelled"] + count["predicted"]) for count in counts]
    return sum(scores) / len(scores) if scores else None


def balanced_accuracy(counts: Sequence[Mapping[str, int]], multi: bool) -> float | None:
    """Returns the mean recall over the labels in the data; None if there is no label.

    Args:
        counts: Result of `count_by_label`.
        multi: Whether each row has a set of labels instead of one label. For sets of labels, the mean also includes the
            recall of each label's absence. The recall of a label's absence is computed on the rows without the label.
            This recall is the share of these rows for which the model does not predict the label.
    """
    recalls = [
        label_counts["correct"] / label_counts["labelled"] for label_counts in counts if label_counts["labelled"]
    ]
    if multi:
        # The recall of a label's absence is the count ``neither`` divided by the number of rows without the label.
        absent = [
            (label_counts["neither"], label_counts["neither"] + label_counts["predicted"] - label_counts["correct"])
            for label_counts in counts
        ]
        recalls += [correct / count for correct, count in absent if count]
    return sum(recalls) / len(recalls) if recalls else None


def calibration_error(probabilities: Sequence[Sequence[float]], labels: Sequence[int], multi: bool) -> float:
    """Returns the expected calibration error, 0 to 1, over `BINS` equal bins of confidence (Guo et al. 2017).

    Args:
        probabilities: Probabilities of all labels, for each sentence.
        labels: Label index of each sentence, or a set of labels as a bit mask.
        multi: Whether each row has a set of labels instead of one label. In a set of labels, each label counts as a
            separate yes-or-no prediction.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    count = 0
    for row, label in zip(probabilities, labels, strict=True):
        if multi:
            outcomes = [(max(p, 1 - p), (p > 0.5) == bool(label >> index & 1)) for index, p in enumerate(row)]
        else:
            outcomes = [(max(row), row[label] == max(row))]
        for confidence, is_correct in outcomes:
            bins[min(BINS - 1, int(confidence * BINS))].append((confidence, is_correct))
            count += 1
    return sum(abs(sum(c for c, _ in part) - sum(r for _, r in part)) for part in bins) / count
