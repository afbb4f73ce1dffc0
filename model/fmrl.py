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
from collections.abc import Iterator
from typing import Protocol

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


def nested_linear_plain(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """The plain twin of `nested_linear`: (W ⊙ P) x + b."""
    return F.linear(x, weight * nested_mask(sizes).to(weight), bias)


def nested_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """(W ⊙ P) x + b (eq. 5) by bands of rows, without multiplying most of the zeros: [..., D] -> [..., D].

    weight: [D, D]; bias: [D] or None. Under autocast the products are computed, and returned, in its type.
    """
    narrow = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if narrow else weight.dtype
    return _NestedLinear.apply(x, weight, bias, sizes, dtype)


def bands(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """The increments, those below a quarter of D as one: products of a few rows cost more than zeros."""
    wide = [m for m in sizes if 4 * m >= sizes[-1]]
    return list(itertools.pairwise((0, *wide)))


class Context(Protocol):
    """What the forward of an autograd function leaves for its backward; torch's own annotations know no None."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _NestedContext(Context, Protocol):
    sizes: tuple[int, ...]
    wide: torch.dtype
    biased: bool


class _NestedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _NestedContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [T, D]
        y = [
            F.linear(rows[:, :high], part, None if bias is None else bias[low:high].to(dtype))
            for low, high, part in _band_weights(weight, sizes, dtype)
        ]
        ctx.save_for_backward(rows, weight)
        ctx.sizes, ctx.wide, ctx.biased = sizes, weight.dtype, bias is not None
        return torch.cat(y, dim=1).reshape(x.shape)

    @staticmethod
    def backward(ctx: _NestedContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wide, dim = ctx.wide, rows.shape[1]
        grad_rows = grad.reshape(-1, dim)
        grad_bias = grad_rows.sum(dim=0, dtype=wide) if ctx.biased else None
        grad_rows = grad_rows.to(rows.dtype)
        grad_x = torch.zeros(len(rows), dim, dtype=wide, device=rows.device)
        grad_weight = torch.empty(dim, dim, dtype=wide, device=rows.device)
        for low, high, part in _band_weights(weight, ctx.sizes, rows.dtype):
            grad_x[:, :high] += grad_rows[:, low:high] @ part
            grad_weight[low:high, :high] = grad_rows[:, low:high].T @ rows[:, :high]
        return grad_x.reshape(grad.shape), _zero_outside_(grad_weight, ctx.sizes), grad_bias, None, None


def _band_weights(weight: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(low, high, W[low:high, :high] ⊙ P) of every band, in the type of the products."""
    for low, high in bands(sizes):
        part = weight[low:high, :high].to(dtype)
        if low == 0:  # the one band of several increments
            part = _zero_outside_(part.clone(), tuple(m for m in sizes if m <= high))
        yield low, high, part


def _zero_outside_(weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """weight ⊙ P, in place."""
    for low, high in increments(sizes):
        weight[low:high, high:] = 0
    return weight


def nested_weight(sizes: tuple[int, ...]) -> Tensor:
    """An initial weight [D, D]: uniform by rows, zero outside the mask."""
    return _zero_outside_(nested_uniform_(torch.empty(sizes[-1], sizes[-1]), sizes), sizes)


class FMRLLinear(nn.Module):
    """y = (W ⊙ P) x + b, with P the nested mask: [..., D] -> [..., D] (eq. 5)."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        increments(sizes)  # raises where sizes cannot be nested
        self.sizes = sizes
        self.weight = nn.Parameter(nested_weight(sizes))
        self.bias = nn.Parameter(nested_uniform_(torch.empty(sizes[-1]), sizes))

    def forward(self, x: Tensor) -> Tensor:
        return nested_linear(x, self.weight, self.bias, self.sizes)


class FMRLLayerNorm(nn.Module):
    """One LayerNorm per increment M[j-1]:M[j], so that the first m outputs depend on the first m inputs alone:
    [..., D] -> [..., D]."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.increments = increments(sizes)
        self.weight = nn.Parameter(torch.ones(sizes[-1]))
        self.bias = nn.Parameter(torch.zeros(sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.layer_norm(x[..., low:high], (high - low,)) for low, high in self.increments]
        return torch.cat(parts, dim=-1) * self.weight + self.bias
