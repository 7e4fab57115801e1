"""Shell completion: built variants, imported models, error codes and files.

The shell calls these functions when the user presses the Tab key, and the user waits for the answer. So the functions
read only the names of folders and at most one result file, and import no large library. If a folder or the file cannot
be read, the functions return no completion, because a message would appear in the middle of the user's line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem


def complete_variants(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Returns the built variants of the model in --model whose names begin with `incomplete`."""
    return _items(_built_variants(context), incomplete)


def complete_variants_or_folders(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Returns variants as `complete_variants` does; without one, the shell completes folders, such as bundles."""
    return _items(_built_variants(context), incomplete) or [CompletionItem(incomplete, type="dir")]


def complete_variants_or_codes(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Returns variants as `complete_variants` does, or error codes if `incomplete` begins as a code does."""
    from toolchain.explain.error_texts import all_explanations

    if incomplete.startswith("E"):
        return _items([explanation.code for explanation in all_explanations()], incomplete)
    return _items(_built_variants(context), incomplete)


def complete_variants_in_result(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Returns the variants in the result file of the argument RESULT whose names begin with `incomplete`."""
    # Before the value of the last option, Click leaves the argument among the words that it has not parsed.
    files = [context.params.get("result"), *context.args]
    return _items(_measured_variants(next((Path(file) for file in files if file), None)), incomplete)


def complete_models(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Returns `reference` and the imported models in --exported; without one, the shell completes folders."""
    return _items(["reference", *_imported_models(context)], incomplete) or [CompletionItem(incomplete, type="dir")]


def complete_files(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Lets the shell complete files and folders."""
    return [CompletionItem(incomplete, type="file")]


def complete_folders(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Lets the shell complete folders."""
    return [CompletionItem(incomplete, type="dir")]


def complete_data(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Returns `sst2`, the embedded data, if the user began its name; otherwise, the shell completes files."""
    embedded = _items(["sst2"], incomplete) if incomplete else []
    return embedded or [CompletionItem(incomplete, type="file")]


def complete_targets(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Returns the targets of `init` whose names begin with `incomplete`."""
    from toolchain.recipes.starter import PLACES

    return _items(PLACES, incomplete)


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(name) for name in sorted(set(names)) if name.startswith(incomplete)]


def _built_variants(context: click.Context) -> list[str]:
    from toolchain.artifacts.manifest import MANIFEST
    from toolchain.artifacts.variants import is_variant
    from toolchain.models.checkpoints import default_folder_name

    model, folder_name = context.params.get("model"), context.params.get("folder_name")
    try:
        folder = _exported(context) / (folder_name or default_folder_name(model or "reference"))
        return [path.name for path in folder.iterdir() if is_variant(path.name) and (path / MANIFEST).is_file()]
    except OSError:
        return []  # no model has this name, or nothing is built


def _measured_variants(file: Path | None) -> list[str]:
    from toolchain.artifacts.variants import is_variant
    from toolchain.system.decoding import read_bytes

    try:
        rows = json.loads(read_bytes(file)).get("rows", []) if file else []
        names = [row.get("variant") for row in rows if isinstance(row, dict)]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return []  # the file is missing, or is not a result file
    return [name for name in names if isinstance(name, str) and is_variant(name)]


def _imported_models(context: click.Context) -> list[str]:
    from toolchain.artifacts.manifest import MANIFEST
    from toolchain.models.checkpoints import FOLDER_NAME, ROOT_VARIANT

    try:
        paths = list(_exported(context).iterdir())
        return [p.name for p in paths if FOLDER_NAME.fullmatch(p.name) and (p / ROOT_VARIANT / MANIFEST).is_file()]
    except OSError:
        return []  # there is no such folder


def _exported(context: click.Context) -> Path:
    return Path(context.params.get("exported") or "exported")
