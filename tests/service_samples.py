"""Result rows with invented service times, for tests of plans."""

import random

from sample_results import RUN, result, row

from toolchain.results.measurements import Samples

SIZES = (2, 4, 8)


def measured(single_us=4000.0, spread=0.2, batch_share=0.6, rounds=8, wake_us=None, seed=1, **changes):
    """Returns a row whose batches of n queries take about `batch_share` * n single times."""
    rng = random.Random(seed)

    def near(us):
        return max(1, round(us * rng.uniform(1 - spread, 1 + spread)))

    latency = Samples.from_single([[near(single_us) for _ in range(40)] for _ in range(rounds)])
    total = Samples.from_single([[us + 100 for us in times] for times in latency.rounds])
    batches = Samples.from_rounds([[near(32 * batch_share * single_us)] for _ in range(rounds)], [[32]] * rounds)
    sizes = [size for size in SIZES for _ in range(4)]
    mixed = Samples.from_rounds(
        [[near(batch_share * size * single_us) for size in sizes] for _ in range(rounds)], [sizes] * rounds
    )
    pauses = {pause: Samples.from_single([[4000 + extra] * 8] * rounds) for pause, extra in (wake_us or {}).items()}
    values = {
        "latency": latency,
        "latency_ms": latency.milliseconds(),
        "with_tokenizing": total,
        "with_tokenizing_ms": total.milliseconds(),
        "batches": batches,
        "throughput_per_s": batches.per_second(),
        "mixed_batches": mixed,
        "after_pause": pauses,
    }
    return row(**{**values, **changes})


def measured_result(*rows, **changes):
    """Returns a result file of the rows, measured with two threads on a machine with two cores."""
    return result(*rows, **{"run": RUN, **changes})
