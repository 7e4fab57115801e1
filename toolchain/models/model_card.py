"""Licence and languages in the front matter of a checkpoint's model card."""

from __future__ import annotations

import re
from pathlib import Path

from toolchain.models.checkpoints import MODEL_CARD, REFERENCE, REFERENCE_LICENSE

LIMIT = 1 << 20  # The toolchain reads at most this number of characters of a model card.
# Matches a licence line in the front matter of a model card. A YAML parser would be unsafe for the front matter of a
# model card, because YAML aliases can expand without limit.
_LICENSE_LINE = re.compile(
    r"""^(license|license_name):[ \t]*(["']?)(\w[\w .+()-]{0,99}?)\2[ \t]*(?:#.*)?$""", re.M | re.A
)
# Matches the languages in the front matter of a model card: one code, a list in brackets, or one code on each line.
_LANGUAGES = re.compile(r"^language:[ \t]*(\[[^\]\n]*\]|[^\s#-][^\n#]*|(?:\n[ \t]*-[ \t][^\n#]*)+)", re.M)
_LANGUAGE = re.compile(r"(?<![\w-])[a-z]{2,3}(?![\w-])", re.A)


def license_of(folder: Path) -> str | None:
    """Returns the licence in the checkpoint's model card; None unless the model card states exactly one licence."""
    if folder == REFERENCE:
        return REFERENCE_LICENSE
    if not (folder / MODEL_CARD).is_file():
        return None
    values = {key: value for key, _, value in _LICENSE_LINE.findall(_front_matter(folder))}
    name = values.get("license")
    return values.get("license_name", name) if name == "other" else name


def languages_of(folder: Path) -> list[str]:
    """Returns the ISO 639 codes of the languages in the checkpoint's model card; at most 100, empty without any."""
    match = _LANGUAGES.search(_front_matter(folder)) if (folder / MODEL_CARD).is_file() else None
    return list(dict.fromkeys(_LANGUAGE.findall(match[1])))[:100] if match else []


def _front_matter(folder: Path) -> str:
    with (folder / MODEL_CARD).open(encoding="utf-8-sig", errors="replace") as file:
        front_matter = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", file.read(LIMIT), re.S | re.M)
    return front_matter[1] if front_matter else ""
