"""A straightforward implementation of the method, the baseline of the benchmarks.

It pads sequences to 50, computes the logits of each size separately at all positions and keeps them all in memory, and
runs the recurrence with complex B and C over the padding. Evaluation projects the item table for every batch, scores
all positions and sorts the scores. It shares the weights of an FMRLRec and is used only by benchmarks.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from model import FMRLRec
from model.fmrl import nested_linear_plain
from model.fmrlrec import FeedForward
from model.lru import LRU
from model.sizes import nested_mask


class Baseline(torch.nn.Module):
    """An FMRLRec with straightforward computation. B rows, L padded length, N items."""

    def __init__(self, model: FMRLRec) -> None:
        super().__init__()
        self.model = model

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return z [B, L, D] and the item table [N+1, D] for left-padded tokens [B, L]."""
        table = self.model.item_table()
        x, valid = self.model.dropout(table[tokens]), tokens > 0
        for block in self.model.each_block():
            x = x + block.attn_dropout(self._lru(block.lru, block.norm1(x), valid))
            x = x + self._feed_forward(block.ffn, block.norm2(x))
        return x, table

    @staticmethod
    def _lru(lru: LRU, x: Tensor, valid: Tensor) -> Tensor:
        assert lru.B_bias_re is not None and lru.B_bias_im is not None and lru.C_bias is not None  # as in the paper
        eigenvalue = torch.complex(*lru.eigenvalues())
        mask = nested_mask(lru.sizes).to(x.device)
        B = torch.complex(lru.B_re * mask, lru.B_im * mask)
        C = torch.complex(lru.C_re * mask, lru.C_im * mask)
        bias = torch.complex(lru.B_bias_re, lru.B_bias_im)
        h = F.linear(x.to(B.dtype), B, bias) * torch.exp(lru.gamma_log)
        power, shift = eigenvalue, 1
        mask = valid.to(x.dtype)[..., None]
        while shift < x.shape[1]:
            past = F.pad(h[:, :-shift] * mask[:, :-shift], (0, 0, shift, 0))
            h = h + power * past
            power, shift = power * power, shift * 2
        return F.linear(h, C).real + lru.C_bias

    @staticmethod
    def _feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
        G, W1, W2 = (
            functools.partial(nested_linear_plain, weight=w.weight, bias=w.bias, sizes=w.sizes)
            for w in (ffn.G, ffn.W1, ffn.W2)
        )
        return ffn.dropout(W2(F.silu(G(x)) * ffn.dropout(W1(x))))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over sizes and labelled positions."""
        z, table = self.encode(tokens)
        logits = torch.stack([z[..., :m] @ table[:, :m].T for m in self.model.sizes])  # [M, B, L, N+1]
        losses = [F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=0) for scores in logits]
        return torch.stack(losses).mean()

    def ranks(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return ranks [M, B] of the targets at every size, by a full sort of the scores."""
        z, table = self.encode(tokens)
        ranks = []
        for m in self.model.sizes:
            scores = (z[..., :m] @ table[:, :m].T)[:, -1]
            scores[:, 0] = -torch.inf
            order = scores.argsort(dim=1, descending=True)
            ranks.append((order == targets[:, None]).nonzero()[:, 1] + 1)
        return torch.stack(ranks)


def padded(rows: list[list[int]], length: int = 50) -> Tensor:
    """Pad rows of tokens on the left with 0: [B, length]."""
    return torch.tensor([[0] * (length - len(row)) + row[-length:] for row in rows])
