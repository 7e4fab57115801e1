"""ExecuTorch: an 8da8w model for its XNNPACK delegate: int8 weights per channel, and 8-bit activations by batch.

PyTorch exports the checkpoint with a dynamic number of sentences and tokens, and torchao quantises the linear layers.
The embeddings stay fp32, because XNNPACK has no embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.session import EngineSession
from engines.sources import Sources, new_folder, run

FILE = "model.pte"
# Upper limits of the exported dimensions. ExecuTorch reserves its memory for the largest batch.
MOST_SENTENCES, MOST_TOKENS = 32, 128


class ExecuTorchSession(EngineSession):
    """A `Session` on ExecuTorch's runtime, whose thread pool has the benchmark's number of threads."""

    def __init__(self, folder: Path, place: Any) -> None:
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(place.threads)
        self._tensor = torch.from_numpy
        # The program must live as long as its method.
        self._program = Runtime.get().load_program(folder / FILE)
        self._method = self._program.load_method("forward")
        threads = portable_lib._threadpool_get_thread_count()
        self._facts = {"provider": "ExecuTorch XNNPACK", "threads": threads, "precision": "8da8w"}

    def run(self, batch: dict[str, Any]) -> Any:
        """See `Session.run`."""
        inputs = [self._tensor(batch[name]) for name in ("input_ids", "attention_mask")]
        return self._method.execute(inputs)[0].numpy().copy()


def build(sources: Sources, out: Path) -> None:
    """Exports, quantises and lowers the checkpoint."""
    import torch
    from executorch.backends.xnnpack.partition import xnnpack_partitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model = sources.classifier()
    inputs = (torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64))
    sentences = torch.export.Dim("sentences", min=1, max=MOST_SENTENCES)
    tokens = torch.export.Dim("tokens", min=2, max=MOST_TOKENS)
    shapes = ({0: sentences, 1: tokens},) * len(inputs)
    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(config)
    prepared = prepare_pt2e(torch.export.export(model, inputs, dynamic_shapes=shapes).module(), quantizer)
    prepared(*inputs)
    exported = torch.export.export(convert_pt2e(prepared), inputs, dynamic_shapes=shapes)
    partitioners = [
        xnnpack_partitioner.XnnpackDynamicallyQuantizedPartitioner(),
        xnnpack_partitioner.XnnpackPartitioner(),
    ]
    program = to_edge_transform_and_lower(exported, partitioner=partitioners).to_executorch()
    (new_folder(out, "executorch-8da8w") / FILE).write_bytes(program.buffer)


if __name__ == "__main__":
    run(build)
