"""Attacks the readers of files for some time, and prints how many attacks were refused, accepted, or escaped.

`make fuzz SECONDS=600` runs it. A reported case runs again with `make fuzz SEED=… CASE=… KIND=…`.
"""

import argparse
import collections
import resource
import secrets
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hostile.harness import run_case, shrink
from hostile.kinds import KINDS

MEMORY_BYTES = 24 << 30


def main() -> int:
    """Runs cases of all kinds in turn until the time is over; returns 1 if a case escaped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", default="")
    parser.add_argument("--case", type=int)
    parser.add_argument("--kind", default="")
    options = parser.parse_args()
    # A foreign model can state sizes for which the machine has no memory; the attack must not end the whole run.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    seed = options.seed or secrets.token_hex(4)
    kinds = [kind for kind in KINDS if options.kind in ("", kind.name)]
    print(f"seed {seed}")
    counts = {kind.name: collections.Counter[str]() for kind in kinds}
    escapes: dict[tuple[str, str], str] = {}
    spent = dict.fromkeys(counts, 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for kind in kinds:
            folders[kind.name] = Path(scratch, kind.name, "valid")
            folders[kind.name].mkdir(parents=True)
            kind.prepare(folders[kind.name])
            outcome = run_case(kind, folders[kind.name], Path(scratch, kind.name, "case"), "", [])
            assert outcome == "accepted", f"the valid files of the kind {kind.name}: {outcome}"
        deadline, case = time.monotonic() + options.seconds, 0
        numbers = dict.fromkeys(counts, 0)
        while time.monotonic() < deadline or options.case is not None:
            kind = min(kinds, key=lambda kind: spent[kind.name])  # each kind gets the same time
            case = numbers[kind.name] if options.case is None else options.case
            started = time.monotonic()
            folder = Path(scratch, kind.name, "case")
            outcome = run_case(kind, folders[kind.name], folder, f"{seed} {kind.name} {case}")
            is_escape = outcome not in ("accepted", "refused")
            counts[kind.name]["escaped" if is_escape else outcome] += 1
            if is_escape and (kind.name, outcome) not in escapes:
                parts = shrink(kind, folders[kind.name], folder, f"{seed} {kind.name} {case}")
                escapes[kind.name, outcome] = f"SEED={seed} CASE={case} KIND='{kind.name}' (mutations {parts})"
            spent[kind.name] += time.monotonic() - started
            numbers[kind.name] += 1
            if options.case is not None:
                break
    print(f"{'kind':28} {'cases':>7} {'refused':>8} {'accepted':>8} {'escapes':>8}")
    for name, count in counts.items():
        print(f"{name:28} {count.total():7} {count['refused']:8} {count['accepted']:8} {count['escaped']:8}")
    for (name, outcome), reproducer in escapes.items():
        print(f"ESCAPE {name}: {outcome}\n  make fuzz {reproducer}")
    return 1 if escapes else 0


if __name__ == "__main__":
    sys.exit(main())
