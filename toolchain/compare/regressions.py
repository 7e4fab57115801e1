"""Regressions from an old run to a new run on the same machine and data, cell by cell.

Every figure is a cost: time, bytes or wrong answers. A change is a share of the old cost. The rounds of two runs are
not interleaved, and the speed of a machine drifts between runs. Times are therefore relative to the baseline of each
run. This hides a slowdown that affects all rows equally. If the baseline becomes faster, all other rows look slower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from toolchain.errors import ResultFileError, VerdictError
from toolchain.results import statistics
from toolchain.results.statistics import CONFIDENCE, Ratio

if TYPE_CHECKING:
    from toolchain.compare.rows import Row
    from toolchain.results.measurements import Measurement

_TOLERANCE = 1e-9  # in binary arithmetic, 105 bytes are a little more than 5 % above 100 bytes


def parse_share(text: str) -> float:
    """Returns a percentage as a share: 0.05 for ``5%`` and for ``5``.

    Raises:
        ValueError: The text is not a percentage from 0 to 100. A number between 0 and 1 without the sign also raises
            it, because the user may mean a share.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(%?)", text.strip())
    percent = float(found[1]) if found else math.inf
    if not found or percent > 100:
        raise ValueError(f"{text!r} is no percentage from 0 to 100, such as 5%")
    if not found[2] and 0 < percent < 1:
        raise ValueError(f"{text!r} may mean {percent:.0%} or {percent:g}%: write the sign")
    return percent / 100


@dataclass(frozen=True)
class Change:
    """The change of one figure of a pair; None marks an unknown value.

    Attributes:
        figure: Name of the figure.
        old: The old figure.
        new: The new figure.
        regressed: Whether the figure got worse by more than the limit.
        worse: Increase of the cost as a share of the old cost; negative is better.
        low: Lower bound of the 95 % interval of `worse`; None if there are too few rounds.
        high: Upper bound of the 95 % interval of `worse`; None if there are too few rounds.
        may_be_none: Whether the interval or McNemar's test does not exclude zero change.
        remark: Further information about the change; may be empty.
    """

    figure: str
    old: float
    new: float | None
    regressed: bool
    worse: float | None = None
    low: float | None = None
    high: float | None = None
    may_be_none: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Pair:
    """A row of the old run and the row of the same cell in the new run.

    Attributes:
        old: Row of the old run.
        new: Row of the new run; None if it is missing.
        changes: Changes of the figures; empty for a lost row.
        lost: Status and reason of a new row without figures, or ``missing``; empty for a measured row.
    """

    old: Row
    new: Row | None
    changes: tuple[Change, ...] = ()
    lost: str = ""

    @property
    def regressed(self) -> bool:
        """Returns whether the row was lost or any of its figures regressed."""
        return bool(self.lost) or any(change.regressed for change in self.changes)


@dataclass(frozen=True)
class Regressions:
    """The result of comparing two runs.

    Attributes:
        limit: Largest tolerated increase of a cost, as a share.
        pairs: The compared pairs and the lost rows.
        apart: Model, cell and reason of each cell that is not compared.
    """

    limit: float
    pairs: tuple[Pair, ...]
    apart: tuple[tuple[str, str, str], ...]

    @property
    def found(self) -> tuple[Pair, ...]:
        """Returns the pairs that regressed."""
        return tuple(pair for pair in self.pairs if pair.regressed)


class _Key(NamedTuple):
    """Settings that two comparable rows share; `_APART` names a difference in each field from `machine` on."""

    model: str
    cell: str
    machine: str
    data: str
    threads: int | None
    batch: int | None
    device: int | None


_APART = ("another machine", "other data", "another number of threads", "another batch size", "another GPU")


def _key(row: Row) -> _Key:
    run, found = row.run, row.measurement
    gpu = run.run.get("device_id", 0) if found.provider == "cuda" else None
    how = run.run.get("threads"), run.run.get("batch_size"), gpu
    return _Key(found.model, found.cell, run.machine["id"], run.data["sha256"], *how)


def regressions(new: Sequence[Row], old: Sequence[Row], limit: float) -> Regressions:
    """Compares each measured old row with the newest new row of the same settings.

    The settings are model, cell, machine, data, threads, batch size and, for CUDA, the GPU.

    * Latency (p50) and throughput regress if their cost grows by more than the limit and the interval excludes zero
      change. With too few rounds there is no interval, and the limit alone decides.
    * Times are relative to the baseline if both rows have the same baseline. Otherwise they are absolute. A baseline's
      own times are reported but never regress.
    * Peak memory and size regress if they grow by more than the limit.
    * Accuracy regresses if the number of wrong answers grows by more than the limit and McNemar's test is significant.
      An old number of 0 counts as 1. If the answers are unknown, the limit alone decides.
    * A figure that only the old row has regresses. A figure that the old row lacks is not compared.
    * A row regresses if the new row is failed, unavailable or missing.

    Args:
        new: Rows of the new run.
        old: Rows of the old run.
        limit: Largest tolerated increase of a cost, as a share: 0.05 for 5 %.

    Raises:
        ResultFileError: No pair can be compared.
    """
    measured = [row for row in old if row.measurement.status == "ok"]
    before, now = ({_key(row): row for row in sorted(rows, key=lambda r: r.run.created)} for rows in (measured, new))
    pairs, apart = [], []
    for key, row in before.items():
        like = [other for other in now if other[:2] == key[:2]]
        if key in now:
            pairs.append(_pair(row, now[key], limit))
        elif like:
            differ = zip(_APART, key[2:], like[-1][2:], strict=True)
            apart.append((*key[:2], ", ".join(words for words, its, mine in differ if its != mine)))
        else:
            pairs.append(Pair(row, None, lost="missing"))
    if not any(pair.new for pair in pairs):
        why = "; ".join(dict.fromkeys(reason for *_, reason in apart)) or "they share no measured cell"
        hint = "Measure both on one machine, the same data and threads, with `toolchain bench`."
        raise ResultFileError(f"The two runs cannot be compared: {why}.", hint)
    known = {key[:2] for key in before}
    added = [key for key, row in now.items() if key[:2] not in known and row.measurement.status == "ok"]
    apart += [(*key[:2], "not measured in the old run") for key in added]
    return Regressions(limit, tuple(pairs), tuple(apart))


def _pair(old: Row, new: Row, limit: float) -> Pair:
    found = new.measurement
    if found.status != "ok":
        return Pair(old, new, lost=f"{found.status}: {found.reason}".removesuffix(": "))
    figures = {name: was for name, read in _FIGURES.items() if (was := read(old.measurement)) is not None}
    return Pair(old, new, tuple(_change(name, was, old, new, limit) for name, was in figures.items()))


def _change(figure: str, was: float, old: Row, new: Row, limit: float) -> Change:
    now = _FIGURES[figure](new.measurement)
    if now is None:
        return Change(figure, was, None, True, remark="unknown now")
    cost, may_be_none, remark, judged = _cost(figure, old, new)
    low, high = (None if bound is None else bound - 1 for bound in (cost.low, cost.high))
    worse = cost.value - 1
    regressed = judged and not may_be_none and worse - limit > _TOLERANCE
    return Change(figure, was, now, regressed, worse, low, high, may_be_none, remark)


_FIGURES: Mapping[str, Callable[[Measurement], float | None]] = {
    "latency_p50_ms": lambda found: found.latency_ms.get("p50"),
    "throughput_per_s": lambda found: found.throughput_per_s,
    "peak_memory_bytes": lambda found: found.memory_bytes.get("peak"),
    "size_bytes": lambda found: found.size_bytes.get("total"),
    "accuracy": lambda found: found.accuracy.value if found.accuracy else None,
}
# Time figure → the row's gain over its baseline, and the time of each round.
_TIMES: Mapping[str, tuple[Callable[[Row], Ratio | None], Callable[[Measurement], list[float]]]] = {
    "latency_p50_ms": (lambda row: row.speedup, lambda found: found.latency.medians() if found.latency else []),
    "throughput_per_s": (
        lambda row: row.throughput_gain,
        lambda found: found.batches.spent_each() if found.batches else [],
    ),
}


class _Cost(NamedTuple):
    """New cost / old cost, whether the ratio may be 1, a remark, and whether the cost can regress (`judged`)."""

    ratio: Ratio
    may_be_none: bool = False
    remark: str = ""
    judged: bool = True


def _cost(figure: str, old: Row, new: Row) -> _Cost:
    if figure in _TIMES:
        return _time(*_TIMES[figure], old, new)
    if figure == "accuracy":
        return _errors(old, new)
    was, now = (max(_FIGURES[figure](row.measurement) or 0, 1) for row in (old, new))
    return _Cost(Ratio(now / was))


def _time(
    gain: Callable[[Row], Ratio | None], rounds: Callable[[Measurement], list[float]], old: Row, new: Row
) -> _Cost:
    was, now = gain(old), gain(new)
    same = old.baseline and new.baseline and old.baseline.cell == new.baseline.cell
    its_own = old.measurement is old.baseline and new.measurement is new.baseline
    if same and was and now and not its_own:
        cost, remark = _quotient(was, now), f"against {old.baseline.cell} of each run" if old.baseline else ""
    else:
        cost = _quotient(*(_alone(rounds(row.measurement)) for row in (new, old)))
        remark = "the baseline: not judged" if its_own else "no common baseline: the machine's drift is in it"
    return _Cost(cost, cost.differs is False, remark, not its_own)


def _alone(rounds: Sequence[float]) -> Ratio:
    return statistics.ratio(rounds, [1.0] * len(rounds))


def _quotient(one: Ratio, other: Ratio) -> Ratio:
    """Returns the quotient of two ratios from separate runs, with its interval.

    On the logarithmic scale, each bound's squared distance is the sum of the squared distances of the two ratios'
    bounds. See Zou and Donner 2008, "Construction of confidence limits about effect measures: a general approach".
    """
    value = one.value / other.value
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Ratio(value)
    down = math.hypot(math.log(one.value / one.low), math.log(other.high / other.value))
    up = math.hypot(math.log(one.high / one.value), math.log(other.value / other.low))
    return Ratio(value, value * math.exp(-down), value * math.exp(up))


def _errors(old: Row, new: Row) -> _Cost:
    was, now = (row.measurement.accuracy for row in (old, new))
    wrong = [score.count - score.correct if score else 0 for score in (was, now)]
    cost = Ratio(1 + (wrong[1] - wrong[0]) / max(wrong[0], 1))
    quality = replace(new, baseline=old.measurement).quality
    if quality is None or quality.p is None or wrong[0] == wrong[1]:
        return _Cost(cost)
    return _Cost(cost, quality.p >= 1 - CONFIDENCE, f"McNemar p {quality.p:.2g}")


def require_none(found: Regressions) -> None:
    """Requires that no pair regressed.

    Raises:
        VerdictError: A pair regressed.
    """
    if not found.found:
        return
    cells = []
    for pair in found.found:
        what = pair.lost.partition(":")[0] or ", ".join(change.figure for change in pair.changes if change.regressed)
        cells.append(f"{pair.old.measurement.cell} ({what})")
    which = f"{len(cells)} of {len(found.pairs)} cells are lost or worse by more than {found.limit * 100:g}%"
    hint = "Look at what changed; if it is meant, compare against a newer run."
    raise VerdictError(f"{which}: {'; '.join(cells)}.", hint)
