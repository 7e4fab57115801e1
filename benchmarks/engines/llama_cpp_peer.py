"""llama.cpp: the encoder in Q8_0, which llama.cpp itself quantises; NumPy computes the classification head.

llama.cpp has no head with DistilBERT's activation function. The session gives llama.cpp's embedding of the first token
to the checkpoint's head, which is fp32 and computed in NumPy. The time of the head counts. The package llama-cpp-python
has no wheels on PyPI, so pip compiles it for this processor, which takes several minutes.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from engines.session import EngineSession
from engines.sources import Sources, apply_head, head_arrays, new_folder, run

FILE, HEAD = "model.gguf", "head.npz"
TOKENS = 512  # number of tokens in one call of llama.cpp; its own default
SENTENCES = 64  # number of sentences in one call
# Maps the layers of a DistilBERT block to the layers of a GGUF file.
LAYERS = {
    "attention.q_lin": "attn_q",
    "attention.k_lin": "attn_k",
    "attention.v_lin": "attn_v",
    "attention.out_lin": "attn_output",
    "sa_layer_norm": "attn_output_norm",
    "ffn.lin1": "ffn_up",
    "ffn.lin2": "ffn_down",
    "output_layer_norm": "layer_output_norm",
}


class LlamaCppSession(EngineSession):
    """A `Session` on llama.cpp's C interface; a call computes as many sentences of a batch as fit into `TOKENS`."""

    def __init__(self, folder: Path, place: Any) -> None:
        import llama_cpp
        import numpy as np

        self._lib = llama_cpp
        model_options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(folder / FILE).encode(), model_options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = TOKENS
        options.n_seq_max = SENTENCES
        options.embeddings = True
        options.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_CLS
        options.n_threads = options.n_threads_batch = place.threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp cannot open the model.")
        self._batch = llama_cpp.llama_batch_init(TOKENS, 0, 1)
        self._width = llama_cpp.llama_model_n_embd(self._model)
        with np.load(folder / HEAD) as arrays:
            self._head = dict(arrays)
        self._facts = {"provider": "llama.cpp CPU", "threads": place.threads, "precision": "Q8_0"}

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        import numpy as np

        rows = [ids[:length] for ids, length in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)]
        first, group, used = [], [], 0
        for row in rows:
            if group and (used + len(row) > TOKENS or len(group) == SENTENCES):
                first += self._encode(group)
                group, used = [], 0
            group.append(row)
            used += len(row)
        first += self._encode(group)
        return apply_head(self._head, np.stack(first))

    def _encode(self, rows: list[Any]) -> list[Any]:
        """Returns the embedding of the first token of each row."""
        import numpy as np

        batch, position = self._batch, 0
        for sequence, row in enumerate(rows):
            for place, token in enumerate(row.tolist()):
                batch.token[position], batch.pos[position] = token, place
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, sequence
                batch.logits[position] = 1
                position += 1
        batch.n_tokens = position
        if self._lib.llama_encode(self._context, batch):
            raise RuntimeError("llama.cpp cannot run the batch.")
        pointers = [self._lib.llama_get_embeddings_seq(self._context, sequence) for sequence in range(len(rows))]
        return [np.ctypeslib.as_array(pointer, shape=(self._width,)).copy() for pointer in pointers]

    def close(self) -> None:
        """See `Session.close`."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        super().close()


def _tensor_names(blocks: int) -> dict[str, str]:
    """Returns the name of each encoder tensor in a GGUF file, by its name in the checkpoint."""
    names = {
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.position_embeddings.weight": "position_embd.weight",
    }
    for kind in ("weight", "bias"):
        names[f"embeddings.LayerNorm.{kind}"] = f"token_embd_norm.{kind}"
        for block in range(blocks):
            for own, other in LAYERS.items():
                names[f"transformer.layer.{block}.{own}.{kind}"] = f"blk.{block}.{other}.{kind}"
    return names


def _write_gguf(sources: Sources, model: Any, path: Path) -> None:
    """Writes the encoder as an fp32 GGUF file of the architecture ``bert``, with token types that add nothing."""
    import gguf
    import numpy as np

    config, weights = model.config, model.distilbert.state_dict()
    vocabulary = json.loads((Path(sources.checkpoint) / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(model.distilbert.embeddings.LayerNorm.eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.CLS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_type_count(1)
    for own, other in _tensor_names(config.n_layers).items():
        writer.add_tensor(other, weights[own].numpy())
    writer.add_tensor("token_types.weight", np.zeros((1, config.dim), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(sources: Sources, out: Path) -> None:
    """Writes the encoder in Q8_0 and the fp32 head."""
    import llama_cpp
    import numpy as np

    model = sources.load_model()
    _write_gguf(sources, model, out / FILE)
    folder = new_folder(out, "llama-cpp-q8")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    paths = [str(path / FILE).encode() for path in (out, folder)]
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)):
        sys.exit("llama.cpp cannot quantise the model.")
    np.savez(folder / HEAD, **head_arrays(model))


if __name__ == "__main__":
    run(build)
