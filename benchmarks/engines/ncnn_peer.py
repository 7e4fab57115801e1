"""ncnn: pnnx converts the checkpoint to an fp32 model; `ncnn_int8` quantises the converted model to int8.

pnnx fuses the attention of each layer into ncnn's own operator. The converted model takes one sentence of any length
and no attention mask, because ncnn has no dimension for batches. The session therefore runs the sentences of a batch
one after another, without their padding. Pruned checkpoints do not work, because ncnn's operator needs all heads.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from engines import ncnn_int8
from engines.session import EngineSession
from engines.sources import Sources, new_folder, run

FILE = "model.ncnn"


class NcnnSession(EngineSession):
    """A `Session` on ncnn's `Net`, with its default options except the threads."""

    def __init__(self, folder: Path, place: Any) -> None:
        import ncnn

        self._net, self._mat = ncnn.Net(), ncnn.Mat
        self._net.opt.num_threads = place.threads
        for load, ending in ((self._net.load_param, ".param"), (self._net.load_model, ".bin")):
            if load(str(folder / f"{FILE}{ending}")):
                raise RuntimeError(f"ncnn cannot load {FILE}{ending}.")
        precision = "int8" if "18=2" in (folder / f"{FILE}.param").read_text() else "fp32"
        self._facts = {"provider": "ncnn CPU", "threads": place.threads, "precision": precision}

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        import numpy as np

        logits = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            extractor = self._net.create_extractor()
            extractor.input("in0", self._mat(ids[: mask.sum()].astype(np.int32)).clone())
            status, output = extractor.extract("out0")
            if status:
                raise RuntimeError(f"ncnn returned the error {status}.")
            logits.append(np.array(output))
        return np.stack(logits)


def _sentence_classifier(model: Any) -> Any:
    """Returns a PyTorch module that takes the token ids of one sentence, without a mask, and returns its logits."""
    import torch

    class SentenceClassifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.model.distilbert.embeddings(ids)
            for layer in self.model.distilbert.transformer.layer:
                hidden = layer(hidden, None)[0]
            logits: torch.Tensor = self.model.classifier(torch.relu(self.model.pre_classifier(hidden[:, 0])))
            return logits

    return SentenceClassifier().eval()


def build(sources: Sources, out: Path) -> None:
    """Writes the fp32 and the int8 model."""
    import torch

    model = sources.load_model("sdpa")
    module, ids = _sentence_classifier(model), torch.arange(1, 17)[None]
    with torch.no_grad():
        difference = (module(ids) - model(input_ids=ids).logits).abs().max().item()
        if difference > 1e-4:
            sys.exit(f"The module for pnnx differs from the checkpoint by {difference:.2g}.")
        torch.jit.trace(module, ids, check_trace=False).save(str(out / "model.pt"))
    pnnx = Path(sys.executable).with_name("pnnx")
    shapes = ["inputshape=[1,16]i64", "inputshape2=[1,37]i64"]  # two lengths make the number of tokens dynamic
    subprocess.run([pnnx, out / "model.pt", *shapes, "fp16=0"], check=True, cwd=out)
    plain, quantized = new_folder(out, "ncnn-fp32"), new_folder(out, "ncnn-int8")
    for ending in (".param", ".bin"):
        shutil.copyfile(out / f"{FILE}{ending}", plain / f"{FILE}{ending}")
    ncnn_int8.quantize(out / FILE, quantized / FILE)


if __name__ == "__main__":
    run(build)
