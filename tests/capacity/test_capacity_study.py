"""Tests of benchmarks/capacity.py on a session whose clock knows no other work."""

import pytest
from readme_parts import script

from toolchain.backends import Place
from toolchain.bench.process import Worker
from toolchain.bench.scenarios import Protocol
from toolchain.data import inputs
from toolchain.data.encoding import Encoder

capacity = script("capacity")
TEXTS = [f"sentence number {i} {'word ' * (i % 7)}" for i in range(80)]
PROTOCOL = Protocol(1, 8.0, 40, 1, 1, batch_size=8, service_times=True, server_p99_ms=capacity.P99_MS)


@pytest.fixture
def variant(fake):
    encoder = Encoder.open(inputs.SST2.parent / "model", ("input_ids", "attention_mask"), 512)
    artifact = fake("m", us=0, clock_us=4000)
    worker = Worker("fake_backend:FakeSession", artifact.path, Place("cpu", 1), encoder, TEXTS[0])
    worker.load(60)
    worker.ask({"do": "data", "texts": TEXTS, "lengths": []}, 60)
    yield capacity.Variant(worker, TEXTS, list(map(len, encoder.encode(TEXTS))), PROTOCOL)
    worker.close()


def test_the_prediction_agrees_with_the_server_on_an_ideal_machine(variant):
    """Each sentence takes 4 ms, also in a batch, so the highest rate is a little below 250 queries/s."""
    qps = variant.highest_rate()
    assert 120 < qps < 250
    taken = capacity.measure(variant, qps, rounds=8)
    assert [len(times) for times in taken.single_us] == 8 * [10]
    rows = capacity.rows_of(taken, qps, PROTOCOL)
    assert [row["share"] for row in rows] == [0.5, 0.7, 0.9]
    for row in rows:
        assert row["p50"]["ratio"] == pytest.approx(1, abs=0.05)
        assert row["p99"]["ratio"] == pytest.approx(1, abs=0.1)
        assert row["mean_batch"]["predicted"] == pytest.approx(row["mean_batch"]["measured"], rel=0.05)
        assert row["p99"]["measured_ms"]["low"] < row["p99"]["measured_ms"]["value"] < row["p99"]["measured_ms"]["high"]
    body = {"variant": "m", "threads": 1, "p99_ms": 50, "highest_qps": qps, "rows": rows}
    assert len(capacity.summary(body)) == 5


def test_a_turn_that_stops_early_ends_the_study(variant, monkeypatch):
    monkeypatch.setattr(capacity.server, "MOST_WAITING_S", 0.05)
    with pytest.raises(capacity.click.ClickException, match="At 90% of the highest rate, queries waited for too long"):
        variant.measure(capacity.Taken(), 0, 0.9, 1000.0)


def test_a_variant_that_is_always_late_has_no_study(fake):
    encoder = Encoder.open(inputs.SST2.parent / "model", ("input_ids", "attention_mask"), 512)
    worker = Worker(
        "fake_backend:FakeSession", fake("late", us=0, clock_us=90_000).path, Place("cpu", 1), encoder, TEXTS[0]
    )
    try:
        worker.load(60)
        worker.ask({"do": "data", "texts": TEXTS, "lengths": []}, 60)
        late = capacity.Variant(worker, TEXTS, [8] * len(TEXTS), PROTOCOL)
        with pytest.raises(capacity.click.ClickException, match="No rate keeps a p99 of 50 ms"):
            late.highest_rate()
    finally:
        worker.close()
