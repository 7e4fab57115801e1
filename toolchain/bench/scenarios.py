"""What is asked, how often, and in which rounds: the scenarios of MLPerf Inference, for text classifiers.

``single-stream`` asks one sentence at a time, every one equally often, each at its own length; ``offline`` has them all
at hand and sends them in batches sorted by length; ``cold-start`` is from the start of a process to its first answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.backends import Place

SINGLE, OFFLINE = "single-stream", "offline"
SLICES = 8  # the set is spread over this many rounds; a pass is over when each had its turn
MOST_SENTENCES = 2000  # at batch 1; a larger set is sampled
FEWEST_SENTENCES = 100
TOKENS_A_SENTENCE = 64  # the token budget of a batch, padding included, is this times its size
LENGTHS = (16, 32, 64, 128, 256, 512)
LENGTH_SHARE = 0.1  # of a scenario's time, for each length


@dataclass(frozen=True)
class Protocol:
    """How much and how: each of the two scenarios asks every sentence at least `passes` times and lasts at least
    `min_s` seconds a cell; a cell is measured in `starts` processes one after another, each of them a cold start.

    `pass_s` caps one batch-1 pass of the slowest cell: a larger set is sampled, the same sentences for all. With
    `by_length`, latency is also taken at each of `LENGTHS` tokens. CUDA cells run on the GPU `device_id`;
    `allow_fallback` measures a session that runs on the CPU in part, as what it is.
    """

    passes: int
    min_s: float
    pass_s: float
    starts: int
    threads: int
    batch_size: int = 32
    by_length: bool = False
    seed: int = 20
    device_id: int = 0
    allow_fallback: bool = False

    @property
    def rounds(self) -> int:
        """How often each cell has its turn."""
        return SLICES * self.passes

    def place(self, provider: str) -> Place:
        """Where a cell on that provider runs."""
        return Place(provider, self.threads, self.device_id, self.allow_fallback)

    def starts_anew(self, turn: int) -> bool:
        """Whether every cell gets a fresh process before this round."""
        each = -(-self.rounds // self.starts)
        return turn > 0 and turn % each == 0


# About 20 and 60 seconds a cell.
QUICK = Protocol(passes=1, min_s=5.0, pass_s=40.0, starts=4, threads=1)
FULL = Protocol(passes=3, min_s=20.0, pass_s=60.0, starts=6, threads=1)


@dataclass(frozen=True)
class Turn:
    """One cell's part of a round: batches of sentences by index, again and again for at least `min_s` seconds."""

    kind: str
    batches: list[list[int]]
    min_s: float


def of_length(tokens: int) -> str:
    """The kind of a turn of one sentence of so many tokens."""
    return f"{tokens} tokens"


def choose(count: int, slowest_s: float, protocol: Protocol) -> list[int]:
    """The sentences asked at batch 1, in seeded order: all `count`, or as many as the slowest cell, at `slowest_s`
    seconds each, can answer in time."""
    limit = min(count, MOST_SENTENCES)
    if slowest_s:
        limit = min(limit, max(FEWEST_SENTENCES, int(protocol.pass_s / slowest_s)))
    return random.Random(protocol.seed).sample(range(count), limit)


def offline_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """All sentences in batches, shortest first: at most `size` of them, and no more tokens than the budget allows."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        fits = batches and len(batches[-1]) < size
        # Sorted, so the newest is the longest and all are padded to it.
        if fits and (len(batches[-1]) + 1) * lengths[index] <= size * TOKENS_A_SENTENCE:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def turns(
    turn: int, sentences: Sequence[int], batches: Sequence[list[int]], lengths: Sequence[int], protocol: Protocol
) -> list[Turn]:
    """What every cell is asked in that round; sentences of these `lengths` lie behind those of the set."""
    part, min_s = turn % SLICES, protocol.min_s / protocol.rounds
    found = [
        Turn(SINGLE, [[i] for i in sentences[part::SLICES]], min_s),
        Turn(OFFLINE, list(batches[part::SLICES]), min_s),
    ]
    count = sum(map(len, batches))
    found += [Turn(of_length(n), [[count + i]], min_s * LENGTH_SHARE) for i, n in enumerate(lengths)]
    return [each for each in found if each.batches]
