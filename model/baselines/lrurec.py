"""LRURec (Yue et al., Linear Recurrent Units for Sequential Recommendation, WSDM 2024): an LRU over item ids.

    x = LN(Dropout(E_{i_t}))
    [x = LN(x + Dropout(LRU(x)));  x = LN(x + Dropout(W2 Dropout(GELU(W1 x))))] x blocks,    z = x
    score of item i:  z · E_i

The LRU is that of model/lru.py with dense B [S, D] and C [D, S] in place of nested ones, and S = 2 D as in the released
code; W1 is [4 D, D]. The released code adds a bias b_i to the score, which is left out: the bias β of the last LN gives
every item β · E_i already, and on Beauty's validation set both learn alike: NDCG@10 after 4, 5 and 6 epochs is .0348,
.0397 and .0460 without it, .0343, .0388 and .0455 with it.

Histories are packed as in model/lru.py. T tokens, D dimensions, S states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dropout import Dropout
from model.items import ItemEncoder
from model.lru import linear_recurrence, on_ring, ring_init


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
        """at: [B], the only tokens whose output is wanted; then it is [B, D]."""
        gamma = torch.exp(self.gamma_log)
        u_re = F.linear(x, self.B_re, self.B_bias_re) * gamma  # [T, S], in γ's type: the state is never narrowed
        u_im = F.linear(x, self.B_im, self.B_bias_im) * gamma
        h_re, h_im = linear_recurrence(u_re, u_im, *on_ring(self.nu_log, self.theta_log), position, longest)
        if at is not None:
            h_re, h_im = h_re[at], h_im[at]
        return F.linear(h_re, self.C_re, self.C_bias) - F.linear(h_im, self.C_im)


class LRURecBlock(nn.Module):
    """LN(x + Dropout(LRU(x))), then LN(x + FFN(x)): [T, D] -> [T, D]."""

    def __init__(self, dim: int, dropout: float, attn_dropout: float, bias: bool, r_min: float, r_max: float) -> None:
        super().__init__()
        self.lru, self.norm1 = DenseLRU(dim, 2 * dim, bias, r_min, r_max), nn.LayerNorm(dim)
        self.W1, self.W2, self.norm2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.LayerNorm(dim)
        for parameter in (*self.W1.parameters(), *self.W2.parameters()):
            small_(parameter)
        self.attn_dropout, self.dropout = Dropout(attn_dropout), Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """at: [B], the only tokens whose output is wanted; then it is [B, D]."""
        y = self.lru(x, position, longest, at)
        x = self.norm1((x if at is None else x[at]) + self.attn_dropout(y))
        return self.norm2(x + self.dropout(self.W2(self.dropout(F.gelu(self.W1(x))))))


class LRURec(nn.Module):
    """The recommender, with a learned item table."""

    def __init__(
        self,
        num_items: int,
        dim: int,
        num_blocks: int = 2,
        dropout: float = 0.5,
        attn_dropout: float = 0.5,
        use_bias: bool = True,
        r_min: float = 0.8,
        r_max: float = 0.99,
    ) -> None:
        super().__init__()
        self.num_items, self.sizes = num_items, (dim,)
        self.items = ItemEncoder(num_items, dim, None)
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(dropout)
        self.blocks = nn.ModuleList(
            LRURecBlock(dim, dropout, attn_dropout, use_bias, r_min, r_max) for _ in range(num_blocks)
        )

    def item_table(self) -> Tensor:
        """E [N+1, D]; row 0 is the begin-of-sequence token, which is no item."""
        return self.items.everything()

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """What each token's history asks for next: z [T, D], or [B, D] of the tokens `at` alone; see FMRLRec.encode."""
        x = self.norm(self.dropout(x))
        for block in self.blocks[:-1]:
            x = block(x, position, longest)
        return self.blocks[-1](x, position, longest, at)


def small(*shape: int) -> nn.Parameter:
    """A weight as the released code begins with."""
    return small_(nn.Parameter(torch.empty(*shape)))


def small_(parameter: nn.Parameter) -> nn.Parameter:
    """Normal with standard deviation .02, cut off at two of it."""
    nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
    return parameter
