"""Service times of a replica, drawn from the raw samples of a result file.

A draw for a batch of a measured size is one of the measured times of this size. Between two measured sizes, the draw is
the linear interpolation of the same quantile of both. Times of the same round stay together, because a disturbance of
the machine lasts longer than one query: for as long as a measured round, a simulation draws from one round only.

A replica that was idle is slower: its caches are cold, and its processor has to wake up. The additional time is the
median difference between the same sentence after a pause and without one, linear between the measured pauses.
"""

from __future__ import annotations

import functools
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.capacity.machines import missing_samples
from toolchain.capacity.queueing import WakeTimes, no_wake_time
from toolchain.results.measurements import Measurement, Samples

if TYPE_CHECKING:
    import numpy as np

FEWEST_SAMPLES = 4  # a size of batches counts as measured if each round has at least this many times of it


@dataclass(frozen=True)
class SizeTimes:
    """The service times of one batch size.

    Attributes:
        values_s: Times in seconds, those of a round together and sorted.
        starts: Index of the first time of each round.
        counts: Number of times of each round.
    """

    values_s: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of_rounds(cls, rounds_us: Sequence[Sequence[int]]) -> SizeTimes:
        """Returns the times of rounds, which are given in microseconds."""
        import numpy as np

        counts = np.array([len(row) for row in rounds_us])
        values_s = np.array([us for row in rounds_us for us in sorted(row)]) / 1e6
        return cls(values_s, np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)

    def pick(self, rounds: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
        """Returns one time for each round and quantile: the measured time of the round at this quantile."""
        chosen: np.ndarray = self.values_s[self.starts[rounds] + (quantiles * self.counts[rounds]).astype(int)]
        return chosen


@dataclass(frozen=True)
class Service:
    """The service times of one cell.

    Attributes:
        by_size: Number of queries → the service times of batches of this size. The sizes are in increasing order, and
            the first one is 1.
        round_s: Seconds that single queries of one round took in all.
        wake_s: Seconds of a pause → additional seconds of the batch after the pause, from the shortest pause on; the
            first pause is 0. Empty if they were not measured.
    """

    by_size: Mapping[int, SizeTimes]
    round_s: float
    wake_s: Mapping[float, float]

    def wake(self) -> WakeTimes:
        """Returns the additional time of a batch as a function of the idle time before it."""
        pauses, extras = list(self.wake_s), list(self.wake_s.values())
        if not pauses:
            return no_wake_time

        def additional_s(idle_s: float) -> float:
            index = bisect_left(pauses, idle_s)
            if index == len(pauses):
                return extras[-1]
            share = (idle_s - pauses[index - 1]) / (pauses[index] - pauses[index - 1])
            return extras[index - 1] + share * (extras[index] - extras[index - 1])

        return additional_s

    @property
    def sizes(self) -> list[int]:
        """Returns the measured batch sizes, in increasing order."""
        return list(self.by_size)

    def mean_s(self, size: int) -> float:
        """Returns the mean seconds of a batch of a measured size."""
        return float(self.by_size[size].values_s.mean())

    def per_second(self, largest: int) -> float:
        """Returns the highest number of queries per second of one replica with batches of at most `largest`."""
        return max(size / self.mean_s(size) for size in self.sizes if size <= largest)

    def draw(self, moments_s: np.ndarray, rng: np.random.Generator) -> Callable[[int], Sequence[float]]:
        """Returns random service times of a simulation, as a function of the batch size.

        The simulation draws from rounds of a bootstrap sample of the measured rounds.

        Args:
            moments_s: Time of each query in seconds; the draws of one period of `round_s` come from the same round.
            rng: Source of the random numbers.
        """
        import numpy as np

        count = len(self.by_size[1].counts)
        sample = rng.integers(count, size=count)
        _, period = np.unique(np.floor(moments_s / self.round_s), return_inverse=True)
        rounds = sample[rng.integers(count, size=period.max() + 1)][period]
        quantiles = rng.random(len(moments_s))

        @functools.cache
        def times(size: int) -> Sequence[float]:
            index = bisect_left(self.sizes, size)
            above = self.sizes[index]
            drawn = self.by_size[above].pick(rounds, quantiles)
            if above != size:
                below = self.sizes[index - 1]
                share = (size - below) / (above - below)
                drawn = self.by_size[below].pick(rounds, quantiles) * (1 - share) + drawn * share
            return drawn.tolist()  # type: ignore[no-any-return]

        return times


def service_of(row: Measurement) -> Service:
    """Returns the service times of a cell: single sentences and mixed batches, both with tokenising.

    Raises:
        BenchError: The row lacks times of single sentences with tokenising.
    """
    singles = row.with_tokenizing
    if singles is None:
        raise missing_samples(row, "times of single sentences with tokenising")
    by_size = {1: SizeTimes.of_rounds(singles.rounds)}
    mixed = row.mixed_batches
    if mixed and len(mixed.rounds) == len(singles.rounds):
        for size in sorted({size for row_sizes in mixed.sentences for size in row_sizes if size > 1}):
            rounds = _times_of_size(mixed, size)
            if min(map(len, rounds)) >= FEWEST_SAMPLES:
                by_size[size] = SizeTimes.of_rounds(rounds)
    # A file stores a share of the measured times if there are many.
    round_us = sum(singles.values()) / len(singles.values()) * singles.count / len(singles.rounds)
    return Service(by_size, round_us / 1e6, _wake_times(row.after_pause))


def _wake_times(after_pause: Mapping[int, Samples]) -> dict[float, float]:
    """Returns the additional seconds after each pause in seconds; empty if a pause lacks its samples."""
    warm = after_pause.get(0)
    if warm is None or any(samples.sentences != warm.sentences for samples in after_pause.values()):
        return {}
    return {
        pause_us / 1e6: max(
            0.0,
            statistics.median(us - warm_us for us, warm_us in zip(samples.values(), warm.values(), strict=True)) / 1e6,
        )
        for pause_us, samples in sorted(after_pause.items())
    }


def _times_of_size(samples: Samples, size: int) -> list[list[int]]:
    """Returns the times of the batches of one size in microseconds, by round."""
    return [
        [us for us, count in zip(times, counts, strict=True) if count == size]
        for times, counts in zip(samples.rounds, samples.sentences, strict=True)
    ]
