"""Names of the execution providers on which a cell runs."""

from __future__ import annotations

# CUDA that replays recorded CUDA graphs. A CUDA graph holds all kernels of one batch size and length, and one call
# starts all of them.
CUDA_GRAPHS = "cuda-graphs"
# TensorRT, which builds an engine from the whole graph, in half precision.
TENSORRT = "tensorrt"
PROVIDERS = ("cpu", "cuda", CUDA_GRAPHS, TENSORRT)


def includes(chosen: str, provider: str) -> bool:
    """Returns whether the choice of the provider `chosen` also chooses cells on `provider`; ``cuda`` has both forms."""
    return provider == chosen or (chosen == "cuda" and provider == CUDA_GRAPHS)


def is_on_gpu(provider: str) -> bool:
    """Returns whether cells on the provider run on a GPU; published rows also have other providers."""
    return provider in PROVIDERS[1:]
