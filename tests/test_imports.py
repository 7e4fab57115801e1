"""Tests of imports: a room imports only from lower floors, and no module loads a heavy package on import."""

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
# A room is a folder or file directly under toolchain/. A room imports only from lower floors, and never from another
# room on its own floor.
FLOORS = [
    {"errors", "progress"},
    {"system"},
    {"data"},
    {"results"},
    {"artifacts"},
    {"models", "passes"},
    {"backends", "exporters"},
    {"training"},
    {"exits", "pruning", "quantization"},
    {"build"},
    {"bench", "capacity", "compare", "finetune"},
    {"ship", "tuning"},
    {"predict", "doctor", "explain", "recipes", "step_requests"},
    {"distributed"},
    {"cli", "interface"},
    {"reference", "__main__"},
]
FLOOR_OF = {room_name: floor for floor, rooms in enumerate(FLOORS) for room_name in rooms}
CORE = {"system", "results", "data", "artifacts"}


@functools.cache
def paths_by_module():
    """Returns the file of each module, by module name."""
    return {p.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): p for p in ROOT.rglob("*.py")}


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@functools.cache
def imports_of(path, *, include_typing):
    """Returns (imported module, whether the import is at module level) for every import statement of the file."""
    return tuple(_imports(path, include_typing))


def _imports(path, include_typing):
    tree = ast.parse(path.read_text())
    hidden_ids = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not include_typing:
            hidden_ids |= {id(child) for part in node.body for child in ast.walk(part)}
    top_level_ids = {
        id(child)
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden_ids:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top_level_ids) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in top_level_ids
            yield from ((f"{node.module}.{alias.name}", id(node) in top_level_ids) for alias in node.names)


@pytest.mark.parametrize("module", sorted(m for m in paths_by_module() if room_of(m) != "__init__"))
def test_imports_run_in_one_direction(module):
    for imported, _ in imports_of(paths_by_module()[module], include_typing=False):
        imported_room = room_of(imported) if imported.startswith("toolchain.") else ""
        if imported_room in FLOOR_OF and imported_room != room_of(module):
            assert FLOOR_OF[imported_room] < FLOOR_OF[room_of(module)], (
                f"{module} imports {imported}, which is not on a lower floor"
            )


def test_every_folder_and_file_is_a_room_with_a_floor():
    assert {room_of(module) for module in paths_by_module()} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("room_name", ["build.steps", "backends", "passes"])
def test_modules_of_a_room_do_not_import_each_other(room_name):
    exceptions = {
        "passes.model_shape",
        "passes.quantize_embedding",
        "passes.quantize_blocks",
        "passes.quantize_static",
        "passes.__init__",
        "backends.__init__",
    }
    # Each of these five modules defines a subclass of the session class of PyTorch or ONNX Runtime.
    exceptions |= {"backends.bnb", "backends.compiled", "backends.lora", "backends.ort_graphs", "backends.ort_tensorrt"}
    # The modules in `parts` define no session and no pass, so every module of the same room may import them.
    parts = {f"toolchain.backends.{name}" for name in ("reduced", "torchao", "graph_lengths")}
    parts |= {f"toolchain.passes.{name}" for name in ("graph", "int8", "attention")}
    for module, path in paths_by_module().items():
        if not module.startswith(f"toolchain.{room_name}.") or module.removeprefix("toolchain.") in exceptions:
            continue
        for imported, _ in imports_of(path, include_typing=False):
            if imported not in parts and not any(imported.startswith(f"{part}.") for part in parts):
                assert not imported.startswith(f"toolchain.{room_name}."), f"{module} imports {imported}"


RUNNERS = {
    f"toolchain.ship.bundle_files.{name}"
    for name in ("classify", "classify_text", "classify_tokens", "mlflow_model", "serve_app")
}

# These modules define classes that need torch; other files import them inside functions.
NEEDS_TORCH = {
    *("toolchain.models.low_rank", "toolchain.models.skipped_blocks"),
    *("toolchain.training.exit_heads", "toolchain.training.losses"),
}


# The runners of bundles become part of an app that already has numpy, or of MLflow or Ray.
@pytest.mark.parametrize("module", sorted(set(paths_by_module()) - NEEDS_TORCH - RUNNERS))
def test_no_module_imports_a_heavy_package_at_module_level(module):
    for imported, at_top in imports_of(paths_by_module()[module], include_typing=False):
        assert not (at_top and imported.split(".")[0] in HEAVY), f"{module} imports {imported} at module level"


@pytest.mark.parametrize("module", sorted(m for m in paths_by_module() if room_of(m) in CORE))
def test_core_rooms_import_no_runtime(module):
    for imported, _ in imports_of(paths_by_module()[module], include_typing=False):
        assert imported.split(".")[0] not in {"torch", "onnx", "onnxruntime"}, f"{module} imports {imported}"


def test_imports_have_no_cycle():
    graph = {
        module: {
            dependency
            for imported, _ in imports_of(path, include_typing=False)
            for dependency in (imported, f"{imported}.__init__")
            if dependency in paths_by_module()
        }
        for module, path in paths_by_module().items()
    }
    visited, active = set(), []

    def visit(module):
        assert module not in active, " → ".join([*active, module])
        if module in visited:
            return
        active.append(module)
        for dependency in sorted(graph[module]):
            visit(dependency)
        active.pop()
        visited.add(module)

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


def test_files_have_at_most_350_lines_without_docstrings():
    for module, path in paths_by_module().items():
        text = path.read_text()
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and ast.get_docstring(node)]
        docstrings = sum(node.body[0].end_lineno - node.body[0].lineno + 1 for node in nodes)
        # A bundle contains verify.py as one file, so verify.py cannot be split.
        limit = 400 if module == "toolchain.ship.bundle_files.verify" else 350
        assert len(text.splitlines()) - docstrings <= limit, module
