"""Attacks every kind of file with a fixed seed: each case is refused with one message, or accepted and used safely."""

import json
import random

import pytest
from hostile.attacks import ATTACKS
from hostile.harness import Kind, run_case
from hostile.kinds import KINDS
from hostile.mutations import mutate_bytes, mutate_json

from toolchain.errors import ToolchainError

SEED = "make test"


@pytest.fixture
def attack(tmp_path):
    """Returns a function that attacks a kind of file, and returns the number of each outcome."""

    def run(kind, cases):
        valid, case_folder = tmp_path / "valid", tmp_path / "case"
        valid.mkdir()
        kind.prepare(valid)
        assert run_case(kind, valid, case_folder, SEED, []) == "accepted"
        outcomes = {"accepted": 0, "refused": 0}
        for case in range(cases):
            seed = f"{SEED} {kind.name} {case}"
            outcome = run_case(kind, valid, case_folder, seed)
            assert outcome in outcomes, f"make fuzz SEED='{SEED}' CASE={case} KIND='{kind.name}': {outcome}"
            outcomes[outcome] += 1
        return outcomes

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_attack_is_refused_or_harmless(attack, kind):
    _, cases = ATTACKS[kind.name]
    outcomes = attack(kind, cases)
    assert outcomes["refused"] > cases / 10


def test_the_table_of_attacks_names_every_kind():
    assert list(ATTACKS) == [kind.name for kind in KINDS]


def _read_number(folder, rng):
    number = json.loads((folder / "file.json").read_text())["number"]
    (folder / "kept").write_text("changed") if number == 7 else None
    (folder / f".{'0' * 32}").write_text("partial") if number == 8 else None
    if number < 0:
        raise ToolchainError("The number is negative.")
    1 / number


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (1, "accepted"),
        (-1, "refused"),
        (0, "ZeroDivisionError: division by zero"),
        (7, "changed kept"),
        (8, "left .00"),
    ],
)
def test_the_harness_finds_crashes_and_changed_files(tmp_path, number, outcome):
    def prepare(folder):
        (folder / "file.json").write_text('{"number": 1}')
        (folder / "kept").write_text("")

    def mutate(rng, content):
        return json.dumps({"number": number}).encode()

    kind = Kind("k", prepare, lambda folder: [folder / "file.json"], mutate, _read_number)
    valid = tmp_path / "valid"
    valid.mkdir()
    prepare(valid)
    assert run_case(kind, valid, tmp_path / "case", "s").startswith(outcome)


def test_a_mutation_depends_only_on_its_seed():
    text = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()
    for mutate in (mutate_json, mutate_bytes):
        mutants = [[mutate(random.Random(seed), text) for seed in range(50)] for _ in range(2)]
        assert mutants[0] == mutants[1]
        assert len(set(mutants[0])) > 20
