"""What stands in a layer where pruning took a whole sub-block away. Imports torch: import it where it is used."""

from __future__ import annotations

import torch
from torch import nn


class Constant(nn.Module):
    """Answers its `bias` [width], whatever it is given: what a linear layer without inputs computes."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Broadcasts over batch and sequence in the residual addition that follows."""
        return self.bias


class Skipped(nn.Module):
    """An attention without heads: hands its input on, through `output` where the attention held that itself."""

    def __init__(self, name: str = "", output: nn.Module | None = None) -> None:
        super().__init__()
        self._output = name
        if output is not None:
            self.add_module(name, output)

    def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor]:
        """The tuple an attention answers with; DistilBERT passes its input as ``query``."""
        hidden = args[0] if args else named["query"]
        return (self.get_submodule(self._output)(hidden) if self._output else hidden,)
