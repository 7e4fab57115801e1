"""Names of the execution providers on which a cell runs."""

from __future__ import annotations

# CUDA that replays recorded CUDA graphs. A CUDA graph holds all kernels of one batch size and length, and one call
# starts all of them.
CUDA_GRAPHS = "cuda-graphs"
PROVIDERS = ("cpu", "cuda", CUDA_GRAPHS)


def includes(chosen: str, provider: str) -> bool:
    """Returns whether the choice of the provider `chosen` also chooses cells on `provider`; ``cuda`` has both forms."""
    return provider == chosen or (chosen == "cuda" and provider == CUDA_GRAPHS)


def is_on_gpu(provider: str) -> bool:
    """Returns whether cells on the provider run on a GPU."""
    return includes("cuda", provider)
