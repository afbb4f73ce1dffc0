"""The fast twins of the layers: the nested linear layer and the recurrence, with hand-written gradients.

    nested_linear         model.fmrl.nested_linear_plain
    linear_recurrence     model.lru.linear_recurrence_plain

T tokens or rows, D dimensions.
"""

import itertools
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.sizes import increments


class Context(Protocol):
    """What forward saves for backward. torch's own annotations do not allow None among the saved tensors."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


# -------------------------------------------------------------------------------------------------- nested linear layer
# The fast twin of `model.fmrl.nested_linear_plain`: (W ⊙ P) x + b without multiplying most of the zeros.
#
# W is multiplied band by band: rows low:high with the inputs 0:high. T rows of x, D the largest size.


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


# ----------------------------------------------------------------------------------------------------------- recurrence
# The fast twin of `model.lru.linear_recurrence_plain`: h_t = u_t + λ ⊙ h_{t-1} over packed histories.
#
# T tokens, D dimensions; `position` as in model/lru.py.


def linear_recurrence(
    u_re: Tensor, u_im: Tensor, lambda_re: Tensor, lambda_im: Tensor, position: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Compute h_t = u_t + λ ⊙ h_{t-1}, without h_{t-1} where position[t] is 0.

    Plain twin: `model.lru.linear_recurrence_plain`. u_re, u_im: [T, D]; lambda_re, lambda_im: [D]; position: [T];
    longest: the most tokens of one history, or more. Returns (h_re, h_im), each [T, D].
    """
    return _LinearRecurrence.apply(u_re, u_im, lambda_re, lambda_im, position, longest)


class _RecurrenceContext(Context, Protocol):
    longest: int


class _LinearRecurrence(torch.autograd.Function):
    """The gradient is the same recurrence backwards in time, with conj(λ):

        ∂h_t = grad_t + conj(λ) ⊙ ∂h_{t+1},    ∂u_t = ∂h_t,    ∂λ = Σ_t ∂h_t ⊙ conj(h_{t-1})

    Autograd would save every step of the forward pass, at twice the time.
    """

    @staticmethod
    def forward(
        ctx: _RecurrenceContext,
        u_re: Tensor,
        u_im: Tensor,
        lambda_re: Tensor,
        lambda_im: Tensor,
        position: Tensor,
        longest: int,
    ) -> tuple[Tensor, Tensor]:
        eigenvalue = torch.complex(lambda_re, lambda_im)
        h = _scan(torch.complex(u_re, u_im), eigenvalue, position, longest)
        ctx.save_for_backward(h, eigenvalue, position)
        ctx.longest = longest
        return h.real, h.imag

    @staticmethod
    @once_differentiable
    def backward(ctx: _RecurrenceContext, grad_re: Tensor, grad_im: Tensor) -> tuple[Tensor | None, ...]:
        h, eigenvalue, position = ctx.saved_tensors
        grad = _scan(torch.complex(grad_re, grad_im), eigenvalue.conj(), position, ctx.longest, backwards=True)
        carried = (position[1:] > 0)[:, None]
        grad_eigenvalue = torch.where(carried, grad[1:] * h[:-1].conj(), 0).sum(dim=0)
        return grad.real, grad.imag, grad_eigenvalue.real, grad_eigenvalue.imag, None, None


def _scan(h: Tensor, eigenvalue: Tensor, position: Tensor, longest: int, backwards: bool = False) -> Tensor:
    """Compute h_t += λ h_{t-1} (backwards: h_{t-1} += λ h_t) along every history. May overwrite h [T, D], complex."""
    return (_scan_by_steps if h.device.type == "cpu" else _scan_by_doubling)(
        h, eigenvalue, position, longest, backwards
    )


def _scan_by_doubling(h: Tensor, eigenvalue: Tensor, position: Tensor, longest: int, backwards: bool = False) -> Tensor:
    """Scan all tokens in ceil(log2(longest)) steps, for a GPU: no shape depends on the histories.

    After step k, every h_t is the decayed sum of its last (backwards: next) 2^k inputs.
    """
    shift = 1
    while shift < longest:
        reaches = (position[shift:] >= shift)[:, None]
        target, source = (h[:-shift], h[shift:]) if backwards else (h[shift:], h[:-shift])
        target += torch.where(reaches, eigenvalue * source, 0)
        eigenvalue = eigenvalue * eigenvalue
        shift *= 2
    return h


def _scan_by_steps(h: Tensor, eigenvalue: Tensor, position: Tensor, longest: int, backwards: bool = False) -> Tensor:
    """Scan one position after another, for a CPU: every token once.

    Tokens are sorted by position, then by descending length of their history, so that the tokens of a step are
    adjacent and in the order of the step before.
    """
    history = (position == 0).cumsum(dim=0) - 1  # [T]
    length = torch.bincount(history)
    place = torch.empty_like(length)
    place[length.argsort(descending=True)] = torch.arange(len(length))
    order = (position * len(length) + place[history]).argsort()
    counts = torch.bincount(position).tolist()
    steps = h[order].split(counts)
    for k in reversed(range(1, len(counts))) if backwards else range(1, len(counts)):
        now, before = steps[k], steps[k - 1][: counts[k]]
        if backwards:
            before.addcmul_(now, eigenvalue)
        else:
            now.addcmul_(before, eigenvalue)
    h[order] = torch.cat(steps)
    return h
