"""SASRec (Kang & McAuley, Self-Attentive Sequential Recommendation, ICDM 2018): causal self-attention over item ids.

    x_t = Dropout(√D E_{i_t} + P_{n-t})                    E: item table, P: position table, n: tokens of the history
    [q = LN(x),  x = q + Dropout(SA(q, x));  f = LN(x),  x = f + FFN(f)] x blocks,    z = LN(x)
    SA(q, x) = softmax((W_Q q)(W_K x)ᵀ / √(D/heads), t sees no later one) W_V x
    FFN(f) = Dropout(W2 Dropout(ReLU(W1 f)))
    score of item i:  z · E_i

The norms stand where the released code has them: on the queries, not on the keys, and what is carried on is normalised
too. Dropout is on a layer's output, as in the paper (section III-C); the released code has that of the attention on its
weights. Positions count from the last token back, as those of the released code do, which pads on the left.

Histories are packed as in model/lru.py. T tokens, D dimensions, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dropout import Dropout
from model.items import ItemEncoder

ROWS = 256  # queries of one attention


def tokens_after(position: Tensor) -> Tensor:
    """How many tokens of its history come after each token: [T], of `position` [T] as in model/lru.py."""
    end, token = len(position), torch.arange(len(position), device=position.device)
    begins = torch.where(position == 0, token, end)
    next_begin = F.pad(begins[1:], (0, 1), value=end).flip(0).cummin(dim=0).values.flip(0)
    return next_begin - token - 1


def packed_attention(q: Tensor, k: Tensor, v: Tensor, query: Tensor, first: Tensor) -> Tensor:
    """Attention of each query to the tokens of its own history up to its own: [H, Q, d] of q [H, Q, d], k, v [H, T, d].

    query: [Q] which token each query is; first: [Q] the first token of its history.
    """
    token = torch.arange(k.shape[1], device=k.device)
    sees = (token >= first[:, None]) & (token <= query[:, None])  # [Q, T]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=sees)[0]


class SelfAttention(nn.Module):
    """Multi-head attention over packed histories.

    All histories of a batch are one sequence, in which a token sees its own history alone. Rows of tokens see no
    further back than the longest history reaches, so the work grows with T, not T². Every shape is known without a look
    at the positions, for which a GPU would wait.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Without biases, as in the paper; that of the keys would have no effect.
        self.W_Q, self.W_K, self.W_V = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, q: Tensor, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """q, x: [T, D]; with at [B], q is [B, D], of these tokens alone, and so is what is returned."""
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

    def __init__(self, dim: int, num_heads: int, dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-8), SelfAttention(dim, num_heads)
        self.norm2, self.W1, self.W2 = nn.LayerNorm(dim, eps=1e-8), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attn_dropout, self.dropout = Dropout(attn_dropout), Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """at: [B], the only tokens whose output is wanted; then it is [B, D]."""
        q = self.norm1(x if at is None else x[at])
        x = q + self.attn_dropout(self.attention(q, x, position, longest, at))
        f = self.norm2(x)
        return f + self.dropout(self.W2(self.dropout(F.relu(self.W1(f)))))


class SASRec(nn.Module):
    """The recommender, with a learned item table."""

    def __init__(
        self,
        num_items: int,
        dim: int,
        max_len: int,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout: float = 0.5,
        attn_dropout: float = 0.5,
    ) -> None:
        """max_len: the most tokens of a history. Raises ValueError where the heads do not divide the dimensions."""
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} dimensions cannot be shared out among {num_heads} heads")
        self.num_items, self.sizes = num_items, (dim,)
        self.items = ItemEncoder(num_items, dim, None)
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(max_len, dim), std=dim**-0.5))
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(SASRecBlock(dim, num_heads, dropout, attn_dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-8)

    def item_table(self) -> Tensor:
        """E [N+1, D]; row 0 is the begin-of-sequence token, which is no item."""
        return self.items.everything()

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """What each token's history asks for next: z [T, D], or [B, D] of the tokens `at` alone; see FMRLRec.encode."""
        x = self.dropout(x * math.sqrt(x.shape[1]) + F.embedding(tokens_after(position), self.positions))
        for block in self.blocks[:-1]:
            x = block(x, position, longest)
        return self.norm(self.blocks[-1](x, position, longest, at))
