"""Imports run from higher floors to lower ones, and light modules import no heavy library."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import toolchain

ROOT = Path(toolchain.__file__).parent
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "optimum", "datasets", "numpy", "pandas", "rich"}
HEAVY |= {"matplotlib", "jinja2", "scipy", "optuna", "peft", "ray"}
# A room imports from floors below its own, and never from a room beside it.
FLOORS = [
    {"errors", "progress"},
    {"system"},
    {"results"},
    {"data"},
    {"artifacts"},
    {"models", "passes"},
    {"backends", "exporters"},
    {"training"},
    {"pruning", "quantization"},
    {"build"},
    {"bench", "compare", "finetune"},
    {"ship", "tuning"},
    {"predict", "doctor"},
    {"distributed"},
    {"cli"},
    {"reference", "__main__"},
]
FLOOR_OF = {room_name: floor for floor, rooms in enumerate(FLOORS) for room_name in rooms}
CORE = {"system", "results", "data", "artifacts"}


@functools.cache
def modules():
    """Module name → its file."""
    return {p.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): p for p in ROOT.rglob("*.py")}


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@functools.cache
def imports(path, *, typing_too):
    """(imported module, whether at module level) of every import statement of the file."""
    return tuple(_imports(path, typing_too))


def _imports(path, typing_too):
    tree = ast.parse(path.read_text())
    hidden = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing_too:
            hidden |= {id(child) for part in node.body for child in ast.walk(part)}
    top = {
        id(child)
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


@pytest.mark.parametrize("module", sorted(m for m in modules() if room(m) != "__init__"))
def test_imports_run_one_way(module):
    for imported, _ in imports(modules()[module], typing_too=False):
        other = room(imported) if imported.startswith("toolchain.") else ""
        if other in FLOOR_OF and other != room(module):
            assert FLOOR_OF[other] < FLOOR_OF[room(module)], f"{module} imports {imported}, which is not below it"


def test_every_folder_and_file_is_a_room_with_a_floor():
    assert {room(module) for module in modules()} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("room_name", ["build.steps", "backends", "passes"])
def test_neighbours_in_a_room_do_not_call_each_other(room_name):
    allowed = {
        "passes.model_shape",
        "passes.quantize_embedding",
        "passes.quantize_blocks",
        "passes.quantize_static",
        "passes.__init__",
        "backends.__init__",
    }
    allowed |= {"backends.bnb", "backends.lora"}  # PyTorch sessions with another loader
    parts = {f"toolchain.backends.{name}" for name in ("reduced",)}  # no session of its own
    parts |= {f"toolchain.passes.{name}" for name in ("graph", "int8", "attention")}  # no pass of its own
    for module, path in modules().items():
        if not module.startswith(f"toolchain.{room_name}.") or module.removeprefix("toolchain.") in allowed:
            continue
        for imported, _ in imports(path, typing_too=False):
            if imported not in parts and not any(imported.startswith(f"{part}.") for part in parts):
                assert not imported.startswith(f"toolchain.{room_name}."), f"{module} imports {imported}"


RUNNERS = {"toolchain.ship.bundle_files.classify", "toolchain.ship.bundle_files.classify_text"}


# Module classes must be defined with torch at hand; functions import this file where they need it.
# The runners of bundles are an app's code, read by people who have numpy at hand.
@pytest.mark.parametrize(
    "module", sorted(set(modules()) - {"toolchain.models.skipped_blocks", "toolchain.training.losses", *RUNNERS})
)
def test_nothing_heavy_is_imported_before_it_is_needed(module):
    for imported, at_top in imports(modules()[module], typing_too=False):
        assert not (at_top and imported.split(".")[0] in HEAVY), f"{module} imports {imported} at module level"


@pytest.mark.parametrize("module", sorted(m for m in modules() if room(m) in CORE))
def test_core_knows_no_runtime(module):
    for imported, _ in imports(modules()[module], typing_too=False):
        assert imported.split(".")[0] not in {"torch", "onnx", "onnxruntime"}, f"{module} imports {imported}"


def test_there_is_no_cycle():
    graph = {
        module: {
            other
            for imported, _ in imports(path, typing_too=False)
            for other in (imported, f"{imported}.__init__")
            if other in modules()
        }
        for module, path in modules().items()
    }
    done, active = set(), []

    def visit(module):
        assert module not in active, " → ".join([*active, module])
        if module in done:
            return
        active.append(module)
        for other in sorted(graph[module]):
            visit(other)
        active.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["bench", "--help"], ["export", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from toolchain.cli import main; code = main(sys.argv[1:]); "
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert run.stderr.strip() == "[]"


def test_files_can_be_read_in_one_sitting():
    for module, path in modules().items():
        text = path.read_text()
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)]
        docstrings = sum(node.body[0].end_lineno - node.body[0].lineno + 1 for node in nodes)
        assert len(text.splitlines()) - docstrings <= 350, module
