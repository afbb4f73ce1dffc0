"""The fMRLRec operator (section 3.2 of the paper): weights whose first m dimensions are a complete smaller weight.

With sizes M = (8, 16, 32, ...), the outputs M[j-1]:M[j] read the inputs 0:M[j] and nothing else:

                  inputs
                8  16      32
              +--+--+-----+
     outputs 8|##|  |     |      # kept, blank: zero
              +--+--+     |
            16|#####|     |      W[:8, :8], W[:16, :16] and W[:32, :32] are
              +-----+-----+      the weights of the models of size 8, 16 and 32
              |###########|
            32|###########|
              +-----------+

D: the largest size. Shapes are given for inputs of any leading shape (..., D).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def increments(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """[(0, M[0]), (M[0], M[1]), ...]: the dimensions that each size adds to the one before.

    Raises ValueError if sizes are not increasing whole numbers from 1 on.
    """
    pairs = list(itertools.pairwise((0, *sizes)))
    if not pairs or any(not isinstance(high, int) or low >= high for low, high in pairs):
        raise ValueError(f"sizes {sizes} must be increasing whole numbers from 1 on")
    return pairs


def nested_mask(sizes: tuple[int, ...]) -> Tensor:
    """P of eq. 5: [D, D], 1 where output i may read input j."""
    parts = increments(sizes)
    mask = torch.zeros(sizes[-1], sizes[-1])
    for low, high in parts:
        mask[low:high, :high] = 1
    return mask


def nested_uniform_(parameter: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Initialise rows M[j-1]:M[j] of a weight [D, D] or bias [D] as torch's Linear with fan_in M[j], the number of
    inputs they read: uniform in ±1/sqrt(M[j])."""
    with torch.no_grad():
        for low, high in increments(sizes):
            parameter[low:high].uniform_(-1 / math.sqrt(high), 1 / math.sqrt(high))
    return parameter


class FMRLLinear(nn.Module):
    """y = (W ⊙ P) x + b, with P the nested mask: [..., D] -> [..., D] (eq. 5)."""

    def __init__(self, sizes: tuple[int, ...], bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("mask", nested_mask(sizes), persistent=False)
        self.weight = nn.Parameter(nested_uniform_(torch.empty(sizes[-1], sizes[-1]), sizes) * self.mask)
        self.bias = nn.Parameter(nested_uniform_(torch.empty(sizes[-1]), sizes)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class FMRLLayerNorm(nn.Module):
    """One LayerNorm per increment M[j-1]:M[j], so that the first m outputs depend on the first m inputs alone:
    [..., D] -> [..., D]."""

    def __init__(self, sizes: tuple[int, ...], eps: float = 1e-5) -> None:
        super().__init__()
        self.increments = increments(sizes)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(sizes[-1]))
        self.bias = nn.Parameter(torch.zeros(sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.layer_norm(x[..., low:high], (high - low,), eps=self.eps) for low, high in self.increments]
        return torch.cat(parts, dim=-1) * self.weight + self.bias
