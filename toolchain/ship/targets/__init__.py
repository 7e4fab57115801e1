"""Defines the targets of bundles: the operators that a target can run, the paths of its models, and its other files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.artifacts.names import VariantName
from toolchain.errors import ShippingError
from toolchain.ship.targets.releases import MICROSOFT, STANDARD

BUNDLE_FILES = Path(__file__).parent.parent / "bundle_files"
LOCK = "requirements.lock"  # pins the packages of requirements.txt and their dependencies, with sha256
REPOSITORY = "repository"  # A bundle for servers holds its model repository for Triton in this folder,
KSERVE = "kserve"  # and its own server for KServe in this folder.
WEBGPU = "webgpu"
# Scheme of a variant → its dtype in transformers.js, and the file that transformers.js loads for this dtype.
DTYPES = {
    "fp32": ("fp32", "onnx/model.onnx"),
    "int8": ("q8", "onnx/model_quantized.onnx"),
    "int4": ("q4", "onnx/model_q4.onnx"),
    "fp16": ("fp16", "onnx/model_fp16.onnx"),
}


@dataclass(frozen=True)
class Target:
    """A kind of app that a bundle is for.

    `files` and `text_files` map a path in the bundle to a file in `BUNDLE_FILES`. A file with the suffix ``.j2`` is a
    Jinja template. A path with ``{name}`` stands for one file per model.

    Attributes:
        name: Name of the target.
        model_path: Function from the name of a variant to the path of its model file.
        domains: Operator domains that the target's runtimes support.
        files: Files that the bundle contains beside the models, if the graphs do not contain the tokenizer.
        text_files: Files that the bundle contains beside the models, if the graphs contain the tokenizer.
        no_tokenizer_reason: Reason why the graphs cannot contain the tokenizer; None if they can.
        tokenizer_path: Path of a separate tokenizer graph; None without such a graph. The tokenizer graph converts the
            users' texts to token ids for the models. If a bundle has a separate tokenizer graph, its models have the
            probabilities as a second output.
        first_path: Fixed path of the first model file; None to use `model_path`.
    """

    name: str
    model_path: Callable[[VariantName], str]
    domains: frozenset[str]
    files: Mapping[str, str]
    text_files: Mapping[str, str] = field(default_factory=dict)
    no_tokenizer_reason: str | None = None
    tokenizer_path: str | None = None
    first_path: str | None = None

    def path(self, variants: Sequence[VariantName], index: int) -> str:
        """Returns the path of a model file in a bundle.

        Args:
            variants: Names of all variants of the bundle, in order.
            index: Index of the variant whose path is returned.
        """
        return self.first_path if self.first_path and index == 0 else self.model_path(variants[index])


def dtype(variant: VariantName) -> str | None:
    """Returns the dtype of a variant in transformers.js; None if transformers.js has no dtype for the variant."""
    return DTYPES.get(variant.parts.scheme, (None, ""))[0]


def device(variant: VariantName) -> str:
    """Returns the device of transformers.js that a variant is for: `WEBGPU`, or ``wasm`` (the processor)."""
    return WEBGPU if variant.parts.webgpu else "wasm"


def _transformers_js_path(variant: VariantName) -> str:
    scheme = variant.parts.scheme
    if scheme not in DTYPES:
        raise ShippingError(
            f"transformers.js cannot load {variant}.",
            f"Ship a variant with one of the schemes {', '.join(DTYPES)}, such as onnx-int8.",
        )
    return DTYPES[scheme][1]


def served_name(name: str) -> str:
    """Returns the name of a model on a server; URLs contain the name, so it has the form of a host name (RFC 1123)."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _named_after_variant(variant: str) -> str:
    return f"{variant}.onnx"


_OPTIMUM_FILE = "model.onnx"  # optimum loads the file model.onnx from a model's folder


_REQUIREMENTS = {"requirements.txt": "requirements.txt.j2", LOCK: "requirements.lock"}
_TEXT_REQUIREMENTS = {"requirements.txt": "requirements_text.txt.j2", LOCK: "requirements_text.lock"}
_PYTHON = {
    "README.md": "README.python.md.j2",
    "verify.py": "verify.py",
    "classify.py": "classify.py",
    **_REQUIREMENTS,
}
_MOBILE = {"README.md": "README.mobile.md.j2", "verify.py": "verify.py", **_REQUIREMENTS}
_MLFLOW = {
    "README.md": "README.mlflow.md.j2",
    "verify.py": "verify.py",
    "MLmodel": "MLmodel.j2",
    "conda.yaml": "conda.yaml",
    "python_env.yaml": "python_env.yaml",
    "input_example.json": "input_example.json",
    "serving_input_example.json": "serving_input_example.json",
    "requirements.txt": "requirements_mlflow.txt.j2",
    LOCK: "requirements_mlflow.lock",
    "code/mlflow_model.py": "mlflow_model.py",
    "code/classify.py": "classify.py",
    "code/__pycache__": "no_pycache.txt",
}
_RAY_SERVE = {
    "README.md": "README.ray-serve.md.j2",
    "verify.py": "verify.py",
    "classify.py": "classify.py",
    "serve_app.py": "serve_app.py",
    "serve.yaml": "serve.yaml.j2",
    "requirements.txt": "requirements_ray_serve.txt.j2",
    LOCK: "requirements_ray_serve.lock",
}
_SERVER = {
    "README.md": "README.server.md.j2",
    "verify.py": "verify.py",
    "classify.py": "classify.py",
    **_TEXT_REQUIREMENTS,
    "inference-service.yaml": "inference-service.yaml.j2",
    KSERVE + "/predictor.py": "predictor.py",
    KSERVE + "/Dockerfile": "Dockerfile",
    KSERVE + "/inference_service.yaml": "predictor.yaml.j2",
    KSERVE + "/requirements.txt": "requirements_kserve.txt.j2",
    KSERVE + "/" + LOCK: "requirements_kserve.lock",
    REPOSITORY + "/{name}/config.pbtxt": "model.pbtxt.j2",
    REPOSITORY + "/{name}/labels.txt": "labels.txt.j2",
}
TARGETS = {
    target.name: target
    for target in (
        Target(
            "web",
            _transformers_js_path,
            frozenset({STANDARD, MICROSOFT}),
            {
                "README.md": "README.web.md.j2",
                "verify.py": "verify.py",
                "verify.mjs": "verify.mjs",
                "golden.mjs": "golden.mjs",
                "node.mjs": "node.mjs",
            },
            no_tokenizer_reason="onnxruntime-web and onnxruntime-node lack the operators of onnxruntime-extensions, "
            "and transformers.js has its own tokenizer",
        ),
        Target(
            "python",
            _named_after_variant,
            frozenset({STANDARD, MICROSOFT}),
            _PYTHON,
            {**_PYTHON, "classify.py": "classify_text.py", **_TEXT_REQUIREMENTS},
            first_path=_OPTIMUM_FILE,
        ),
        Target(
            "other",
            _named_after_variant,
            frozenset({STANDARD}),
            {"README.md": "README.other.md.j2", "verify.py": "verify.py", **_REQUIREMENTS},
            no_tokenizer_reason="only ONNX Runtime can use the operators of onnxruntime-extensions",
            first_path=_OPTIMUM_FILE,
        ),
        Target(
            "server",
            lambda variant: f"{REPOSITORY}/{served_name(variant)}/1/model.onnx",
            frozenset({STANDARD, MICROSOFT}),
            {
                **_SERVER,
                REPOSITORY + "/{name}_text/config.pbtxt": "ensemble.pbtxt.j2",
                REPOSITORY + "/{name}_text/1/ensemble.txt": "ensemble.txt",
                REPOSITORY + "/tokenizer/config.pbtxt": "tokenizer.pbtxt.j2",
            },
            {**_SERVER, "classify.py": "classify_text.py"},
            # The tokenizer graph is not called model.onnx, because optimum would load model.onnx as the classifier.
            tokenizer_path=REPOSITORY + "/tokenizer/1/tokenizer.onnx",
        ),
        Target(
            "ray-serve",
            _named_after_variant,
            frozenset({STANDARD, MICROSOFT}),
            _RAY_SERVE,
            {**_RAY_SERVE, "classify.py": "classify_text.py"},
            first_path=_OPTIMUM_FILE,
        ),
        Target(
            "mlflow",
            _named_after_variant,
            frozenset({STANDARD, MICROSOFT}),
            _MLFLOW,
            no_tokenizer_reason="mlflow.onnx cannot register the operators of onnxruntime-extensions",
            first_path=_OPTIMUM_FILE,
        ),
        Target(
            "mobile",
            _named_after_variant,
            frozenset({STANDARD, MICROSOFT}),
            _MOBILE,
            {**_MOBILE, **_TEXT_REQUIREMENTS},
        ),
    )
}
# Files of a classifier of texts → files that replace them for a token classifier.
TOKEN_FILES = {"classify.py": "classify_tokens.py"}
# Targets whose code, or whose configuration of a server, uses the settings of a session file.
TUNABLE = ("python", "web", "server")
# The demo page of a web bundle, with its script and style. `clients` provides the demo page's JavaScript libraries.
DEMO = {
    "index.html": "index.html",
    "serve.py": "serve.py",
    "demo/page.mjs": "page.mjs",
    "demo/page.css": "page.css",
}
