"""What stands in a layer where pruning took a whole sub-block away. Imports torch: import it where it is used."""

from __future__ import annotations

import torch
from torch import nn


class Absent(nn.Module):
    """In the place of a sub-block's last layer: adds nothing to the residual, whatever it is given."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """A zero that is broadcast."""
        return torch.zeros((), dtype=hidden.dtype, device=hidden.device)


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
