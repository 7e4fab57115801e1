"""Modules that replace a sub-block of a layer after pruning has removed it.

This module imports torch, so import it inside the functions that use it.
"""

from __future__ import annotations

import torch
from torch import nn


class Absent(nn.Module):
    """A replacement for the last linear layer of a sub-block: it adds zero to the residual for every input."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns a scalar zero, which the residual addition broadcasts."""
        return torch.zeros((), dtype=hidden.dtype, device=hidden.device)


class Skipped(nn.Module):
    """A replacement for an attention module without heads: it returns its input, or applies `output` to its input.

    Args:
        name: Name under which this module stores `output`; empty if `output` is None.
        output: The module that takes the place of the attention's last linear layer. `output` is None if that linear
            layer was outside the replaced attention module.
    """

    def __init__(self, name: str = "", output: nn.Module | None = None) -> None:
        super().__init__()
        self._output = name
        if output is not None:
            self.add_module(name, output)

    def forward(self, *args: torch.Tensor, **keywords: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the output, and None for the attention weights; transformers 4 may pass the input as ``query``."""
        hidden = args[0] if args else keywords["query"]
        return (self.get_submodule(self._output)(hidden) if self._output else hidden), None
