"""The fast twin of `model.fmrl.nested_linear_plain`: (W ⊙ P) x + b without multiplying most of the zeros.

W is multiplied band by band: rows low:high with the inputs 0:high. T rows of x, D the largest size.
"""

import itertools
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fast.context import Context
from model.sizes import increments


def nested_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """Compute (W ⊙ P) x + b (eq. 5): x [..., D], weight [D, D], bias [D] or None -> [..., D].

    Plain twin: `model.fmrl.nested_linear_plain`. Under autocast, products and the result have the autocast dtype.
    """
    narrow = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if narrow else weight.dtype
    return _NestedLinear.apply(x, weight, bias, sizes, dtype)


def bands(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the increments, with those below D/4 merged into one: products of a few rows cost more than zeros."""
    wide = [m for m in sizes if 4 * m >= sizes[-1]]
    return list(itertools.pairwise((0, *wide)))


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
        return grad_x.reshape(grad.shape), _mask_(grad_weight, ctx.sizes), grad_bias, None, None


def _band_weights(weight: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (low, high, (W ⊙ P)[low:high, :high]) of every band, in `dtype`."""
    for low, high in bands(sizes):
        part = weight[low:high, :high].to(dtype)
        if low == 0:  # the only band that may hold several increments
            part = _mask_(part.clone(), tuple(m for m in sizes if m <= high))
        yield low, high, part


def _mask_(weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Multiply a weight by P, in place."""
    for low, high in increments(sizes):
        weight[low:high, high:] = 0
    return weight
