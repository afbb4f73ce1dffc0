"""The Linear Recurrent Unit (section 3.3 of the paper, eq. 8; Orvieto et al., 2023), in real arithmetic.

    h_k = λ ⊙ h_{k-1} + γ ⊙ (B x_k + b),    y_k = Re(C h_k) + c,    λ = exp(-exp(ν) + i exp(θ))

λ, h, B, b and C are complex and stored as real and imaginary parts (`_re`, `_im`). ν, θ and γ are stored as logarithms.

Histories are packed: the T tokens of many histories lie one after another, [T, D], without padding. `position[t]`
counts the steps since the state was last empty: h_{t-1} is carried into t only where position[t] > 0, so position 0
begins a history.
"""

import math

import torch
from torch import Tensor, nn

from model.fast import linear_recurrence, nested_linear
from model.fmrl import nested_uniform_, nested_weight


def ring_init(dim: int, r_min: float, r_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ν_log, θ_log, γ_log), each [dim], with λ uniform on the ring r_min <= |λ| <= r_max.

    ν_log = log(-½ log(u1 (r_max² - r_min²) + r_min²)),  θ_log = log(2π u2),  γ_log = log sqrt(1 - |λ|²)
    """
    # In float64, and clamped because the logarithms of 0 and 1 are not finite.
    u1, u2 = torch.rand(2, dim).double().clamp(1e-12, 1 - 1e-9)
    nu_log = torch.log(-0.5 * torch.log(u1 * (r_max**2 - r_min**2) + r_min**2))
    theta_log = torch.log(2 * math.pi * u2)
    modulus = torch.exp(-torch.exp(nu_log))
    return nu_log.float(), theta_log.float(), torch.log(torch.sqrt(1 - modulus**2)).float()


def on_ring(nu_log: Tensor, theta_log: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Re λ, Im λ), each [dim], of λ = exp(-exp(ν) + i exp(θ))."""
    modulus, angle = torch.exp(-torch.exp(nu_log)), torch.exp(theta_log)
    return modulus * torch.cos(angle), modulus * torch.sin(angle)


def linear_recurrence_plain(
    u_re: Tensor, u_im: Tensor, lambda_re: Tensor, lambda_im: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute h_t = u_t + λ ⊙ h_{t-1}, one token after another. The plain twin of `linear_recurrence`."""
    u, eigenvalue = torch.complex(u_re, u_im), torch.complex(lambda_re, lambda_im)
    states = [u[0]]
    for t in range(1, len(u)):
        states.append(u[t] + eigenvalue * states[-1] if position[t] > 0 else u[t])
    h = torch.stack(states)
    return h.real, h.imag


class LRU(nn.Module):
    """The layer with nested B and C: x [T, D] -> y [T, D] over packed histories."""

    def __init__(self, sizes: tuple[int, ...], bias: bool, r_min: float, r_max: float) -> None:
        """bias: whether there are b and c; r_min, r_max: the ring on which λ is initialised."""
        super().__init__()
        dim = sizes[-1]
        nu_log, theta_log, gamma_log = ring_init(dim, r_min, r_max)
        self.nu_log, self.theta_log, self.gamma_log = map(nn.Parameter, (nu_log, theta_log, gamma_log))
        self.sizes = sizes
        # Imaginary parts start at zero; an imaginary part of c would have no effect on Re(C h) + c.
        self.B_re = nn.Parameter(nested_weight(sizes))
        self.B_im = nn.Parameter(torch.zeros(dim, dim))
        self.C_re = nn.Parameter(nested_weight(sizes))
        self.C_im = nn.Parameter(torch.zeros(dim, dim))
        self.B_bias_re = nn.Parameter(nested_uniform_(torch.empty(dim), sizes)) if bias else None
        self.B_bias_im = nn.Parameter(torch.zeros(dim)) if bias else None
        self.C_bias = nn.Parameter(nested_uniform_(torch.empty(dim), sizes)) if bias else None

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Return (Re λ, Im λ), each [D]."""
        return on_ring(self.nu_log, self.theta_log)

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Return y [T, D] of x [T, D], or [B, D] of the tokens `at` [B] only.

        position: [T]; longest: the most tokens of one history.
        """
        h_re, h_im = linear_recurrence(*self._input(x), *self.eigenvalues(), position, longest)
        return self._output(h_re, h_im) if at is None else self._output(h_re[at], h_im[at])

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Read one more token of every history, for serving.

        x: [B, D]; h: [B, 2, D], the state before (real, imaginary), zeros for an empty history. Returns y [B, D] and
        the state after.
        """
        (u_re, u_im), (lambda_re, lambda_im), (h_re, h_im) = self._input(x), self.eigenvalues(), h.unbind(dim=1)
        h_re, h_im = u_re + lambda_re * h_re - lambda_im * h_im, u_im + lambda_re * h_im + lambda_im * h_re
        return self._output(h_re, h_im), torch.stack([h_re, h_im], dim=1)

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute u = γ ⊙ (B x + b), real and imaginary, each [..., D]."""
        gamma = torch.exp(self.gamma_log)
        u_re = nested_linear(x, self.B_re, self.B_bias_re, self.sizes)
        u_im = nested_linear(x, self.B_im, self.B_bias_im, self.sizes)
        return u_re * gamma, u_im * gamma  # in the dtype of γ: the state stays in float32 under autocast

    def _output(self, h_re: Tensor, h_im: Tensor) -> Tensor:
        """Compute Re(C h) + c: [..., D]."""
        return nested_linear(h_re, self.C_re, self.C_bias, self.sizes) - nested_linear(
            h_im, self.C_im, None, self.sizes
        )
