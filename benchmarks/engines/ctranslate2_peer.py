"""CTranslate2: its own converter quantises the encoder to int8; NumPy computes the classification head.

CTranslate2 has no head for text classification. The session gives the last hidden state of the first token to the
checkpoint's head, which is fp32 and computed in NumPy. This is how CTranslate2's guide classifies texts with BERT. The
time of the head counts.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from engines.session import EngineSession
from engines.sources import Sources, apply_head, head_arrays, new_folder, run

# CTranslate2's config has the same name as the checkpoint's, so it is in a folder of its own.
ENCODER, HEAD = "encoder", "head.npz"
EXAMPLE_TOKENS = 25  # length of the sentence whose time decides between one thread and several threads
TRIES = 40  # number of times that the session computes this sentence


class CTranslate2Session(EngineSession):
    """A `Session` on CTranslate2's `Encoder`, with one batch at a time.

    With a small model, several threads can be far slower than one, so the session takes the faster number.
    """

    def __init__(self, folder: Path, place: Any) -> None:
        import ctranslate2
        import numpy as np

        self._view = ctranslate2.StorageView.from_array
        seconds = {}
        for threads in {1, place.threads}:
            self._open(folder, threads)
            seconds[threads] = self._measure()
        threads = min(seconds, key=seconds.__getitem__)
        self._open(folder, threads)
        with np.load(folder / HEAD) as arrays:
            self._head = dict(arrays)
        self._facts = {"provider": "CTranslate2 CPU", "threads": threads, "precision": self._encoder.compute_type}

    def _open(self, folder: Path, threads: int) -> None:
        import ctranslate2

        self._encoder = ctranslate2.Encoder(
            str(folder / ENCODER), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )

    def _measure(self) -> float:
        """Returns the median seconds of a sentence."""
        import numpy as np

        ids, lengths = np.full((1, EXAMPLE_TOKENS), 100, np.int32), np.array([EXAMPLE_TOKENS], np.int32)
        seconds = []
        for _ in range(TRIES):
            start = time.perf_counter()
            np.array(self._encoder.forward_batch(self._view(ids), self._view(lengths)).last_hidden_state)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        import numpy as np

        ids = batch["input_ids"].astype(np.int32)
        lengths = batch["attention_mask"].sum(axis=1, dtype=np.int32)
        output = self._encoder.forward_batch(self._view(ids), self._view(lengths))
        first = np.array(output.last_hidden_state)[:, 0]
        return apply_head(self._head, first)


def build(sources: Sources, out: Path) -> None:
    """Writes the int8 encoder and the fp32 head."""
    import numpy as np
    from ctranslate2.converters import TransformersConverter

    folder = new_folder(out, "ctranslate2-int8")
    TransformersConverter(sources.checkpoint).convert(str(folder / ENCODER), quantization="int8")
    np.savez(folder / HEAD, **head_arrays(sources.load_model()))


if __name__ == "__main__":
    run(build)
