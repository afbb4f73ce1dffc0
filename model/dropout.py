"""Dropout over packed tokens, of which several processes may each hold a share. T tokens, D dimensions.

Beyond the paper, the first dimensions, those of the small sizes, may have less of it than the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 64  # how many dimensions are the first ones


class Dropout(nn.Module):
    """Dropout of the rows of x [T, D], with the masks of torch's random state.

    Where processes share a batch out, each draws the masks of all its tokens and uses those of its own, so that a seed
    gives the same training on any number of processes.
    """

    def __init__(self, p: float, small: float = 1.0) -> None:
        """p: with which a value is 0. small: what p is multiplied by in the first SMALL dimensions."""
        super().__init__()
        self.p, self.small = p, small
        self.share: tuple[int, int] | None = None  # (first token, tokens of the whole batch); None: x is the batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        first, total = self.share or (0, len(x))
        p = self.p if self.small == 1 else self.probabilities(x.shape[-1], x.device)
        # Not F.dropout, whose masks take three times as long on a CPU.
        kept = torch.rand(total, *x.shape[1:], device=x.device)[first : first + len(x)] >= p
        # A share's padding may reach beyond the batch.
        kept = F.pad(kept, (0,) * (2 * x.ndim - 1) + (len(x) - len(kept),))
        return x * kept / (1 - p)

    def probabilities(self, dim: int, device: torch.device | None = None) -> Tensor:
        """p of every dimension: [D]."""
        return self.p * torch.where(torch.arange(dim, device=device) < SMALL, self.small, 1.0)

    def extra_repr(self) -> str:
        return f"p={self.p}, small={self.small}"


def set_share(model: nn.Module, share: tuple[int, int] | None) -> None:
    """Say which tokens of the batch the next forward pass of this process is of."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.share = share
