"""Static embeddings: model2vec's table of one vector for each token, and a logistic regression; the floor of quality.

model2vec distils the table from the fine-tuned encoder with its default settings: it runs the encoder on each token of
the vocabulary alone, and reduces the vectors to 256 components. The vector of a text is the mean over its tokens, with
length 1. The logistic regression is trained on the toolchain's training rows. No layer of the encoder runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.session import EngineSession
from engines.sources import Sources, new_folder, run

FILE = "model.npz"
COMPONENTS = 256
ITERATIONS = 1000  # upper limit for the logistic regression


def mean_vectors(table: Any, used: Any, ids: Any, mask: Any) -> Any:
    """Returns the vectors of a batch of texts, each of length 1.

    Args:
        table: Float array of shape [vocabulary, components].
        used: Array of shape [vocabulary]: 1 for tokens with a vector, 0 for special tokens.
        ids: Token ids, shape [batch, sequence].
        mask: Attention mask, shape [batch, sequence].
    """
    import numpy as np

    weights = (used[ids] * mask).astype(np.float32)
    sums = np.einsum("bs,bsc->bc", weights, table[ids])
    # The mean and the sum have the same direction, so only the length of the sum matters.
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


class StaticSession(EngineSession):
    """A `Session` in NumPy, on one thread."""

    def __init__(self, folder: Path, place: Any) -> None:
        import numpy as np

        with np.load(folder / FILE) as arrays:
            self._table, self._used = arrays["table"].astype(np.float32), arrays["used"]
            self._weight, self._bias = arrays["weight"], arrays["bias"]
        self._facts = {"provider": "NumPy", "threads": 1, "precision": "fp32"}

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        vectors = mean_vectors(self._table, self._used, batch["input_ids"], batch["attention_mask"])
        return vectors @ self._weight + self._bias


def _table_of(static_model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Returns model2vec's table in the order of the checkpoint's vocabulary, and which tokens have a vector."""
    import numpy as np

    size = len(tokenizer)
    table, used = np.zeros((size, static_model.embedding.shape[1]), np.float16), np.zeros(size, np.int64)
    special = set(tokenizer.all_special_tokens)
    for row, token in enumerate(tokenizer.convert_ids_to_tokens(range(size))):
        own = None if token in special else static_model.tokenizer.token_to_id(token)
        if own is not None:
            table[row], used[row] = static_model.embedding[own], 1
    return table, used


def build(sources: Sources, out: Path) -> None:
    """Distils the table, and trains the logistic regression."""
    import numpy as np
    from model2vec.distill import distill_from_model
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoTokenizer

    model, tokenizer = sources.load_model(), AutoTokenizer.from_pretrained(sources.checkpoint)
    static_model = distill_from_model(model.base_model, tokenizer, device="cpu", pca_dims=COMPONENTS)
    table, used = _table_of(static_model, tokenizer)
    rows, labels = sources.read_training()
    floats = table.astype(np.float32)
    vectors = [mean_vectors(floats, used, np.array([ids]), np.ones((1, len(ids)), np.int64))[0] for ids in rows]
    head = LogisticRegression(max_iter=ITERATIONS).fit(np.stack(vectors), labels)
    weight, bias = head.coef_.T.astype(np.float32), head.intercept_.astype(np.float32)
    if len(head.classes_) == 2:  # scikit-learn has one row for two labels: the logit of the second label
        weight, bias = np.hstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
    folder = new_folder(out, "static-embeddings")
    np.savez(folder / FILE, table=table, used=used, weight=weight, bias=bias)


if __name__ == "__main__":
    run(build)
