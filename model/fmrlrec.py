"""fMRLRec (section 3 of the paper): item encoder, blocks of LRU and feed-forward network, scores over the catalogue.

    item i:  features [F] ---Linear---> E_i [D]                    (item table E, [N+1, D]; row 0: begin of sequence)
    history: E_{i1} E_{i2} ... ---[x + Dropout(LRU(LN(x))); x + FFN(LN(x))] x blocks---> z [D]
             (beyond the paper, with post-norm:
             LN(Dropout(E_{i1})) ... ---[LN(x + Dropout(LRU(x))); LN(x + FFN(x))] x blocks---> z [D])
    score of item i with the sub-model of size m:  z[:m] · E[i, :m]

Histories are packed as in model/lru.py. N items, T tokens, F feature width, D largest size.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelSettings
from model.dropout import Dropout
from model.extensions.whitening import Whitening
from model.fmrl import FMRLLayerNorm, FMRLLinear, nested_mask
from model.items import ItemEncoder
from model.lru import LRU


class FeedForward(nn.Module):
    """FFN(x) = Dropout(W2 (SiLU(G x) ⊙ Dropout(W1 x))): [T, D] -> [T, D]."""

    def __init__(self, sizes: tuple[int, ...], settings: ModelSettings) -> None:
        super().__init__()
        self.G, self.W1, self.W2 = FMRLLinear(sizes), FMRLLinear(sizes), FMRLLinear(sizes)
        self.dropout = Dropout(settings.lru_dropout, settings.dropout_from)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.W2(F.silu(self.G(x)) * self.dropout(self.W1(x))))


class Block(nn.Module):
    """x + Dropout(LRU(LN(x))), then x + FFN(LN(x)): [T, D] -> [T, D]. With post-norm, LN(x + Dropout(LRU(x))), then
    LN(x + FFN(x))."""

    def __init__(self, sizes: tuple[int, ...], settings: ModelSettings) -> None:
        super().__init__()
        self.post_norm = settings.post_norm
        self.norm1 = FMRLLayerNorm(sizes)
        self.lru = LRU(sizes, settings.lru_use_bias, settings.lru_r_min, settings.lru_r_max)
        self.attn_dropout = Dropout(settings.lru_attn_dropout, settings.dropout_from)
        self.norm2, self.ffn = FMRLLayerNorm(sizes), FeedForward(sizes, settings)

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """at: [B], the only tokens whose output is wanted; then it is [B, D]."""
        y = self.lru(x if self.post_norm else self.norm1(x), position, longest, at)
        return self.after_lru((x if at is None else x[at]) + self.attn_dropout(y))

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One more token of every history, without dropout: x [B, D], h [B, 2, D] -> the same after it."""
        y, h = self.lru.step(x if self.post_norm else self.norm1(x), h)
        return self.after_lru(x + y), h

    def after_lru(self, x: Tensor) -> Tensor:
        """The rest of the block: [T, D] -> [T, D]."""
        if not self.post_norm:
            return x + self.ffn(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self.ffn(x))


class FMRLRec(nn.Module):
    """The recommender; the first m dimensions of all its weights are the sub-model of size m, for every m in sizes."""

    def __init__(
        self,
        num_items: int,
        features: Tensor | Sequence[Tensor] | None,
        settings: ModelSettings,
        whitening: Whitening | None = None,
    ) -> None:
        """features: [N, F] of items 1..N, or several side by side, or None for a learned item table. whitening: as of
        ItemEncoder. Raises ValueError for features of another number of items, and for an item embedding without
        features."""
        super().__init__()
        sizes = settings.mrl_hidden_sizes
        self.num_items, self.sizes, self.settings = num_items, sizes, settings
        self.items = ItemEncoder(num_items, sizes[-1], features, settings.embedded, whitening)
        self.dropout = Dropout(settings.lru_dropout, settings.dropout_from)
        self.norm = FMRLLayerNorm(sizes) if settings.post_norm else None
        self.blocks = nn.ModuleList(Block(sizes, settings) for _ in range(settings.lru_num_blocks))
        # log s of model/extensions/objective.py
        self.log_scale = nn.Parameter(torch.zeros(len(sizes))) if settings.logit_scale else None

    def each_block(self) -> Iterator[Block]:
        """The blocks, first to last, for what a module in general cannot do."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def item_table(self) -> Tensor:
        """E [N+1, D]; row 0 is the begin-of-sequence token, which is no item."""
        return self.items.everything()

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """What each token's history asks for next: z [T, D].

        x: [T, D] the tokens' embeddings, rows of the item table; position: [T] steps since the state was empty;
        longest: the most tokens of one history; at: [B], the only tokens to answer for: then z is [B, D], and the last
        block computes little of the others.
        """
        x = self.read(x.to(next(self.parameters()).dtype))  # wider than the table under autocast
        for block in self.blocks[:-1]:
            x = block(x, position, longest)
        return self.blocks[-1](x, position, longest, at)

    def read(self, x: Tensor) -> Tensor:
        """Items' embeddings as the first block reads them: [T, D] -> [T, D]."""
        return x if self.norm is None else self.norm(self.dropout(x))

    def step(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One more item of every history, for serving: (z [B, D], hidden).

        x: [B, D], the items' embeddings; hidden: [B, num_blocks, 2, D], the states before, zeros for an empty history.
        What `encode` gives for the whole history, at the cost of one token.
        """
        x, after = self.read(x), []
        for block, h in zip(self.each_block(), hidden.unbind(dim=1), strict=True):
            x, h = block.step(x, h)
            after.append(h)
        return x, torch.stack(after, dim=1)


class HasParameters(Protocol):
    """FMRLRec, or a baseline."""

    @property
    def sizes(self) -> tuple[int, ...]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def count_parameters(model: HasParameters) -> int:
    """Trainable parameters, complex ones counted once and masked zeros not counted."""
    kept = int(nested_mask(model.sizes).sum())
    masked = {
        id(p)
        for module in model.modules()
        if isinstance(module, FMRLLinear | LRU)
        for p in module.parameters(recurse=False)
        if p.ndim == 2
    }
    return sum(
        kept if id(p) in masked else p.numel() for name, p in model.named_parameters() if not name.endswith("_im")
    )
