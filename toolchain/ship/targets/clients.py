"""The npm packages that run a bundle in a browser and in Node, pinned by a lock file and installed once."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

from toolchain.artifacts.publishing import lock, replace, scratch_folder
from toolchain.errors import ShippingError

PACKAGES = Path(__file__).parent / "packages"
LOCK = "package-lock.json"
TRANSFORMERS, RUNTIME = "@huggingface/transformers", "onnxruntime-web"
DEPENDENCIES = (TRANSFORMERS, RUNTIME, "onnxruntime-node")


def browser_files(*, webgpu: bool) -> dict[str, str]:
    """Returns the files of the demo page: path in a bundle → file under node_modules.

    Args:
        webgpu: Whether the page needs the build of `RUNTIME` with WebGPU and WebAssembly. It is about twice as large as
            the build with only WebAssembly.
    """
    build, wasm = ("ort.webgpu", "asyncify.") if webgpu else ("ort.wasm", "")
    return {
        "demo/transformers.min.js": f"{TRANSFORMERS}/dist/transformers.web.min.js",
        "demo/transformers.LICENSE": f"{TRANSFORMERS}/LICENSE",
        "demo/ort.min.mjs": f"{RUNTIME}/dist/{build}.min.mjs",
        **{
            f"demo/ort-wasm-simd-threaded.{wasm}{suffix}": f"{RUNTIME}/dist/ort-wasm-simd-threaded.{wasm}{suffix}"
            for suffix in ("mjs", "wasm")
        },
    }


def folder(cache: Path) -> Path:
    """Returns the folder below `cache` for the packages of the lock file, even if the folder does not exist."""
    return cache / f"clients-{hashlib.sha256((PACKAGES / LOCK).read_bytes()).hexdigest()[:12]}"


def find_modules(cache: Path) -> Path | None:
    """Returns the node_modules folder of the packages; None if they are not installed."""
    modules = folder(cache) / "node_modules"
    return modules if (modules / ".package-lock.json").is_file() else None


def install(cache: Path) -> Path:
    """Installs the packages with ``npm ci`` if necessary, and returns their node_modules folder.

    npm does not run the install scripts of the packages.

    Raises:
        ShippingError: npm is missing or fails.
    """
    if modules := find_modules(cache):
        return modules
    npm = shutil.which("npm")
    hint = "Install Node.js 20 or newer with npm, or omit the demo page: --no-demo."
    if npm is None:
        raise ShippingError("The demo page needs npm packages, and npm is not installed.", hint)
    target = folder(cache)
    with lock(target, lambda: None):
        if modules := find_modules(cache):  # another run installed the packages before it released the lock
            return modules
        with scratch_folder(target) as scratch:
            shutil.copytree(PACKAGES, scratch, dirs_exist_ok=True)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            run = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            if run.returncode:
                lines = [line for line in run.stderr.strip().splitlines() if "error" in line]
                reason = lines[0] if lines else "npm printed no reason"
                raise ShippingError(f"npm could not install {TRANSFORMERS}: {reason}.", hint)
            replace(scratch, target)
    return target / "node_modules"


def version(package: str) -> str:
    """Returns the version of a package in the lock file."""
    lock = json.loads((PACKAGES / LOCK).read_text())
    return str(lock["packages"][f"node_modules/{package}"]["version"])
