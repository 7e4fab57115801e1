"""Checks of the arguments of a call; Click makes the same checks for the options of a command."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from toolchain.artifacts import variants
from toolchain.artifacts.names import LABEL
from toolchain.artifacts.store import Artifact
from toolchain.data.labels import MULTI, REGRESSION, TOKENS
from toolchain.errors import SettingsError

# A variant: its artifact, or its name.
Variant = Artifact | str


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises `SettingsError` if the value of the argument `name` is none of the choices."""
    if value in choices:
        return
    similar = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"Did you mean {similar[0]!r}?" if similar else f"Choose one of {', '.join(map(repr, choices))}."
    raise SettingsError(f"There is no `{name}` {value!r}.", hint)


def check_number(name: str, value: object, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raises `SettingsError` if the value of the argument `name` is not a number from `low` to `high`."""
    kind = int if whole else int | float
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        what = "a whole number" if whole else "a number"
        raise SettingsError(f"`{name}` is {value!r}, but it must be {what} {limits}.", "Correct this argument.")


def check_label(name: str) -> str:
    """Returns the label of a variant; raises `SettingsError` if it is invalid."""
    if name and not re.fullmatch(LABEL, name):
        raise SettingsError(
            f"`name` is {name!r}.", "Use at most 100 lower-case letters, digits and single hyphens, such as 'small'."
        )
    return name


def task_of(*, multi_label: bool, regression: bool, entities: bool) -> str | None:
    """Returns the task that the arguments of a training choose; None if all are false.

    Raises:
        SettingsError: More than one argument is true.
    """
    chosen = {MULTI: multi_label, REGRESSION: regression, TOKENS: entities}
    tasks = [task for task, is_chosen in chosen.items() if is_chosen]
    if len(tasks) > 1:
        raise SettingsError("`multi_label`, `regression` and `entities` exclude each other.", "Give only one of them.")
    return tasks[0] if tasks else None


def as_tuple(value: str | Iterable[str]) -> tuple[str, ...]:
    """Returns several texts as a tuple; one text alone is a tuple with this text."""
    return (value,) if isinstance(value, str) else tuple(value)


def variant_names(chosen: Variant | Iterable[Variant], folder: Path) -> tuple[str, ...]:
    """Returns the names of variants.

    Args:
        chosen: One or more variants of one model.
        folder: The folder of this model.

    Raises:
        SettingsError: There is no variant, or one is neither a name nor an artifact of the model.
        UnknownVariantError: There is no variant of this name; the error suggests similar names.
    """
    several = list(chosen) if isinstance(chosen, Iterable) and not isinstance(chosen, str) else [chosen]
    if not several:
        raise SettingsError("The list of variants is empty.", "Give at least one variant, such as 'onnx-int8'.")
    return tuple(dict.fromkeys(variant_name(variant, folder) for variant in several))


def variant_name(variant: Variant, folder: Path) -> str:
    """Returns the name of one variant; see `variant_names`."""
    if isinstance(variant, str):
        return variants.get(variant).name
    if not isinstance(variant, Artifact):
        raise SettingsError(
            f"{variant!r} is not a variant.", "Give the name of a variant, or an artifact that a build method returned."
        )
    if variant.path.parent.resolve() != folder.resolve():
        raise SettingsError(
            f"{variant.path} is an artifact of another model than {folder}.",
            "Use the artifacts that the methods of this model returned.",
        )
    return variant.name
