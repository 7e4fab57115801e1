"""MkDocs hooks: they add pages and images from outside docs/ to the site, and turn help texts into Markdown."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from toolchain.cli import cli

ROOT = Path(__file__).parent.parent
APPS = ("browser-extension", "cpp-cli", "fastapi-service", "node-service", "page")
# Pages link to these files outside docs/, which have the same paths on the site as in the repository.
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/reports/reference.html",
    "benchmarks/reports/reference/accuracy-latency.svg",
    "benchmarks/studies/memory-reference.svg",
    "benchmarks/studies/pruning-reference.svg",
    "examples/README.md",
    "examples/compression_study.ipynb",
    "examples/own_classifier.ipynb",
    *(f"examples/{app}/README.md" for app in APPS),
)
PYTHON = "reference/python"
# The low boost makes the site's search list the pages of Python modules after all other pages.
ROOM = """---
search:
  boost: 0.2
---

::: {module}
    options:
      heading_level: 1
"""


def rooms() -> dict[str, str]:
    """Returns module → page for each room (a folder or file directly under toolchain/), in alphabetical order."""
    package = ROOT / "toolchain"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    names = sorted(folders | {path.stem for path in package.glob("[!_]*.py")})
    return {f"toolchain.{name}": f"{PYTHON}/{name}.md" for name in names}


def _marked(text: str) -> str:
    """Returns a help text with its options marked as code."""
    return re.sub(r"(`[^`]*`)|(--[a-z][a-z-]*)", lambda match: match[1] or f"`{match[2]}`", text)


def _adapt(command: click.Command) -> None:
    """Turns the help texts of a command object into Markdown for mkdocs-click.

    The changed command object is for display only, and no code may run it. For some options, the function overwrites
    the default value by a text that describes the default value.
    """
    text, _, examples = inspect.cleandoc(command.help or "").partition("\b\n")
    command.help = _marked(text)
    if examples:
        title, *lines = examples.rstrip().splitlines()
        command.help += "\n".join([f"**{title}**", "", "```bash", *(line.strip() for line in lines), "```"])
    for option in command.params:
        if isinstance(option, click.Option):
            stated = re.search(r"\s*\[default: (.*)\]$", option.help or "")
            option.help = _marked((option.help or "")[: stated.start() if stated else None])
            option.default = stated[1] if stated else option.default


def on_startup(**_: object) -> None:
    """Turns the help texts of all commands into Markdown."""
    for command in (cli, *cli.commands.values()):
        _adapt(command)


def on_config(config: MkDocsConfig) -> None:
    """Lists the pages of the rooms in the navigation."""
    section: list[Any] = next(entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    modules = next(entry for entry in section if "Python modules" in entry)
    modules["Python modules"] = [{module: page} for module, page in rooms().items()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of `OUTSIDE`, and a page for each room, to the site."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for module, page in rooms().items():
        files.append(File.generated(config, page, content=ROOM.format(module=module)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Returns a page's Markdown with its links corrected for the site, whose root is docs/."""
    if page.file.src_uri in OUTSIDE:
        return re.sub(r"(\]\((?:\.\./)*)docs/", r"\1", markdown)
    outside = "|".join(map(re.escape, OUTSIDE))
    return re.sub(rf"(\]\()\.\./((?:\.\./)*(?:{outside}))", r"\1\2", markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Returns the HTML of a page.

    On reference/cli.md, the function shows the defaults of options as plain text and adds a CSS class to the page.
    """
    if page.file.src_uri != "reference/cli.md":
        return html
    html = re.sub(r"<td>(?:<code>(?:Sentinel.UNSET|False|)</code>|None)</td>\n</tr>", "<td>–</td>\n</tr>", html)
    html = re.sub(r"<td><code>([^<]*)</code></td>\n</tr>", r"<td>\1</td>\n</tr>", html)
    return f'<div class="commands">{html}</div>'
