"""The explanation of a variant as lines of plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from toolchain.bench.operators import largest_shares
from toolchain.explain.origin import BUILT, CHANGED, MISSING, Ancestor
from toolchain.explain.relatives import UNUSABLE, MeasuredCell, MeasuredRun, Relative
from toolchain.explain.variant import Bytes, Explanation, Time

_STATES = {
    CHANGED: "another build replaced it later, so the steps before this build are unknown",
    MISSING: "its folder no longer exists, so the steps before it are unknown",
}
_RELATIVE_STATES = {MISSING: "not built", UNUSABLE: "unusable"}
_SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b")  # also the commit of a hub model, which has 40 digits
_SCORES = {"accuracy": "accuracy {:.2%}", "regression": "R² {:.3f}", "entities": "F1 {:.3f}"}


def page_lines(explanation: Explanation) -> Iterator[str]:
    """Yields the lines of the page."""
    size = _size(explanation.size_bytes)
    seal = "" if explanation.sealed else ", unsealed"
    yield f"{explanation.variant} of {explanation.model}: {size}, built {explanation.created}{seal}"
    yield f"id {explanation.id}, runs on {' and '.join(explanation.providers)}"
    sections = (
        ("How it was built", _origin_lines(explanation.lineage)),
        ("Where its bytes go", _byte_lines(explanation.bytes)),
        ("Where its time goes", _time_lines(explanation)),
        ("Compare it with", _relative_lines(explanation.relatives)),
        ("Measured in", _result_lines(explanation.results)),
    )
    for title, lines in sections:
        yield ""
        yield title
        yield from (f"  {line}" for line in lines)


def _origin_lines(lineage: Sequence[Ancestor]) -> Iterator[str]:
    for ancestor in lineage:
        if ancestor.state != BUILT:
            yield f"{ancestor.variant}: {_STATES[ancestor.state]}"
            continue
        settings = ", ".join(f"{name}={_value(value)}" for name, value in (ancestor.settings or {}).items())
        size = f"; {_size(ancestor.size_bytes)}" if ancestor.size_bytes else ""
        yield f"{ancestor.variant}: {ancestor.step}{f' ({settings})' if settings else ''}{size}"
        yield from (f"  * {summary}" for summary in ancestor.summaries)


def _value(value: object) -> str:
    """Returns a setting as text, with only the first digits of each sha256."""
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return _SHA256.sub(r"\1…", text)


def _byte_lines(sizes: Bytes) -> Iterator[str]:
    total = sum(sizes.files.values())
    weights = {f"weights of the {part}": count for part, count in sizes.by_part.items()}
    rest = total - sum(weights.values())
    if weights and rest >= 0:
        yield from _share_lines({**weights, "graph, tokenizer and config": rest}, total)
    else:
        yield from _share_lines(sizes.files, total)
    if sizes.by_dtype:
        largest_first = sorted(sizes.by_dtype.items(), key=lambda item: -item[1])
        yield f"By type: {', '.join(f'{dtype} {_size(count)}' for dtype, count in largest_first)}"


def _share_lines(sizes: Mapping[str, int], total: int) -> Iterator[str]:
    rows = [(name, _size(count), f"{count / total:6.1%}") for name, count in sizes.items() if count]
    return _columns(sorted(rows, key=lambda row: -sizes[row[0]]))


def _time_lines(explanation: Explanation) -> Iterator[str]:
    if explanation.time:
        yield from _profile_lines(explanation.time)
    elif explanation.variant.startswith("onnx") and "cpu" in explanation.providers:
        yield f"`toolchain explain {explanation.variant} --profile` measures each operator on this machine."
    else:
        yield "Only ONNX variants for the CPU have a profile of their operators."


def _profile_lines(time: Time) -> Iterator[str]:
    threads = "one thread" if time.threads == 1 else f"{time.threads} threads"
    yield f"{time.texts} single texts of {time.data}, {threads}:"
    yield f"{time.tokenizing_us / 1000:.3f} ms for tokenising, {time.graph_us / 1000:.3f} ms for the graph, of which"
    yield from _columns([(name, f"{share:6.1%}") for name, share in largest_shares(time.operator_shares)])


def _relative_lines(relatives: Sequence[Relative]) -> Iterator[str]:
    if not relatives:
        yield "It is the imported model, so other variants are compared with it."
    yield from _columns(
        [
            (
                relative.variant,
                _size(relative.size_bytes) if relative.size_bytes else _RELATIVE_STATES[relative.state],
                ", ".join(relative.relations),
            )
            for relative in relatives
        ]
    )


def _result_lines(results: Sequence[MeasuredRun]) -> Iterator[str]:
    if not results:
        yield "No result file has this artifact; `toolchain bench` measures it."
    for run in results:
        yield f"{run.file}: {run.created}, {run.machine}, {run.data}"
        yield from (f"  {line}" for line in _columns([_cell_row(cell) for cell in run.cells]))


def _cell_row(cell: MeasuredCell) -> tuple[str, ...]:
    score = _SCORES[cell.score].format(cell.value)
    return cell.cell, score, f"p50 {cell.p50_ms:.2f} ms", f"{cell.sentences_per_s:.0f} sentences/s"


def _columns(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yields rows as lines with aligned columns: the first column to the left, the middle ones to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        middle = [text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *middle, row[-1]])


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e6:.1f} MB" if count >= 50_000 else f"{count / 1e3:.1f} kB"
