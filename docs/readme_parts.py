"""The parts of the README that are generated: run as a script, it writes them; a test checks that they are current."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import click

from toolchain.cli import cli
from toolchain.compare.report.table import print_table
from toolchain.compare.rows import compare
from toolchain.results.measurements import ResultFile

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCH = ROOT / "benchmarks" / "results" / "reference-xeon-2cores.json"
BENCH_GPU = BENCH.with_name("reference-h100.json")
STUDIES = ROOT / "benchmarks" / "studies"
EXPORT_LOG = ROOT / "benchmarks" / "reports" / "make-export.txt"


def snippet(client: str) -> str:
    """The code the README has for a client."""
    found = re.search(rf"<!-- client: {client} -->\n```\w+\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"the README has no code for {client}"
    return found[1]


def parts() -> dict[str, str]:
    """Marker → what stands between its lines."""
    return {
        "make export": _text(EXPORT_LOG.read_text()),
        "make bench": _bench(BENCH),
        "make bench, gpu": _bench(BENCH_GPU),
        "peers": _peers(),
        "passes": _passes(),
        "pruning": _pruning(),
        "clients": _clients(),
        "precision": _precision(),
        "saturation": _saturation(),
        "commands": _commands(),
    }


def _text(content: str) -> str:
    return f"```text\n{content.rstrip()}\n```"


def _bench(path: Path) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_table(compare([ResultFile.read(path)]))
    return _text("\n".join(line.rstrip() for line in out.getvalue().splitlines()))


def script(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package; it may import others beside it."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def _peers() -> str:
    return _text("\n".join(script("peers").summary(ResultFile.read(STUDIES / "peers-reference.json"))))


def _passes() -> str:
    return _text("\n".join(script("passes").summary(ResultFile.read(STUDIES / "passes-reference.json"))))


def _pruning() -> str:
    return _text(script("pruning").table(json.loads((STUDIES / "pruning-reference.json").read_text())))


def _clients() -> str:
    return _text("\n".join(script("clients").summary(json.loads((STUDIES / "clients-reference.json").read_text()))))


def _precision() -> str:
    return _text("\n".join(script("precision").summary(json.loads((STUDIES / "precision-reference.json").read_text()))))


def _saturation() -> str:
    return _text(
        "\n".join(script("saturation").summary(json.loads((STUDIES / "saturation-reference.json").read_text())))
    )


def _commands() -> str:
    sections = []
    # Under the group's context, as on the command line: it decides what the help option is called.
    group = click.Context(cli, info_name="toolchain", max_content_width=100, **cli.context_settings)
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=name, parent=group)
        sections.append(f"### {name}\n\n" + _text(command.get_help(context)))
    return "\n\n".join(sections)


def filled(text: str) -> str:
    """The README with every generated part written anew."""
    for marker, content in parts().items():
        pattern = re.compile(rf"(<!-- begin: {marker} -->\n).*?(<!-- end: {marker} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        assert count == 1, marker
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
