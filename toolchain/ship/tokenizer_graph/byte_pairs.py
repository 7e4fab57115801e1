"""Adds the tokenizer of GPT-2 and RoBERTa to a graph: byte-level BPE (Radford et al. 2019) of onnxruntime-extensions.

The graph and the checkpoint's tokenizer give different tokens only for texts that contain the NUL character. The graph
ignores the NUL character and the rest of the text after it. The checkpoint's tokenizer converts the NUL character to a
token, and also reads the rest of the text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from toolchain.errors import ShippingError
from toolchain.ship.targets.releases import EXTENSIONS
from toolchain.ship.tokenizer_graph.characters import SHIP_WITHOUT_HINT
from toolchain.ship.tokenizer_graph.model_inputs import Ragged
from toolchain.ship.tokenizer_graph.nodes import Nodes

if TYPE_CHECKING:
    import onnx_ir as ir

# The characters with Unicode's property White_Space; `\s` in RE2 matches only some of them.
WHITE = r"[\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}]*"


def byte_pairs(nodes: Nodes, texts: ir.Value, tokenizer: Any) -> Ragged:
    """Adds the nodes that split texts into tokens; these nodes add no special tokens.

    Args:
        nodes: Nodes of a graph, which the function extends.
        texts: The texts to split, a string tensor of shape [texts].
        tokenizer: The checkpoint's tokenizer.

    Raises:
        ShippingError: The tokenizer normalises or splits texts differently from GPT-2's tokenizer.
    """
    body = json.loads(tokenizer.to_str())
    kind = (body.get("pre_tokenizer") or {}).get("type")
    if kind != "ByteLevel" or body.get("normalizer") or body["pre_tokenizer"].get("add_prefix_space"):
        raise ShippingError(
            "onnxruntime-extensions supports only GPT-2's kind of BPE. This tokenizer has a normaliser, adds a space "
            "before texts, or splits words differently from GPT-2.",
            SHIP_WITHOUT_HINT,
        )
    added = tokenizer.get_added_tokens_decoder()
    for token in added.values():
        pattern = re.escape(token.content)
        # With `lstrip` or `rstrip`, the checkpoint's tokenizer deletes the white space before or after an added token.
        if token.lstrip or token.rstrip:
            before, after = WHITE if token.lstrip else "", WHITE if token.rstrip else ""
            texts = nodes.replace(texts, f"{before}{pattern}{after}", token.content)
    ids, mask = nodes.add_with_outputs(
        "HfJsonTokenizer",
        2,
        texts,
        domain=EXTENSIONS,
        tokenizer_config=json.dumps({"tokenizer_class": "GPT2Tokenizer"}),
        tokenizer_vocab=tokenizer.to_str(),
    )
    counts = nodes.add("ReduceSum", mask, nodes.numbers([1]), keepdims=0)
    count, width = (nodes.add("Gather", nodes.add("Shape", ids), nodes.numbers(axis)) for axis in (0, 1))
    begins = nodes.add("Mul", nodes.add("Range", nodes.numbers(0), count, nodes.numbers(1)), width)
    flat = nodes.add("Reshape", ids, nodes.numbers([-1]))
    return Ragged(flat, begins, nodes.add("Add", begins, counts))
