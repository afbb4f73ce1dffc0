"""The fast twin of `model.lru.linear_recurrence_plain`: h_t = u_t + λ ⊙ h_{t-1} over packed histories.

T tokens, D dimensions; `position` as in model/lru.py.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fast.context import Context


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
