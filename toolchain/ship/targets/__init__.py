"""The targets of bundles: the operators that each can run, the paths of the models, and the other files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.artifacts.names import VariantName
from toolchain.errors import ShippingError
from toolchain.ship.targets.releases import MICROSOFT, STANDARD

BUNDLED = Path(__file__).parent.parent / "bundle_files"
REPOSITORY = "repository"  # folder in the layout of a Triton model repository
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

    The files beside the models are a mapping from the path in the bundle to a file in `BUNDLED`. A ``.j2`` file is
    rendered. A path with ``{name}`` gives one file for each model.

    Attributes:
        name: Name of the target.
        place: Function from the name of a variant to the path of its model file.
        domains: Domains of the operators that the target's runtimes have.
        files: Files beside the models.
        text_files: Files beside the models if the graphs contain the tokenizer.
        no_texts: Reason why the graphs cannot contain the tokenizer; None if they can.
        tokenizer: Path of a separate tokenizer graph, for a target whose models take token ids and whose users send
            texts. The models then have the probabilities as a second output. None for no such graph.
        first: Path of the first model file if it differs from `place`.
    """

    name: str
    place: Callable[[VariantName], str]
    domains: frozenset[str]
    files: Mapping[str, str]
    text_files: Mapping[str, str] = field(default_factory=dict)
    no_texts: str | None = None
    tokenizer: str | None = None
    first: str | None = None

    def path(self, variants: Sequence[VariantName], index: int) -> str:
        """Returns the path of a model file in a bundle.

        Args:
            variants: Names of all variants of the bundle, in order.
            index: Index of the variant.
        """
        return self.first if self.first and index == 0 else self.place(variants[index])


def dtype(variant: VariantName) -> str | None:
    """Returns the dtype of a variant in transformers.js; None if transformers.js has no such dtype."""
    return DTYPES.get(variant.parts.scheme, (None, ""))[0]


def _for_transformers_js(variant: VariantName) -> str:
    scheme = variant.parts.scheme
    if scheme not in DTYPES:
        raise ShippingError(
            f"transformers.js has no name for {variant}.",
            f"It reads variants of {', '.join(DTYPES)}, such as onnx-int8.",
        )
    return DTYPES[scheme][1]


def served(name: str) -> str:
    """Returns the name of a model on a server: a label of RFC 1123, since the name is part of URLs."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _by_name(variant: str) -> str:
    return f"{variant}.onnx"


_FIRST = "model.onnx"  # the file name that optimum loads from a folder


_PYTHON = {
    "README.md": "README.python.md.j2",
    "verify.py": "verify.py",
    "classify.py": "classify.py",
    "requirements.txt": "requirements.txt.j2",
}
_MOBILE = {"README.md": "README.mobile.md.j2", "verify.py": "verify.py", "requirements.txt": "requirements.txt.j2"}
_SERVER = {
    "README.md": "README.server.md.j2",
    "verify.py": "verify.py",
    "requirements.txt": "requirements_text.txt.j2",
    "inference-service.yaml": "inference-service.yaml.j2",
    REPOSITORY + "/{name}/config.pbtxt": "model.pbtxt.j2",
    REPOSITORY + "/{name}/labels.txt": "labels.txt.j2",
}
TARGETS = {
    target.name: target
    for target in (
        Target(
            "web",
            _for_transformers_js,
            frozenset({STANDARD, MICROSOFT}),
            {
                "README.md": "README.web.md.j2",
                "verify.py": "verify.py",
                "verify.mjs": "verify.mjs",
                "golden.mjs": "golden.mjs",
                "node.mjs": "node.mjs",
            },
            no_texts="no build of onnxruntime-web or onnxruntime-node has onnxruntime-extensions' operators, and "
            "transformers.js has the tokenizer",
        ),
        Target(
            "python",
            _by_name,
            frozenset({STANDARD, MICROSOFT}),
            _PYTHON,
            {**_PYTHON, "classify.py": "classify_text.py", "requirements.txt": "requirements_text.txt.j2"},
            first=_FIRST,
        ),
        Target(
            "other",
            _by_name,
            frozenset({STANDARD}),
            {"README.md": "README.other.md.j2", "verify.py": "verify.py", "requirements.txt": "requirements.txt.j2"},
            no_texts="its operators are onnxruntime-extensions', which other runtimes do not have",
            first=_FIRST,
        ),
        Target(
            "server",
            lambda variant: f"{REPOSITORY}/{served(variant)}/1/model.onnx",
            frozenset({STANDARD, MICROSOFT}),
            {
                **_SERVER,
                REPOSITORY + "/{name}_text/config.pbtxt": "ensemble.pbtxt.j2",
                REPOSITORY + "/{name}_text/1/ensemble.txt": "ensemble.txt",
                REPOSITORY + "/tokenizer/config.pbtxt": "tokenizer.pbtxt.j2",
            },
            _SERVER,
            # Not named model.onnx: optimum takes any model.onnx in the folder for the classifier.
            tokenizer=REPOSITORY + "/tokenizer/1/tokenizer.onnx",
        ),
        Target(
            "mobile",
            _by_name,
            frozenset({STANDARD, MICROSOFT}),
            _MOBILE,
            {**_MOBILE, "requirements.txt": "requirements_text.txt.j2"},
        ),
    )
}
# The demo page of a web bundle and its script and style; `clients` provides its libraries.
DEMO = {"index.html": "index.html", "demo/page.mjs": "page.mjs", "demo/page.css": "page.css"}
