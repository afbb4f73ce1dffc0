"""The Linear Recurrent Unit (section 3.3 of the paper, eq. 8; Orvieto et al., 2023), in real arithmetic.

    h_k = λ ⊙ h_{k-1} + γ ⊙ (B x_k + b),    y_k = Re(C h_k) + c,    λ = exp(-exp(ν) + i exp(θ))

λ, h, B, b and C are complex and kept as real and imaginary parts (`_re`, `_im`).

Histories are packed: T tokens of many histories one after another, [T, D]. `position[t]` counts the steps since the
state was last empty, so h_{t-1} is carried into t where position[t] > 0; that is where one history ends and the next
begins. No work is done on padding.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.fmrl import Context, nested_linear, nested_uniform_, nested_weight


def ring_init(dim: int, r_min: float, r_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ν_log, θ_log, γ_log), each [dim], with λ uniform on the ring r_min <= |λ| <= r_max."""
    # In float64 and away from 0 and 1, where the logarithms are not finite.
    u1, u2 = torch.rand(2, dim).double().clamp(1e-12, 1 - 1e-9)
    nu_log = torch.log(-0.5 * torch.log(u1 * (r_max**2 - r_min**2) + r_min**2))
    theta_log = torch.log(2 * math.pi * u2)
    modulus = torch.exp(-torch.exp(nu_log))
    return nu_log.float(), theta_log.float(), torch.log(torch.sqrt(1 - modulus**2)).float()


def on_ring(nu_log: Tensor, theta_log: Tensor) -> tuple[Tensor, Tensor]:
    """λ = exp(-exp(ν) + i exp(θ)): (Re λ, Im λ), each [dim]."""
    modulus, angle = torch.exp(-torch.exp(nu_log)), torch.exp(theta_log)
    return modulus * torch.cos(angle), modulus * torch.sin(angle)


def linear_recurrence(
    u_re: Tensor, u_im: Tensor, lambda_re: Tensor, lambda_im: Tensor, position: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """h_t = u_t + λ h_{t-1} (0 instead of h_{t-1} where position[t] = 0).

    u_re, u_im: [T, D]; lambda_re, lambda_im: [D]; position: [T] int; longest: the most tokens of one history.
    Returns (h_re, h_im), each [T, D]. `linear_recurrence_loop` is the same in plain words.
    """
    return _LinearRecurrence.apply(u_re, u_im, lambda_re, lambda_im, position, longest)


class _RecurrenceContext(Context, Protocol):
    longest: int


class _LinearRecurrence(torch.autograd.Function):
    """The gradient of a recurrence is the recurrence of the gradients, backwards in time with conj(λ); autograd through
    the forward's steps would keep every one of them, at twice the time."""

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
    """h_t += λ h_{t-1} (backwards: h_{t-1} += λ h_t) along every history: complex h [T, D], may be changed in place."""
    return (_scan_by_steps if h.device.type == "cpu" else _scan_by_doubling)(
        h, eigenvalue, position, longest, backwards
    )


def _scan_by_doubling(h: Tensor, eigenvalue: Tensor, position: Tensor, longest: int, backwards: bool = False) -> Tensor:
    """For a GPU: ceil(log2(longest)) steps over all tokens, whose shapes do not depend on the histories. After step k
    every h_t has summed its last (backwards: next) 2^k inputs."""
    shift = 1
    while shift < longest:
        reaches = (position[shift:] >= shift)[:, None]
        target, source = (h[:-shift], h[shift:]) if backwards else (h[shift:], h[:-shift])
        target += torch.where(reaches, eigenvalue * source, 0)
        eigenvalue = eigenvalue * eigenvalue
        shift *= 2
    return h


def _scan_by_steps(h: Tensor, eigenvalue: Tensor, position: Tensor, longest: int, backwards: bool = False) -> Tensor:
    """For a CPU: every token once, in as many steps as the longest history has. Tokens are sorted by position, and at
    a position those of long histories first, so that one step's tokens lie beside each other and in the order of the
    step before."""
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


def linear_recurrence_loop(
    u_re: Tensor, u_im: Tensor, lambda_re: Tensor, lambda_im: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain twin of `linear_recurrence`: one step a token."""
    u, eigenvalue = torch.complex(u_re, u_im), torch.complex(lambda_re, lambda_im)
    states = [u[0]]
    for t in range(1, len(u)):
        states.append(u[t] + eigenvalue * states[-1] if position[t] > 0 else u[t])
    h = torch.stack(states)
    return h.real, h.imag


class LRU(nn.Module):
    """x [T, D] -> y [T, D] over packed histories, with nested B and C."""

    def __init__(self, sizes: tuple[int, ...], bias: bool, r_min: float, r_max: float) -> None:
        super().__init__()
        dim = sizes[-1]
        nu_log, theta_log, gamma_log = ring_init(dim, r_min, r_max)
        self.nu_log, self.theta_log, self.gamma_log = map(nn.Parameter, (nu_log, theta_log, gamma_log))
        self.sizes = sizes
        # Imaginary parts start at zero; the imaginary part of C's bias would have no effect on Re(C h + c).
        self.B_re = nn.Parameter(nested_weight(sizes))
        self.B_im = nn.Parameter(torch.zeros(dim, dim))
        self.C_re = nn.Parameter(nested_weight(sizes))
        self.C_im = nn.Parameter(torch.zeros(dim, dim))
        self.B_bias_re = nn.Parameter(nested_uniform_(torch.empty(dim), sizes)) if bias else None
        self.B_bias_im = nn.Parameter(torch.zeros(dim)) if bias else None
        self.C_bias = nn.Parameter(nested_uniform_(torch.empty(dim), sizes)) if bias else None

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """(Re λ, Im λ), each [D]."""
        return on_ring(self.nu_log, self.theta_log)

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """x [T, D], position [T]; longest: the most tokens of one history. Returns y [T, D], or [B, D] of the tokens
        `at` [B] alone."""
        h_re, h_im = linear_recurrence(*self._input(x), *self.eigenvalues(), position, longest)
        return self._output(h_re, h_im) if at is None else self._output(h_re[at], h_im[at])

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One more token of every history: x [B, D] and the state h [B, 2, D] (real, imaginary) before it, zero for an
        empty one. Returns y [B, D] and the state after it."""
        (u_re, u_im), (lambda_re, lambda_im), (h_re, h_im) = self._input(x), self.eigenvalues(), h.unbind(dim=1)
        h_re, h_im = u_re + lambda_re * h_re - lambda_im * h_im, u_im + lambda_re * h_im + lambda_im * h_re
        return self._output(h_re, h_im), torch.stack([h_re, h_im], dim=1)

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """γ ⊙ (B x + b), real and imaginary."""
        gamma = torch.exp(self.gamma_log)
        u_re = nested_linear(x, self.B_re, self.B_bias_re, self.sizes)
        u_im = nested_linear(x, self.B_im, self.B_bias_im, self.sizes)
        return u_re * gamma, u_im * gamma  # [..., D], in γ's type: the state is never narrowed

    def _output(self, h_re: Tensor, h_im: Tensor) -> Tensor:
        """Re(C h) + c."""
        return nested_linear(h_re, self.C_re, self.C_bias, self.sizes) - nested_linear(
            h_im, self.C_im, None, self.sizes
        )
