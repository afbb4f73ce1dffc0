"""SASRec (Kang & McAuley, Self-Attentive Sequential Recommendation, ICDM 2018): causal self-attention over item ids.

    x_t = Dropout(√D E_{i_t} + P_{n-t})                    E: item table, P: position table, n: tokens of the history
    q = LN(x),  x = q + Dropout(SA(q, x));  f = LN(x),  x = f + FFN(f)             each block;  z = LN(x) after the last
    SA(q, x) = softmax((W_Q q)(W_K x)ᵀ / √(D/heads), t sees no later token) W_V x
    FFN(f) = Dropout(W2 Dropout(ReLU(W1 f)))
    score of item i:  z · E_i

The norms are placed as in the released code: on the queries, not on the keys, and the residual stream is normalised.
Dropout is on a layer's output, as in the paper (section III-C); the released code drops attention weights out.
Positions count back from the last token, as in the released code, which pads on the left.

Histories are packed as in model/lru.py. T tokens, D dimensions, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelSettings
from model.base import Dropout, SequenceModel
from model.items import ItemEncoder

ROWS = 256  # queries per call of the attention


def tokens_after(position: Tensor) -> Tensor:
    """Return the number of later tokens of each token's history: [T], from `position` [T]."""
    end, token = len(position), torch.arange(len(position), device=position.device)
    begins = torch.where(position == 0, token, end)
    next_begin = F.pad(begins[1:], (0, 1), value=end).flip(0).cummin(dim=0).values.flip(0)
    return next_begin - token - 1


def packed_attention(q: Tensor, k: Tensor, v: Tensor, query: Tensor, first: Tensor) -> Tensor:
    """Attend from each query to the tokens of its history up to itself: q [H, Q, d], k, v [H, T, d] -> [H, Q, d].

    query: [Q], the token of each query; first: [Q], the first token of its history.
    """
    token = torch.arange(k.shape[1], device=k.device)
    sees = (token >= first[:, None]) & (token <= query[:, None])  # [Q, T]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=sees)[0]


class SelfAttention(nn.Module):
    """Multi-head attention over packed histories.

    All histories of a batch form one sequence, in which a token sees its own history alone. ROWS queries at a time see
    as far back as the longest history reaches, so the work grows with T, not T². No shape depends on the positions,
    which a GPU would have to wait for.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Without biases, as in the paper; a bias of the keys would have no effect.
        self.W_Q, self.W_K, self.W_V = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, q: Tensor, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Return [T, D] of q and x [T, D], or with `at` [B], whose queries q [B, D] are, [B, D]."""
        q, k, v = (self._heads(part) for part in (self.W_Q(q), self.W_K(x), self.W_V(x)))
        token = torch.arange(len(x), device=x.device)
        first = token - position
        if at is not None:
            y = packed_attention(q, k, v, at, first[at])
        else:
            rows = []
            for start in range(0, len(x), ROWS):
                stop, reach = start + ROWS, max(0, start - longest + 1)
                part = slice(reach, stop)
                rows.append(
                    packed_attention(
                        q[:, start:stop], k[:, part], v[:, part], token[start:stop] - reach, first[start:stop] - reach
                    )
                )
            y = torch.cat(rows, dim=1)
        return y.transpose(0, 1).flatten(1)

    def _heads(self, x: Tensor) -> Tensor:
        """[T, D] -> [H, T, D/H]."""
        return x.unflatten(1, (self.num_heads, -1)).transpose(0, 1)


class SASRecBlock(nn.Module):
    """q + Dropout(SA(q, x)) with q = LN(x), then f + FFN(f) with f = LN(x): [T, D] -> [T, D]."""

    def __init__(self, dim: int, settings: ModelSettings) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-8), SelfAttention(dim, settings.num_heads)
        self.norm2, self.W1, self.W2 = nn.LayerNorm(dim, eps=1e-8), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attn_dropout, self.dropout = Dropout(settings.lru_attn_dropout), Dropout(settings.lru_dropout)

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Arguments as of `SequenceModel.encode`."""
        q = self.norm1(x if at is None else x[at])
        x = q + self.attn_dropout(self.attention(q, x, position, longest, at))
        f = self.norm2(x)
        return f + self.dropout(self.W2(self.dropout(F.relu(self.W1(f)))))


class SASRec(SequenceModel):
    """The recommender, with a learned item table."""

    def __init__(self, num_items: int, settings: ModelSettings) -> None:
        super().__init__()
        dim = settings.mrl_hidden_sizes[-1]
        self.num_items, self.sizes = num_items, (dim,)
        self.items = ItemEncoder(num_items, dim, None)
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(settings.lru_max_len, dim), std=dim**-0.5))
        self.dropout = Dropout(settings.lru_dropout)
        self.blocks = nn.ModuleList(SASRecBlock(dim, settings) for _ in range(settings.lru_num_blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-8)

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        x = self.dropout(x * math.sqrt(x.shape[1]) + F.embedding(tokens_after(position), self.positions))
        for block in self.blocks[:-1]:
            x = block(x, position, longest)
        return self.norm(self.blocks[-1](x, position, longest, at))
