"""The fMRLRec operator (section 3.2 of the paper): weights whose first m dimensions are a complete smaller weight.

    fMRLRec(W, P) = W ⊙ P                                                                                     (eq. 5)

With sizes M = (8, 16, 32, ...), the outputs M[j-1]:M[j] read the inputs 0:M[j] and no others:

                  inputs
                8  16      32
              +--+--+-----+
     outputs 8|##|  |     |      #: P = 1, blank: P = 0
              +--+--+     |
            16|#####|     |      W[:8, :8], W[:16, :16] and W[:32, :32] are
              +-----+-----+      the weights of the models of size 8, 16 and 32
              |###########|
            32|###########|
              +-----------+

D: the largest size. "..." in a shape stands for any leading dimensions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import increments, nested_mask
from model.fast import nested_linear


def nested_linear_plain(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """Compute (W ⊙ P) x + b: x [..., D] -> [..., D]. The plain twin of `nested_linear`."""
    return F.linear(x, weight * nested_mask(sizes).to(weight), bias)


def nested_uniform_(parameter: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Initialise a weight [D, D] or bias [D] in place: rows M[j-1]:M[j] uniform in ±1/sqrt(M[j]).

    That is the default of nn.Linear for a fan-in of M[j], the number of inputs that these rows read.
    """
    with torch.no_grad():
        for low, high in increments(sizes):
            parameter[low:high].uniform_(-1 / math.sqrt(high), 1 / math.sqrt(high))
    return parameter


def nested_weight(sizes: tuple[int, ...]) -> Tensor:
    """Return an initial weight [D, D]: uniform where P is 1, zero elsewhere."""
    mask = nested_mask(sizes)
    return nested_uniform_(torch.empty(sizes[-1], sizes[-1]), sizes).masked_fill(mask == 0, 0)


class FMRLLinear(nn.Module):
    """y = (W ⊙ P) x + b (eq. 5): [..., D] -> [..., D]."""

    def __init__(self, sizes: tuple[int, ...], bias: bool = True) -> None:
        """Raises ValueError if the sizes do not increase."""
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(nested_weight(sizes))
        self.bias = nn.Parameter(nested_uniform_(torch.empty(sizes[-1]), sizes)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nested_linear(x, self.weight, self.bias, self.sizes)


class FMRLLayerNorm(nn.Module):
    """One LayerNorm per increment M[j-1]:M[j]: [..., D] -> [..., D].

    The first m outputs then depend on the first m inputs alone, which exact slicing needs.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.increments = increments(sizes)
        self.weight = nn.Parameter(torch.ones(sizes[-1]))
        self.bias = nn.Parameter(torch.zeros(sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.layer_norm(x[..., low:high], (high - low,)) for low, high in self.increments]
        return torch.cat(parts, dim=-1) * self.weight + self.bias
