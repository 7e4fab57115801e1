"""LiteRT: an int8 model by litert-torch and the AI Edge Quantizer, with int8 weights and 8-bit activations by batch.

litert-torch cannot convert this model with a dynamic number of sentences or tokens. So the model has one signature for
each shape in `SHAPES`, and the signatures share their weights. The session pads a batch to the next larger shape, as an
app on LiteRT does. The padding costs time, which counts. A batch that fits no shape is split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.session import EngineSession
from engines.sources import Sources, new_folder, run

FILE = "model.tflite"
# Numbers of sentences and of tokens of the signatures.
SHAPES = tuple((sentences, tokens) for sentences in (1, 32) for tokens in (8, 16, 24, 32, 48, 64, 128))


def signature(sentences: int, tokens: int) -> str:
    """Returns the name of the signature for a shape."""
    return f"shape_{sentences}_{tokens}"


class LiteRtSession(EngineSession):
    """A `Session` on LiteRT's interpreter, with its default XNNPACK delegate."""

    def __init__(self, folder: Path, place: Any) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(str(folder / FILE), num_threads=place.threads)
        self._runners = {shape: self._interpreter.get_signature_runner(signature(*shape)) for shape in SHAPES}
        self._facts = {"provider": "LiteRT CPU", "threads": place.threads, "precision": "dynamic int8"}

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        import numpy as np

        ids, mask = batch["input_ids"], batch["attention_mask"]
        count, width = ids.shape
        most = 1 if count == 1 else max(sentences for sentences, _ in SHAPES)
        tokens = min(tokens for sentences, tokens in SHAPES if sentences == most and tokens >= width)
        logits = []
        for start in range(0, count, most):
            # Rows and columns of padding are token 0 without attention; a row of padding attends to its first token.
            padded = np.zeros((2, most, tokens), np.int32)
            padded[1, :, 0] = 1
            rows = slice(start, start + most)
            size = len(ids[rows])
            padded[0, :size, :width], padded[1, :size, :width] = ids[rows], mask[rows]
            output = self._runners[most, tokens](args_0=padded[0], args_1=padded[1])
            logits.append(output["output_0"][:size])
        return np.concatenate(logits)


def build(sources: Sources, out: Path) -> None:
    """Converts the checkpoint and quantises the converted model."""
    import litert_torch
    import torch
    from ai_edge_quantizer import quantizer, recipe

    model = sources.classifier()
    converter: Any = litert_torch
    for shape in SHAPES:
        inputs = (torch.ones(shape, dtype=torch.int32), torch.ones(shape, dtype=torch.int32))
        converter = converter.signature(signature(*shape), model, inputs)
    converted = out / FILE
    converter.convert().export(str(converted))
    engine = quantizer.Quantizer(str(converted))
    engine.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    engine.quantize().export_model(str(new_folder(out, "litert-int8") / FILE))


if __name__ == "__main__":
    run(build)
