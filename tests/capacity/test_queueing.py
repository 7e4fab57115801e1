"""Tests of the simulated queues: queueing theory, the benchmark's own server, and properties of batches."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from fake_backend import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.bench import worker
from toolchain.capacity.queueing import Batching, serve

COUNT = 100_000
SEEDS = range(10)


def poisson(rate, seed, count=COUNT):
    return np.random.default_rng(seed).standard_exponential(count).cumsum() / rate


def constant(seconds, count=COUNT):
    return lambda size: [seconds] * count


def mean_waits(load, service_of_seed):
    """Returns the mean waiting time of each seed at one replica whose mean service time is 1."""
    waits = []
    for seed in SEEDS:
        service = service_of_seed(seed)
        latencies = serve(poisson(load, seed), lambda _, times=service: times, Batching()).latencies_s
        waits.append(float(latencies.mean()) - float(np.mean(service)))
    return waits


def interval(values):
    """Returns an interval that contains the true mean in more than 99.9 % of the cases."""
    half = 5 * np.std(values, ddof=1) / math.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_with_constant_service_is_that_of_pollaczek_and_khinchine(load):
    low, high = interval(mean_waits(load, lambda _: [1.0] * COUNT))
    assert low <= load / (2 * (1 - load)) <= high
    assert high - low < 0.2 * load / (2 * (1 - load))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_with_exponential_service_is_that_of_an_m_m_1_queue(load):
    waits = mean_waits(load, lambda seed: np.random.default_rng([seed, 7]).standard_exponential(COUNT).tolist())
    low, high = interval(waits)
    assert low <= load / (1 - load) <= high
    assert high - low < 0.25 * load / (1 - load)


def test_the_latency_of_an_m_m_1_queue_has_an_exponential_distribution():
    load, p99s = 0.6, []
    for seed in SEEDS:
        service = np.random.default_rng([seed, 7]).standard_exponential(COUNT).tolist()
        p99s.append(np.quantile(serve(poisson(load, seed), lambda _, t=service: t, Batching()).latencies_s, 0.99))
    low, high = interval(p99s)
    assert low <= -math.log(0.01) / (1 - load) <= high


@pytest.mark.parametrize(("replicas", "load"), [(2, 0.7), (8, 0.9)])
def test_replicas_with_one_queue_wait_as_the_formula_of_erlang_says(replicas, load):
    offered = replicas * load
    terms = [offered**n / math.factorial(n) for n in range(replicas)]
    last = offered**replicas / math.factorial(replicas) / (1 - load)
    expected = last / (sum(terms) + last) / (replicas * (1 - load))
    waits = []
    for seed in SEEDS:
        service = np.random.default_rng([seed, 7]).standard_exponential(COUNT)
        times = service.tolist()
        latencies = serve(poisson(offered, seed), lambda _, t=times: t, Batching(), replicas).latencies_s
        waits.append(float((latencies - service).mean()))
    low, high = interval(waits)
    assert low <= expected <= high


times_s = st.lists(st.floats(0.001, 5), min_size=1, max_size=80)


@settings(deadline=None)
@given(gaps=times_s, services=st.lists(st.floats(0.001, 5), min_size=80, max_size=80), replicas=st.integers(1, 6))
def test_more_replicas_with_one_queue_never_make_a_query_later(gaps, services, replicas):
    arrivals = np.cumsum(gaps)
    fewer, more = (
        serve(arrivals, lambda _: services, Batching(), count).latencies_s for count in (replicas, replicas + 1)
    )
    assert (more <= fewer + 1e-9).all()
    assert np.quantile(more, 0.99) <= np.quantile(fewer, 0.99) + 1e-9
    assert (fewer >= np.array(services[: len(gaps)]) - 1e-9).all()


@settings(deadline=None)
@given(
    gaps=times_s,
    largest=st.integers(1, 8),
    window_s=st.sampled_from([0.0, 0.3, 2.0]),
    replicas=st.integers(1, 3),
    wake_s=st.sampled_from([0.0, 0.5]),
)
def test_every_query_is_answered_once_and_waits_at_most_for_the_window(gaps, largest, window_s, replicas, wake_s):
    arrivals, sizes = np.cumsum(gaps), []

    def service(size):
        sizes.append(size)
        return [0.1 * size] * len(gaps)

    outcome = serve(arrivals, service, Batching(largest, window_s), replicas, lambda _: wake_s)
    assert len(outcome.latencies_s) == len(gaps)
    assert max(sizes) <= largest
    assert len(gaps) / largest <= outcome.batches <= len(gaps)
    assert outcome.busy_s >= 0.1 * len(gaps) - 1e-9
    assert outcome.latencies_s.min() >= 0.1 - 1e-9
    # With a replica for each query, a query waits for no other one.
    free = serve(arrivals, service, Batching(largest, window_s), len(gaps), lambda _: wake_s)
    waiting = (window_s if largest > 1 else 0.0) + wake_s
    assert free.latencies_s.max() <= waiting + 0.1 * largest + 1e-9


def test_a_window_gathers_a_batch_and_a_full_batch_ends_it():
    arrivals = np.array([0.0, 0.2, 0.4, 3.0])
    service = constant(1.0, 4)
    assert serve(arrivals, service, Batching(8, 0.0)).latencies_s == pytest.approx([1.0, 1.8, 1.6, 1.0])
    assert serve(arrivals, service, Batching(8, 0.5)).latencies_s == pytest.approx([1.5, 1.3, 1.1, 1.5])
    assert serve(arrivals, service, Batching(3, 0.5)).latencies_s == pytest.approx([1.4, 1.2, 1.0, 1.5])
    assert serve(arrivals, service, Batching(1, 0.5)).latencies_s == pytest.approx([1.0, 1.8, 2.6, 1.0])


def test_a_huge_batch_needs_no_table_of_its_size():
    assert serve(np.array([1.0, 1.0]), constant(1.0, 2), Batching(10**12)).latencies_s.tolist() == [1.0, 1.0]


def test_idle_time_makes_only_the_next_batch_slower():
    latencies = serve(
        np.array([1.0, 1.1, 9.0]), constant(1.0, 3), Batching(), 1, lambda idle_s: 0.1 * idle_s
    ).latencies_s
    assert latencies == pytest.approx([1.1, 2.0, 1.0 + 0.1 * (9.0 - 3.1)])


@settings(deadline=None, max_examples=50)
@given(
    gaps_us=st.lists(st.integers(2, 4000), min_size=1, max_size=60),  # the clock of the worker begins at 1
    largest=st.integers(1, 8),
    base_us=st.integers(1, 2000),
    each_us=st.integers(1, 900),
)
def test_the_server_of_the_benchmark_takes_the_same_batches(gaps_us, largest, base_us, each_us):
    """The worker answers the arrivals on a clock on which only its pauses and its batches take time."""
    arrivals_us = np.cumsum(gaps_us).tolist()
    clock = Clock()
    child = object.__new__(worker._Child)
    child._ids, child._encode_batch = [[0]], lambda batch: batch
    runs = iter([0] * min(2, len(gaps_us)))  # the sentences of the warm-up

    def answer(batch):
        if next(runs, None) is None:
            clock.sleep((base_us + each_us * len(batch)) / 1e6)

    child._session = SimpleNamespace(run=answer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "time", clock)
        reply = child.server(arrivals_us, [0] * len(arrivals_us), 10**9, len(arrivals_us), batch_size=largest)
    outcome = serve(  # in microseconds, which are exact
        np.array(arrivals_us, float), lambda size: [base_us + each_us * size] * len(arrivals_us), Batching(largest)
    )
    assert outcome.batches == len(reply["sizes"])
    assert outcome.latencies_s.tolist() == reply["us"]
