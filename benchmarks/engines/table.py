"""The other tools, and the function that builds a tool's models in its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.environments import call, environment
from engines.sources import Sources
from toolchain.backends import Backend
from toolchain.errors import BenchError

REQUIREMENTS = Path(__file__).parent / "requirements"
BUILD_S = 1800  # seconds that a tool's script may take


@dataclass(frozen=True)
class Engine:
    """A tool other than the toolchain.

    Attributes:
        name: Name of the tool; its script is the module ``engines.NAME_peer``.
        models: Names of the models that the script builds.
        session: Name of the session class in the tool's module; empty if the toolchain's ONNX Runtime runs the models.
        borrow: Whether the tool's environment also finds the packages of the running environment.
        requirements: The tool's requirements file; None if the tool is in the running environment.
        session_requirements: Requirements file of a separate environment for the session; None if the session runs in
            the tool's environment.
    """

    name: str
    models: tuple[str, ...]
    session: str = ""
    borrow: bool = True
    requirements: Path | None = None
    session_requirements: Path | None = None

    @property
    def module(self) -> str:
        """Returns the name of the tool's module."""
        return f"engines.{self.name.replace('-', '_')}_peer"

    @property
    def runtime(self) -> str:
        """Returns the runtime tag of the tool's models."""
        return self.name if self.session else "onnx"

    def python(self, environments: Path) -> Path:
        """Returns the tool's interpreter, and makes its environment if necessary; see `environment`."""
        if self.requirements is None:
            return Path(sys.executable)
        return environment(environments, self.requirements, self.borrow)

    def backend(self, environments: Path) -> Backend:
        """Returns the backend that runs the tool's models; makes its environment if necessary."""
        if self.session_requirements is None:
            python = self.python(environments)
        else:
            python = environment(environments, self.session_requirements, borrow=True)
        return Backend(f"{self.module}:{self.session}", (), str(python))

    def build(self, python: Path, sources: Sources, scratch: Path) -> dict[str, Path]:
        """Builds the tool's models.

        Args:
            python: The tool's interpreter.
            sources: What the tool builds the models from.
            scratch: Folder of the whole run; the method makes a folder with the tool's name in it.

        Returns:
            The folder of each model.

        Raises:
            BenchError: The script fails, or does not end in time, or does not write a model.
        """
        out = scratch / self.name
        out.mkdir()
        sources.write(scratch / f"{self.name}.json")
        # Some tools write logs to the working folder.
        command = [python, "-P", "-m", self.module, scratch / f"{self.name}.json", out]
        call(f"The script of {self.name}", command, BUILD_S, scratch)
        missing = [model for model in self.models if not (out / model).is_dir()]
        if missing:
            raise BenchError(f"{self.name} did not write {', '.join(missing)}.")
        return {model: out / model for model in self.models}


def share_engines() -> None:
    """Lets the child processes of this process import the package `engines`."""
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def build_all(
    engines: list[Engine], sources: Sources, environments: Path, scratch: Path, say: Callable[[str], None]
) -> tuple[dict[str, Path | BenchError], dict[str, Backend]]:
    """Builds the models of all tools; if a tool fails, its models have the error instead of a folder.

    Returns:
        The folder or the error of each model, and the backend of each tool that has a session.
    """
    models: dict[str, Path | BenchError] = {}
    backends: dict[str, Backend] = {}
    for engine in engines:
        say(engine.name)
        try:
            python = engine.python(environments)
            if engine.session:
                backends[engine.runtime] = engine.backend(environments)
            models |= engine.build(python, sources, scratch)
        except BenchError as error:
            models |= dict.fromkeys(engine.models, error)
    return models, backends


def _engine(name: str, models: tuple[str, ...], session: str = "", **options: Any) -> Engine:
    return Engine(name, models, session, requirements=REQUIREMENTS / f"{name}.txt", **options)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("optimum-cli", ("optimum-cli-int8", "optimum-cli-int8-per-channel")),
        # The packages of Neural Compressor are too old for the other packages of the running environment.
        _engine("neural-compressor", ("neural-compressor-dynamic", "neural-compressor-static"), borrow=False),
        _engine("olive", ("olive-int8",)),
        _engine("openvino", ("openvino-fp32", "openvino-int8"), "OpenVinoSession"),
        _engine("ctranslate2", ("ctranslate2-int8",), "CTranslate2Session"),
        _engine("ncnn", ("ncnn-fp32", "ncnn-int8"), "NcnnSession"),
        # The converter needs a release of typing_extensions that is too old for the toolchain.
        _engine("litert", ("litert-int8",), "LiteRtSession", session_requirements=REQUIREMENTS / "litert-session.txt"),
        _engine("executorch", ("executorch-8da8w",), "ExecuTorchSession"),
        _engine("llama-cpp", ("llama-cpp-q8",), "LlamaCppSession"),
        _engine("static-embeddings", ("static-embeddings",), "StaticSession"),
    )
}
