"""fMRLRec (section 3 of the paper): item table, blocks of LRU and feed-forward network, scores over the catalogue.

    E_i = W f_i + b                                                                         item table, model/items.py
    x   = Dropout(E_{i_1}), Dropout(E_{i_2}), ...                                           a history
    x   = x + Dropout(LRU(LN(x)));   x = x + FFN(LN(x))                                     each block
    z   = x                                                                                 after the last block
    score of item i with the sub-model of size m:  z[:m] · E[i, :m]

The paper does not mention the dropout of the embeddings; the released code has it. Its rate is the FFN's, and the
residual stream carries the dropped values. Beyond the paper, with post-norm: x = LN(x) first, then
x = LN(x + Dropout(LRU(x))); x = LN(x + FFN(x)).

Histories are packed as in model/lru.py. N items, T tokens, D largest size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelSettings
from model.base import CountingModel, Dropout, SequenceModel, nested_mask
from model.extensions.item_table import Whitening
from model.extensions.objective import ranking_bias
from model.fmrl import FMRLLayerNorm, FMRLLinear
from model.items import ItemEncoder
from model.lru import LRU


class FeedForward(nn.Module):
    """FFN(x) = Dropout(W2 (SiLU(G x) ⊙ Dropout(W1 x))): [T, D] -> [T, D]."""

    def __init__(self, sizes: tuple[int, ...], settings: ModelSettings) -> None:
        super().__init__()
        self.G, self.W1, self.W2 = (FMRLLinear(sizes, settings.lru_use_bias) for _ in range(3))
        self.dropout = Dropout(settings.lru_dropout, settings.dropout_from)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.W2(F.silu(self.G(x)) * self.dropout(self.W1(x))))


class Block(nn.Module):
    """x + Dropout(LRU(LN(x))), then x + FFN(LN(x)): [T, D] -> [T, D]; norms last with post-norm."""

    def __init__(self, sizes: tuple[int, ...], settings: ModelSettings) -> None:
        super().__init__()
        self.post_norm = settings.post_norm
        self.norm1 = FMRLLayerNorm(sizes)
        self.lru = LRU(sizes, settings.lru_use_bias, settings.lru_r_min, settings.lru_r_max)
        self.attn_dropout = Dropout(settings.lru_attn_dropout, settings.dropout_from)
        self.norm2, self.ffn = FMRLLayerNorm(sizes), FeedForward(sizes, settings)

    def forward(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Arguments as of `SequenceModel.encode`."""
        y = self.lru(x if self.post_norm else self.norm1(x), position, longest, at)
        return self.after_lru((x if at is None else x[at]) + self.attn_dropout(y))

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Read one more token of every history, without dropout: x [B, D], h [B, 2, D] -> the same after it."""
        y, h = self.lru.step(x if self.post_norm else self.norm1(x), h)
        return self.after_lru(x + y), h

    def after_lru(self, x: Tensor) -> Tensor:
        """Compute the rest of the block: [T, D] -> [T, D]."""
        if not self.post_norm:
            return x + self.ffn(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self.ffn(x))


class FMRLRec(SequenceModel):
    """The recommender. The first m dimensions of all its weights are the sub-model of size m, for every m in sizes."""

    def __init__(
        self,
        num_items: int,
        features: Tensor | Sequence[Tensor] | None,
        settings: ModelSettings,
        whitening: Whitening | None = None,
    ) -> None:
        """features: [N, F] of items 1..N, several to concatenate, or None for a learned item table. whitening: the
        transform that made these features; saved with the weights.

        Raises ValueError for features of another number of items, and for an item embedding without features.
        """
        super().__init__()
        sizes = settings.mrl_hidden_sizes
        self.num_items, self.sizes, self.settings = num_items, sizes, settings
        self.items = ItemEncoder(
            num_items, sizes[-1], features, settings.embedded, whitening, settings.item_embedding_gate
        )
        self.dropout = Dropout(settings.lru_dropout, settings.dropout_from)
        self.norm = FMRLLayerNorm(sizes) if settings.post_norm else None
        self.blocks = nn.ModuleList(Block(sizes, settings) for _ in range(settings.lru_num_blocks))
        # log s of model/extensions/objective.py
        self.log_scale = nn.Parameter(torch.zeros(len(sizes))) if settings.logit_scale else None
        # b / TIMES of model/extensions/objective.py
        self.history_bias = nn.Parameter(torch.zeros(len(sizes))) if settings.history_bias else None

    def ranking_bias(self) -> list[float] | None:
        if self.history_bias is None:
            return None
        return ranking_bias(self.history_bias, self.log_scale)

    def each_block(self) -> Iterator[Block]:
        """Yield the blocks, first to last, typed as blocks."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Return z [T, D], or [B, D] of the tokens `at` only; then the last block skips most work on the others."""
        x = self.read(x.to(next(self.parameters()).dtype))  # under autocast, wider than the item table
        for block in self.blocks[:-1]:
            x = block(x, position, longest)
        return self.blocks[-1](x, position, longest, at)

    def read(self, x: Tensor) -> Tensor:
        """Prepare item embeddings for the first block: [T, D] -> [T, D]."""
        if self.settings.embedding_dropout:
            x = self.dropout(x)
        return x if self.norm is None else self.norm(x)

    def step(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Read one more item of every history, for serving: (z [B, D], hidden).

        x: [B, D], the items' embeddings; hidden: [B, num_blocks, 2, D], the states before, zeros for an empty history.
        Gives the same z as `encode` on the whole history, at the cost of one token.
        """
        x, after = self.read(x), []
        for block, h in zip(self.each_block(), hidden.unbind(dim=1), strict=True):
            x, h = block.step(x, h)
            after.append(h)
        return x, torch.stack(after, dim=1)


def count_parameters(model: SequenceModel | CountingModel) -> int:
    """Count trainable parameters: complex ones once, masked zeros not at all."""
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


# -------------------------------------------------------------------------------------------------------------- slicing
# Train once, deploy at any size (section 3.2 of the paper): the first m dimensions as a model of its own.
#
# W[:m, :m] of a weight [D, D],  W[:m] of the projection [D, F],  v[:m] of a vector [D],  V[:, :m] of an embedding


def slice_model(model: FMRLRec, size: int) -> FMRLRec:
    """Return the stand-alone model of one trained size.

    It scores like the first `size` dimensions of `model`, and shares only the frozen features and their whitening with
    it. Raises ValueError for a size that was not trained.
    """
    if size not in model.sizes:
        raise ValueError(f"size {size} was not trained; the model has {', '.join(map(str, model.sizes))}")
    sizes = tuple(m for m in model.sizes if m <= size)
    features = model.items.features
    settings = replace(model.settings, mrl_hidden_sizes=sizes)
    weight = next(model.parameters())
    with weight.device:
        small = FMRLRec(model.num_items, features or None, settings, model.items.whitening)
    for parameter in small.parameters():  # not small.to(): it would widen the features, which can be large
        parameter.data = parameter.data.to(weight.dtype)
    large = model.state_dict()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(large[name][tuple(slice(0, n) for n in parameter.shape)])
    if model.items.gate and small.items.gate:
        small.items.gate.load_state_dict(model.items.gate.state_dict())
    if model.items.kept is not None:
        small.items.kept = model.items.kept[:, :size]
    return small.train(model.training)
