"""Hooks of MkDocs: pages and images of the site that do not lie in docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Files of the repository that pages link to; on the site they have the same path.
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/reports/reference.html",
    "benchmarks/reports/reference/accuracy-latency.svg",
    "benchmarks/studies/pruning-reference.svg",
)
PYTHON = "reference/python"


def rooms() -> dict[str, str]:
    """Returns the rooms of the package, in order: module → page."""
    package = ROOT / "toolchain"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    names = sorted(folders | {path.stem for path in package.glob("[!_]*.py")})
    return {f"toolchain.{name}": f"{PYTHON}/{name}.md" for name in names}


def on_config(config: MkDocsConfig) -> None:
    """Lists the pages of the rooms in the navigation."""
    section: list[Any] = next(entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    modules = next(entry for entry in section if "Python modules" in entry)
    modules["Python modules"] = [{module: page} for module, page in rooms().items()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of `OUTSIDE`, and a page for each room."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for module, page in rooms().items():
        files.append(File.generated(config, page, content=f"# {module}\n\n::: {module}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Returns the text with links that are right on the site, where docs/ is the root."""
    if page.file.src_uri in OUTSIDE:
        return re.sub(r"(\]\()docs/", r"\1", markdown)
    outside = "|".join(map(re.escape, OUTSIDE))
    return re.sub(rf"(\]\()\.\./((?:\.\./)*(?:{outside}))", r"\1\2", markdown)
