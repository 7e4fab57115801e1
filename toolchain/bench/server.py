"""The scenario ``server`` of MLPerf Inference: queries arrive at random times, and the latency includes their waiting.

The times between arrivals have an exponential distribution, so the arrivals are a Poisson process. A query is one
sentence. A free session takes all waiting queries that fit into one batch, so the batches grow with the rate. The
latency of a query is the time from its arrival to the logits, tokenising included.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.bench.scenarios import SERVER, Protocol
from toolchain.results.measurements import Samples

DEFAULT_P99_MS = 50.0
ROUNDS = 4  # number of turns at the final rate, whose latencies the result file states
RESOLUTION = 1.05  # the search ends if the lowest failed rate is at most this factor above the highest passed rate
START_SHARE = 0.5  # share of the single-stream rate at which the search starts
LOWEST_SHARE = 0.01  # share of the single-stream rate below which the search gives up
HIGHEST_FACTOR = 100  # no batch makes a session faster than this times its single-stream rate
MOST_TURNS = 60  # number of turns after which the search gives up
LATE_SHARE = 0.01  # share of late queries above which a turn of the search cannot keep the p99, and stops
MOST_WAITING_S = 10.0  # a turn whose queries wait longer stops, because the rate is far too high
# A turn has at least `FEWEST_QUERIES` queries, and `SLOW_QUERIES` queries if they take at most `SLOW_S` seconds.
FEWEST_QUERIES, SLOW_QUERIES, SLOW_S = 50, 200, 20.0
MOST_QUERIES = 20_000


@dataclass(frozen=True)
class Work:
    """One turn of a cell: queries at one rate.

    Attributes:
        qps: Mean number of queries per second.
        arrivals_us: Time of arrival of each query, in microseconds after the start of the turn; in increasing order.
        sentences: Index of the sentence of each query.
        late_us: Latency in microseconds above which a query is late.
        most_late: Number of late queries above which the turn stops.
    """

    qps: float
    arrivals_us: list[int]
    sentences: list[int]
    late_us: int
    most_late: int

    def message(self, batch_size: int) -> dict[str, Any]:
        """Returns the message to the worker; `batch_size` is the maximum number of sentences in a batch."""
        values = {name: value for name, value in vars(self).items() if name != "qps"}
        return {"do": SERVER, **values, "batch_size": batch_size}


@dataclass(frozen=True)
class Turn:
    """The reply to one turn.

    Attributes:
        qps: Mean number of queries per second.
        is_search: Whether the turn belongs to the search of the highest rate.
        planned: Number of planned queries.
        us: Latency of each answered query in microseconds.
        sizes: Number of sentences of each batch.
    """

    qps: float
    is_search: bool
    planned: int
    us: Sequence[int]
    sizes: Sequence[int]


@dataclass(frozen=True)
class Outcome:
    """The result of the scenario.

    Attributes:
        qps: The fixed rate, or the highest rate that keeps the p99; 0 if the search found no such rate.
        turns: The turns at this rate; without a rate, the turns at the lowest rate.
    """

    qps: float
    turns: Sequence[Turn]

    @property
    def samples(self) -> Samples:
        """Returns the latencies."""
        return _samples_of(self.turns)

    def fact(self, protocol: Protocol) -> dict[str, Any]:
        """Returns the fact ``server`` of the cell; see `toolchain.results.facts.Server`."""
        mean_batch = sum(len(turn.us) for turn in self.turns) / sum(len(turn.sizes) for turn in self.turns)
        limit = {} if protocol.server_qps else {"p99_limit_ms": protocol.server_p99_ms}
        return {"qps": self.qps, **limit, "mean_batch": round(mean_batch, 2)}


def plan(turn: int, qps: float, is_search: bool, sentences: Sequence[int], protocol: Protocol) -> Work:
    """Returns the queries of a turn.

    In the turn with the same number, all cells get the same order of sentences and, apart from the rate, the same
    arrivals.

    Args:
        turn: Number of the turn, from 0.
        qps: Mean number of queries per second.
        is_search: Whether the turn belongs to the search. Such a turn is shorter, and stops if it cannot keep the p99.
        sentences: Indices of the sentences to choose from.
        protocol: The settings of the benchmark.
    """
    arrival_rng, sentence_rng = (random.Random(f"{kind} {protocol.seed} {turn}") for kind in ("arrivals", "sentences"))
    seconds = protocol.min_s / 2 if is_search else protocol.min_s
    count = round(min(MOST_QUERIES, max(FEWEST_QUERIES, min(SLOW_QUERIES, SLOW_S * qps), seconds * qps)))
    arrivals_us, now = [], 0.0
    for _ in range(count):
        now += arrival_rng.expovariate(1.0)
        arrivals_us.append(round(now / qps * 1e6))
    chosen = sentence_rng.choices(sentences, k=count)
    if is_search and protocol.server_p99_ms:
        return Work(qps, arrivals_us, chosen, round(protocol.server_p99_ms * 1000), int(LATE_SHARE * count))
    return Work(qps, arrivals_us, chosen, round(MOST_WAITING_S * 1e6), 0)


def next_rate(turns: Sequence[Turn], protocol: Protocol, single_qps: float) -> tuple[float, bool] | None:
    """Returns the rate of the next turn, and whether this turn belongs to the search; None if the scenario has ended.

    The search doubles or halves the rate until one rate keeps the p99 and another does not, and then halves the
    distance between the two. A rate that misses the p99 gets a second turn, because a short disturbance of the machine
    can make any rate miss it. Several longer turns at the highest rate that keeps the p99 confirm the rate. If they do
    not keep the p99, the next lower rate is tried.

    Args:
        turns: The turns so far.
        protocol: The settings of the benchmark.
        single_qps: Number of sentences per second of the scenario ``single-stream``, tokenising included.
    """
    final = _last_rate(turns)
    if protocol.server_qps:
        return (protocol.server_qps, False) if len(final) < ROUNDS else None
    limit, lowest = protocol.server_p99_ms, LOWEST_SHARE * single_qps
    if not limit or len(turns) >= MOST_TURNS:
        return None
    if not final:
        qps, has_ended = _search(turns, limit, single_qps)
        return (_round_rate(qps), not has_ended) if qps >= lowest else None
    qps = final[0].qps
    if all(turn.planned == len(turn.us) for turn in final) and len(final) < ROUNDS:
        return qps, False
    return None if _keeps(final, limit) or qps / RESOLUTION < lowest else (_round_rate(qps / RESOLUTION), False)


def outcome(turns: Sequence[Turn], protocol: Protocol) -> Outcome:
    """Returns the result of the scenario that consists of these turns."""
    final = _last_rate(turns)
    if protocol.server_qps:
        return Outcome(protocol.server_qps, final)
    if len(final) == ROUNDS and _keeps(final, protocol.server_p99_ms or 0):
        return Outcome(final[0].qps, final)
    lowest = min(turn.qps for turn in turns)
    return Outcome(0.0, [turn for turn in turns if turn.qps == lowest])


def _search(turns: Sequence[Turn], limit: float, single_qps: float) -> tuple[float, bool]:
    """Returns the next rate of the search, and whether the search has ended with this rate."""
    if not turns:
        return START_SHARE * single_qps, False
    passed = {turn.qps for turn in turns if _keeps([turn], limit)}
    misses = Counter(turn.qps for turn in turns if turn.qps not in passed)
    if misses[turns[-1].qps] == 1:
        return turns[-1].qps, False
    high = min(misses, default=math.inf)
    low = max((qps for qps in passed if qps < high), default=0.0)
    if high == math.inf:
        return (low, True) if 2 * low > HIGHEST_FACTOR * single_qps else (2 * low, False)
    if not low:
        return high / 2, False
    return (low, True) if high <= low * RESOLUTION else (math.sqrt(low * high), False)


def _last_rate(turns: Sequence[Turn]) -> list[Turn]:
    """Returns the turns after the search that have the same rate as the last of them."""
    final = [turn for turn in turns if not turn.is_search]
    return [turn for turn in final if turn.qps == final[-1].qps]


def _keeps(turns: Sequence[Turn], p99_ms: float) -> bool:
    """Returns whether the turns answered all queries, and the p99 of their latencies is at most `p99_ms`."""
    complete = all(turn.planned == len(turn.us) for turn in turns)
    return complete and _samples_of(turns).milliseconds()["p99"] <= p99_ms


def _samples_of(turns: Sequence[Turn]) -> Samples:
    return Samples.from_single([list(turn.us) for turn in turns])


def _round_rate(qps: float) -> float:
    """Returns the rate with four significant digits, as reports show it."""
    return float(f"{qps:.4g}")
