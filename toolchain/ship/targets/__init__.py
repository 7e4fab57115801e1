"""Where a bundle goes: which operators are there, how its files are called, and what lies beside the models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.artifacts.names import parse_name
from toolchain.errors import ShippingError
from toolchain.ship.targets.releases import MICROSOFT, STANDARD

BUNDLED = Path(__file__).parent.parent / "bundle_files"
REPOSITORY = "repository"  # of models, as Triton reads it
# Scheme of a variant → how transformers.js calls it (dtype), and what it looks for.
DTYPES = {
    "fp32": ("fp32", "onnx/model.onnx"),
    "int8": ("q8", "onnx/model_quantized.onnx"),
    "int4": ("q4", "onnx/model_q4.onnx"),
    "fp16": ("fp16", "onnx/model_fp16.onnx"),
}


@dataclass(frozen=True)
class Target:
    """`place` is the path a variant's file gets, `domains` are the operator sets its runtimes have, `files` what lies
    beside the models: path in the bundle → file in `BUNDLED`; a ``.j2`` among them is rendered. `first` is the path of
    the first variant's file where it has one of its own.

    `text_files` lie there instead where the tokenizer is in the graph; where it cannot be, `no_texts` says why. A
    ``{name}`` in a path stands for each model's name: the file is rendered for each. `tokenizer` is the path of a graph
    that makes tokens of texts, for a target whose models take tokens and whose users send texts; such models answer
    with probabilities as well.
    """

    name: str
    place: Callable[[str], str]
    domains: frozenset[str]
    files: Mapping[str, str]
    text_files: Mapping[str, str] = field(default_factory=dict)
    no_texts: str | None = None
    tokenizer: str | None = None
    first: str | None = None

    def path(self, variants: Sequence[str], index: int) -> str:
        """The path of the file of one of the `variants` in a bundle of all of them."""
        return self.first if self.first and index == 0 else self.place(variants[index])


def dtype(variant: str) -> str | None:
    """What transformers.js calls the variant's scheme; None where it has no name for it."""
    return DTYPES.get(parse_name(variant).scheme, (None, ""))[0]


def _for_transformers_js(variant: str) -> str:
    scheme = parse_name(variant).scheme
    if scheme not in DTYPES:
        raise ShippingError(
            f"transformers.js has no name for {variant}.",
            f"It reads variants of {', '.join(DTYPES)}, such as onnx-int8.",
        )
    return DTYPES[scheme][1]


def served(name: str) -> str:
    """What a server calls a model of that name, which goes into addresses: RFC 1123's labels."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _by_name(variant: str) -> str:
    return f"{variant}.onnx"


_FIRST = "model.onnx"  # what optimum looks for in a folder


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
            # By a name of its own: optimum takes any model.onnx in the folder for the classifier.
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
# The page to try a web bundle in, and what it needs beside the clients' own files.
DEMO = {"index.html": "index.html", "demo/page.mjs": "page.mjs", "demo/page.css": "page.css"}
