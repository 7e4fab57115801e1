"""Attacks the readers of files for some time, and prints how many attacks were refused, accepted, or escaped.

`make fuzz SECONDS=600` runs it. A reported case runs again with `make fuzz SEED=… CASE=… KIND=…`.
"""

import argparse
import collections
import functools
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hostile.harness import LONGEST_S, shrink
from hostile.kinds import KINDS

from toolchain.errors import ToolchainError
from toolchain.system.child import Child

PREPARE_S = 120.0  # seconds to write the valid files of one kind


class CaseError(ToolchainError):
    """The process of a case crashed, or did not end within its time."""


class _Process(Child):
    """A new child process for cases."""

    def __init__(self, scratch: Path) -> None:
        super().__init__("hostile.case_worker", {"PYTHONPATH": os.pathsep.join(sys.path)})
        self.ask({"scratch": str(scratch)}, None)

    def _make_error(self, cause: str) -> CaseError:
        return CaseError(cause)


class Cases:
    """Runs cases in a child process, and starts a new child if a case ends it.

    Args:
        scratch: Folder for the files of all kinds.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._process = _Process(scratch)

    def prepare(self, kind: str) -> None:
        """Writes the valid files of a kind, and checks that they are accepted."""
        self._process.ask({"do": "prepare", "kind": kind}, PREPARE_S)
        outcome = self.run(kind, "", [])
        assert outcome == "accepted", f"the valid files of the kind {kind}: {outcome}"

    def run(self, kind: str, seed: str, parts: Sequence[int] | None = None) -> str:
        """Returns the outcome of one case; see `run_case`."""
        try:
            reply = self._process.ask({"do": "run", "kind": kind, "seed": seed, "parts": parts}, 2 * LONGEST_S)
            return str(reply["outcome"])
        except CaseError as error:
            self.close()
            self._process = _Process(self._scratch)
            return error.cause

    def close(self) -> None:
        """Ends the child process."""
        self._process.close()


def main() -> int:
    """Runs cases of all kinds in turn until the time is over; returns 1 if a case escaped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", default="")
    parser.add_argument("--case", type=int)
    parser.add_argument("--kind", default="")
    options = parser.parse_args()
    seed = options.seed or secrets.token_hex(4)
    kinds = [kind.name for kind in KINDS if options.kind in ("", kind.name)]
    print(f"seed {seed}")
    counts = {kind: collections.Counter[str]() for kind in kinds}
    escapes: dict[tuple[str, str], str] = {}
    spent = dict.fromkeys(kinds, 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        cases = Cases(Path(scratch))
        for kind in kinds:
            cases.prepare(kind)
        deadline = time.monotonic() + options.seconds
        while time.monotonic() < deadline or options.case is not None:
            kind = min(kinds, key=lambda name: spent[name])  # each kind gets the same time
            number = counts[kind].total() if options.case is None else options.case
            started = time.monotonic()
            case_seed = f"{seed} {kind} {number}"
            outcome = cases.run(kind, case_seed)
            is_escape = outcome not in ("accepted", "refused")
            counts[kind]["escaped" if is_escape else outcome] += 1
            if is_escape and (kind, outcome) not in escapes:
                parts = shrink(case_seed, functools.partial(cases.run, kind, case_seed))
                escapes[kind, outcome] = f"SEED={seed} CASE={number} KIND='{kind}' (mutations {parts})"
            spent[kind] += time.monotonic() - started
            if options.case is not None:
                break
        cases.close()
    print(f"{'kind':28} {'cases':>7} {'refused':>8} {'accepted':>8} {'escapes':>8}")
    for kind, count in counts.items():
        print(f"{kind:28} {count.total():7} {count['refused']:8} {count['accepted']:8} {count['escaped']:8}")
    for (kind, outcome), reproducer in escapes.items():
        print(f"ESCAPE {kind}: {outcome}\n  make fuzz {reproducer}")
    return 1 if escapes else 0


if __name__ == "__main__":
    sys.exit(main())
