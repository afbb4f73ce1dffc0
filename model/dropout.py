"""Dropout over packed tokens, of which several processes may each hold a share. T tokens, D dimensions.

Beyond the paper, the first dimensions, those of the small sizes, may be spared.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Dropout of the rows of x [T, D], with the masks of torch's random state.

    Where processes share a batch out, each draws the masks of all its tokens and uses those of its own, so that a seed
    gives the same training on any number of processes.
    """

    def __init__(self, p: float, start: int = 0) -> None:
        """p: with which a value is 0. start: how many of the first dimensions are spared."""
        super().__init__()
        self.p, self.start = p, start
        self.share: tuple[int, int] | None = None  # (first token, tokens of the whole batch); None: x is the batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or self.start >= x.shape[-1]:
            return x
        if self.start:
            spared, rest = x.tensor_split([self.start], dim=-1)
            return torch.cat([spared, self.drop(rest)], dim=-1)
        return self.drop(x)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of every dimension."""
        first, total = self.share or (0, len(x))
        # Not F.dropout, whose masks take three times as long on a CPU.
        kept = torch.rand(total, *x.shape[1:], device=x.device)[first : first + len(x)] >= self.p
        # A share's padding may reach beyond the batch.
        kept = F.pad(kept, (0,) * (2 * x.ndim - 1) + (len(x) - len(kept),))
        return x * kept / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, start={self.start}"


def set_share(model: nn.Module, share: tuple[int, int] | None) -> None:
    """Say which tokens of the batch the next forward pass of this process is of."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.share = share
