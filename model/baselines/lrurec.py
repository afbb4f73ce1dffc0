"""LRURec (Yue et al., Linear Recurrent Units for Sequential Recommendation, WSDM 2024): an LRU over item ids.

    x = LN(Dropout(E_{i_t}))
    x = LN(x + Dropout(LRU(x)));  x = LN(x + Dropout(W2 Dropout(GELU(W1 x))))          each block;  z = x after the last
    score of item i:  z · E_i

The LRU is the one of model/lru.py with dense B [S, D] and C [D, S] in place of nested ones, and S = 2 D as in the
released code; W1 is [4 D, D]. The released code adds a bias b_i to the score. It is left out here: the bias β of the
last LN already gives every item β · E_i. On Beauty's validation set both learn alike: NDCG@10 after 4, 5 and 6 epochs
is .0348, .0397 and .0460 without it, and .0343, .0388 and .0455 with it.

Histories are packed as in model/lru.py. T tokens, D dimensions, S states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelSettings
from model.base import Dropout, SequenceModel
from model.fast import linear_recurrence
from model.items import ItemEncoder
from model.lru import on_ring, ring_init


class DenseLRU(nn.Module):
    """h_k = λ ⊙ h_{k-1} + γ ⊙ (B x_k + b),  y_k = Re(C h_k) + c  over packed histories: x [T, D] -> y [T, D]."""

    def __init__(self, dim: int, states: int, bias: bool, r_min: float, r_max: float) -> None:
        super().__init__()
        self.nu_log, self.theta_log, self.gamma_log = map(nn.Parameter, ring_init(states, r_min, r_max))
        self.B_re, self.B_im = small(states, dim), small(states, dim)
        self.C_re, self.C_im = small(dim, states), small(dim, states)
        self.B_bias_re = small(states) if bias else None
        self.B_bias_im = small(states) if bias else None
        self.C_bias = small(dim) if bias else None

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Arguments as of `SequenceModel.encode`."""
        gamma = torch.exp(self.gamma_log)
        u_re = F.linear(x, self.B_re, self.B_bias_re) * gamma  # [T, S], in the dtype of γ also under autocast
        u_im = F.linear(x, self.B_im, self.B_bias_im) * gamma
        h_re, h_im = linear_recurrence(u_re, u_im, *on_ring(self.nu_log, self.theta_log), position, longest)
        if at is not None:
            h_re, h_im = h_re[at], h_im[at]
        return F.linear(h_re, self.C_re, self.C_bias) - F.linear(h_im, self.C_im)


class LRURecBlock(nn.Module):
    """LN(x + Dropout(LRU(x))), then LN(x + FFN(x)): [T, D] -> [T, D]."""

    def __init__(self, dim: int, settings: ModelSettings) -> None:
        super().__init__()
        self.lru = DenseLRU(dim, 2 * dim, settings.lru_use_bias, settings.lru_r_min, settings.lru_r_max)
        self.norm1 = nn.LayerNorm(dim)
        self.W1, self.W2, self.norm2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.LayerNorm(dim)
        for parameter in (*self.W1.parameters(), *self.W2.parameters()):
            small_(parameter)
        self.attn_dropout, self.dropout = Dropout(settings.lru_attn_dropout), Dropout(settings.lru_dropout)

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Arguments as of `SequenceModel.encode`."""
        y = self.lru(x, position, longest, at)
        x = self.norm1((x if at is None else x[at]) + self.attn_dropout(y))
        return self.norm2(x + self.dropout(self.W2(self.dropout(F.gelu(self.W1(x))))))


class LRURec(SequenceModel):
    """The recommender, with a learned item table."""

    def __init__(self, num_items: int, settings: ModelSettings) -> None:
        super().__init__()
        dim = settings.mrl_hidden_sizes[-1]
        self.num_items, self.sizes = num_items, (dim,)
        self.items = ItemEncoder(num_items, dim, None)
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(settings.lru_dropout)
        self.blocks = nn.ModuleList(LRURecBlock(dim, settings) for _ in range(settings.lru_num_blocks))

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        x = self.norm(self.dropout(x))
        for block in self.blocks[:-1]:
            x = block(x, position, longest)
        return self.blocks[-1](x, position, longest, at)


def small(*shape: int) -> nn.Parameter:
    """Return a new weight, initialised as in the released code."""
    return small_(nn.Parameter(torch.empty(*shape)))


def small_(parameter: nn.Parameter) -> nn.Parameter:
    """Initialise in place: normal with standard deviation .02, truncated at two standard deviations."""
    nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
    return parameter
