"""The scenarios of a benchmark, and their sentences, repetitions and rounds.

The scenarios ``single-stream`` and ``offline`` come from MLPerf Inference. ``single-stream`` sends one sentence at a
time, without padding, and sends all sentences equally often. ``offline`` sends all sentences in batches, sorted by
length. ``cold-start`` is the time from the start of a process to its first answer. ``server``, which also comes from
MLPerf Inference, is in `toolchain.bench.server`. The service times of a server are two more kinds of turns: ``mixed
batches`` sends batches of random sentences, and ``pauses`` sends single sentences after pauses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.backends import Place

SINGLE, OFFLINE, SERVER, MIXED, PAUSED = "single-stream", "offline", "server", "mixed batches", "pauses"
SLICES = 8  # Number of rounds that together measure each sentence once.
MOST_SENTENCES = 2000  # Maximum number of sentences at batch size 1; a random sample replaces a larger data set.
FEWEST_SENTENCES = 100
# A batch of several sentences has at most `batch_size * TOKENS_A_SENTENCE` tokens, padding included.
TOKENS_A_SENTENCE = 64
LENGTHS = (16, 32, 64, 128, 256, 512)
LENGTH_SHARE = 0.1  # minimum measuring time for each token count, as a share of a scenario's minimum time
# Fewest batches of each size that a turn of mixed batches measures, and fewest sentences in the batches of one size.
MIXED_BATCHES, MIXED_SENTENCES = 4, 32
# Microseconds of the pauses before single sentences. After a pause, caches are cold and the processor has to wake up.
PAUSES_US = (0, 250, 1000, 4000, 16_000, 64_000)
PAUSED_SENTENCES = 8  # number of sentences that a turn measures once after each pause
# Number of random batches after which a size is left out, because it does not fit. With more tries, the large batches
# would have short sentences only.
MIXED_TRIES = 3


@dataclass(frozen=True)
class Protocol:
    """The settings of a benchmark.

    Attributes:
        passes: Minimum number of times that ``single-stream`` and ``offline`` each measure every sentence.
        min_s: Minimum measuring time in seconds, for each scenario and each cell.
        pass_s: Maximum seconds that the slowest cell takes to answer each sentence once at batch size 1. If the
            slowest cell needs more than `pass_s` seconds for all sentences, all cells answer the same random sample of
            at least `FEWEST_SENTENCES` sentences.
        starts: Number of successive processes of a cell; each process gives one measured cold start.
        threads: Number of threads on the host.
        batch_size: Maximum number of sentences in a batch.
        by_length: Whether to measure, besides the scenarios, the latency for each number of tokens in `LENGTHS`.
        service_times: Whether to measure, besides the scenarios, batches of 2, 4, 8, … random sentences, and single
            sentences after the pauses `PAUSES_US`.
        server_p99_ms: Largest p99 of the scenario ``server`` in milliseconds. The benchmark searches the highest rate
            that keeps this p99; None for no search.
        server_qps: Rate of the scenario ``server`` in queries per second; None for no fixed rate. Without a fixed rate
            and without `server_p99_ms`, the benchmark leaves out the scenario ``server``.
        seed: Seed of the random orders and samples.
        device_id: Index of the GPU for CUDA cells.
        allow_fallback: Whether a session on a GPU may run some operators on the CPU; the cell's row reports a fallback.
    """

    passes: int
    min_s: float
    pass_s: float
    starts: int
    threads: int
    batch_size: int = 32
    by_length: bool = False
    service_times: bool = False
    server_p99_ms: float | None = None
    server_qps: float | None = None
    seed: int = 20
    device_id: int = 0
    allow_fallback: bool = False

    @property
    def rounds(self) -> int:
        """Returns the number of rounds."""
        return SLICES * self.passes

    def place(self, provider: str) -> Place:
        """Returns the `Place` of a session on the provider."""
        return Place(provider, self.threads, self.device_id, self.allow_fallback, batch_size=self.batch_size)

    def needs_fresh_process(self, turn: int) -> bool:
        """Returns whether every cell gets a new process before round `turn`, counted from 0."""
        rounds_per_process = -(-self.rounds // self.starts)
        return turn > 0 and turn % rounds_per_process == 0


# `QUICK` takes about 20 seconds for each cell, and `FULL` about 60 seconds.
QUICK = Protocol(passes=1, min_s=5.0, pass_s=40.0, starts=4, threads=1)
FULL = Protocol(passes=3, min_s=20.0, pass_s=60.0, starts=6, threads=1)


@dataclass(frozen=True)
class Turn:
    """One cell's turn in a round.

    Attributes:
        kind: The kind of turn: the scenario ``single-stream`` or ``offline``, ``mixed batches``, ``pauses``, or a text
            such as ``128 tokens``. The text ``128 tokens`` means that the turn measures one sentence of 128 tokens.
        batches: Indices of the sentences of each batch.
        min_s: Minimum seconds of the turn; the cell repeats the batches until these seconds are over.
    """

    kind: str
    batches: list[list[int]]
    min_s: float


def length_kind(tokens: int) -> str:
    """Returns the name of the turns that measure one sentence of `tokens` tokens."""
    return f"{tokens} tokens"


def choose_sentences(count: int, slowest_s: float, protocol: Protocol) -> list[int]:
    """Returns the indices of the sentences measured at batch 1, in a random order that the seed determines.

    Args:
        count: Number of sentences in the data.
        slowest_s: Seconds per sentence of the slowest cell; 0 if unknown. The function chooses only as many
            sentences as the slowest cell answers in `protocol.pass_s` seconds, but not fewer than `FEWEST_SENTENCES`.
        protocol: The settings of the benchmark.
    """
    limit = min(count, MOST_SENTENCES)
    if slowest_s:
        limit = min(limit, max(FEWEST_SENTENCES, int(protocol.pass_s / slowest_s)))
    return random.Random(protocol.seed).sample(range(count), limit)


def offline_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Returns batches of sentence indices, shortest sentences first.

    A batch with several sentences has at most `size` * `TOKENS_A_SENTENCE` tokens, padding included.

    Args:
        lengths: Number of tokens of each sentence.
        size: Maximum number of sentences in a batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # The sentences come in order of length, so the last sentence of a batch determines the padded length.
        if batches and fits_batch(len(batches[-1]) + 1, lengths[index], size):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def fits_batch(count: int, longest: int, size: int) -> bool:
    """Returns whether a batch may have `count` sentences.

    Args:
        count: Number of sentences, at least 1. One sentence always fits.
        longest: Number of tokens of the longest sentence.
        size: Maximum number of sentences in a batch.
    """
    return count == 1 or (count <= size and count * longest <= size * TOKENS_A_SENTENCE)


def mixed_batches(
    turn: int, sentences: Sequence[int], token_counts: Sequence[int], protocol: Protocol
) -> list[list[int]]:
    """Returns random batches of random sentences, for each size in `batch_sizes`.

    A server receives such batches: their sentences are not sorted by length, so padding takes more time than in the
    scenario ``offline``. Each batch satisfies `fits_batch`. A size is left out if `MIXED_TRIES` random batches of this
    size do not fit.

    Args:
        turn: Number of the round, from 0.
        sentences: Indices of the sentences to choose from.
        token_counts: Number of tokens of each sentence of the data.
        protocol: The settings of the benchmark.
    """
    rng = random.Random(f"{MIXED} {protocol.seed} {turn}")
    batches: list[list[int]] = []
    for size in batch_sizes(protocol.batch_size):
        for _ in range(max(MIXED_BATCHES, MIXED_SENTENCES // size)):
            tries = (rng.choices(sentences, k=size) for _ in range(MIXED_TRIES))
            fitting = (t for t in tries if fits_batch(size, max(token_counts[i] for i in t), protocol.batch_size))
            if (batch := next(fitting, None)) is None:
                break
            batches.append(batch)
    rng.shuffle(batches)
    return batches


def paused_sentences(turn: int, sentences: Sequence[int], protocol: Protocol) -> list[list[int]]:
    """Returns `PAUSED_SENTENCES` random sentences, each as a batch of its own; `turn` is the round, from 0."""
    chosen = random.Random(f"{PAUSED} {protocol.seed} {turn}").choices(sentences, k=PAUSED_SENTENCES)
    return [[index] for index in chosen]


def batch_sizes(largest: int) -> list[int]:
    """Returns the sizes of mixed batches: 2, 4, 8, … below `largest`, and `largest` itself unless it is 1."""
    return [*(1 << power for power in range(1, (largest - 1).bit_length())), *([largest] if largest > 1 else [])]


def turns(
    turn: int,
    sentences: Sequence[int],
    batches: Sequence[list[int]],
    lengths: Sequence[int],
    token_counts: Sequence[int],
    protocol: Protocol,
) -> list[Turn]:
    """Returns the turns of every cell in one round; leaves out turns without a batch.

    Args:
        turn: Number of the round, from 0.
        sentences: Indices of the sentences measured at batch 1.
        batches: All batches of the offline scenario.
        lengths: Token counts of the synthetic sentences, whose indices follow the indices of the data's sentences.
        token_counts: Number of tokens of each sentence of the data.
        protocol: The settings of the benchmark.
    """
    start, min_s = turn % SLICES, protocol.min_s / protocol.rounds
    all_turns = [
        Turn(SINGLE, [[i] for i in sentences[start::SLICES]], min_s),
        Turn(OFFLINE, list(batches[start::SLICES]), min_s),
    ]
    count = sum(map(len, batches))
    all_turns += [Turn(length_kind(n), [[count + i]], min_s * LENGTH_SHARE) for i, n in enumerate(lengths)]
    if protocol.service_times:
        all_turns.append(Turn(MIXED, mixed_batches(turn, sentences, token_counts, protocol), 0.0))
        all_turns.append(Turn(PAUSED, paused_sentences(turn, sentences, protocol), 0.0))
    return [item for item in all_turns if item.batches]
