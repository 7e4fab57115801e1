"""Regression: what got worse from an old run to a new one of the same machine and data, pair by pair.

Every figure counts as a cost (time, bytes, wrong answers) and its change as a share of the old cost. Two runs are not
interleaved, and a machine drifts between them: times are therefore compared as shares of each run's own baseline. What
slows every row alike cannot be seen so, and a baseline that itself got faster makes all others look slower.
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

_TOLERANCE = 1e-9  # 105 bytes are 5 % more than 100, and a little more in binary


def parse_share(text: str) -> float:
    """``5%`` and ``5`` as 0.05; `ValueError` for what is no percentage from 0 to 100, and for a bare number between 0
    and 1, which may be meant as a share."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(%?)", text.strip())
    percent = float(found[1]) if found else math.inf
    if not found or percent > 100:
        raise ValueError(f"{text!r} is no percentage from 0 to 100, such as 5%")
    if not found[2] and 0 < percent < 1:
        raise ValueError(f"{text!r} may mean {percent:.0%} or {percent:g}%: write the sign")
    return percent / 100


@dataclass(frozen=True)
class Change:
    """One figure of a pair, old and new. `worse` is what it costs more, as a share of the old cost, below 0 less, from
    `low` to `high` at 95 % where there are rounds enough; `may_be_none` where that, or McNemar's test, leaves open
    whether anything changed. None is unknown."""

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
    """A row of the old run and the same cell's of the new one: with its changes, or with how it was `lost`, that is
    which status it has instead or that it is missing."""

    old: Row
    new: Row | None
    changes: tuple[Change, ...] = ()
    lost: str = ""

    @property
    def regressed(self) -> bool:
        """Whether the row was lost or any of its figures got worse."""
        return bool(self.lost) or any(change.regressed for change in self.changes)


@dataclass(frozen=True)
class Regressions:
    """All that was compared under the `limit`, and the cells `apart`: model, cell, and why they were not."""

    limit: float
    pairs: tuple[Pair, ...]
    apart: tuple[tuple[str, str, str], ...]

    @property
    def found(self) -> tuple[Pair, ...]:
        """The pairs that got worse."""
        return tuple(pair for pair in self.pairs if pair.regressed)


class _Key(NamedTuple):
    """What two rows must have in common to be compared; `_APART` says what differs, from the machine on."""

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
    """Compares every row that was measured in `old` with the newest of the same model, cell, machine, data, threads and
    batch size in `new`; `limit` is a share, 0.05 for 5 %.

    * Latency (p50) and throughput regress where they cost more than the limit, and the interval of that excludes no
      change; without an interval, for too few rounds, the limit alone decides. They are taken relative to the baseline
      where both rows have the same, else as they are. A baseline's own times are shown and not judged.
    * Peak memory and size regress by the limit alone.
    * Accuracy regresses where wrong answers (one, where the old row has none) grew by more than the limit, and by
      McNemar's test that is no chance; without the answers, the limit alone decides.
    * A figure that the new row lacks has regressed, one that the old row lacks is not compared.
    * A row that is failed, unavailable or missing now has regressed.

    Raises `ResultFileError` where no pair can be compared.
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
        mend = "Measure both on one machine, the same data and threads, with `toolchain bench`."
        raise ResultFileError(f"The two runs cannot be compared: {why}.", mend)
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
# Of times: the row's gain over its baseline, and the time of every round.
_TIMES: Mapping[str, tuple[Callable[[Row], Ratio | None], Callable[[Measurement], list[float]]]] = {
    "latency_p50_ms": (lambda row: row.speedup, lambda found: found.latency.medians() if found.latency else []),
    "throughput_per_s": (
        lambda row: row.throughput_gain,
        lambda found: found.batches.spent_each() if found.batches else [],
    ),
}


class _Cost(NamedTuple):
    """New cost over old, whether that may be no change, what bears on it, and whether it is judged at all."""

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
    """Of two that were measured apart: the distances of their bounds add up as squares, in logarithms. After Zou and
    Donner 2008, "Construction of confidence limits about effect measures: a general approach"."""
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
    """Raises `VerdictError` where a pair got worse."""
    if not found.found:
        return
    cells = []
    for pair in found.found:
        what = pair.lost.partition(":")[0] or ", ".join(change.figure for change in pair.changes if change.regressed)
        cells.append(f"{pair.old.measurement.cell} ({what})")
    which = f"{len(cells)} of {len(found.pairs)} cells are lost or worse by more than {found.limit * 100:g}%"
    mend = "Look at what changed; if it is meant, compare against a newer run."
    raise VerdictError(f"{which}: {'; '.join(cells)}.", mend)
