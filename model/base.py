"""What the models share: nested sizes, the interfaces that the trainer sees, dropout over packed tokens.

T tokens, D dimensions, B histories, N items.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.items import ItemEncoder

# --------------------------------------------------------------------------------------------------------- nested sizes
# Nested sizes M = (M[0], M[1], ..., D) and the mask P of the fMRLRec operator (section 3.2 of the paper).


def increments(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return [(0, M[0]), (M[0], M[1]), ...]: the dimensions that each size adds to the one before.

    Raises ValueError unless sizes are increasing whole numbers from 1 on.
    """
    pairs = list(itertools.pairwise((0, *sizes)))
    if not pairs or any(not isinstance(high, int) or low >= high for low, high in pairs):
        raise ValueError(f"sizes {sizes} must be increasing whole numbers from 1 on")
    return pairs


def nested_mask(sizes: tuple[int, ...]) -> Tensor:
    """Return P of eq. 5, [D, D]: 1 where output i reads input j, else 0."""
    parts = increments(sizes)
    mask = torch.zeros(sizes[-1], sizes[-1])
    for low, high in parts:
        mask[low:high, :high] = 1
    return mask


# ----------------------------------------------------------------------------------------------------------- interfaces
# Sequence models are trained; counting models only count.


class SequenceModel(nn.Module):
    """A model that encodes a history into z and scores item i by z · E_i.

    A subclass sets num_items, sizes and items, and defines `encode`.
    """

    num_items: int
    sizes: tuple[int, ...]  # the nested sizes; the last one is D; a model that is not nested has one
    items: ItemEncoder  # E [N+1, D]
    static_shapes = True  # False: tensor shapes depend on the histories, so a step cannot become a CUDA graph

    def item_table(self) -> Tensor:
        """Return E [N+1, D]; row 0 is the begin-of-sequence token, which is not an item."""
        return self.items.everything()

    def ranking_bias(self) -> list[float] | None:
        """Return what each size adds to the scores of history items (model/extensions/objective.py), or None."""
        return None

    def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
        """Encode each token's history up to it: z [T, D], or [B, D] of the tokens `at` only.

        x: [T, D], the tokens' rows of the item table, histories packed as in model/lru.py; position: [T], steps since
        the state was empty; longest: the most tokens of one history, or more; at: [B].
        """
        raise NotImplementedError


class CountingModel(nn.Module):
    """A model that counts the training items once and scores items by the last one of a history."""

    num_items: int
    sizes: tuple[int, ...] = (1,)  # numbers per item

    def count(self, users: Tensor, items: Tensor) -> None:
        """Count pairs (user, item), [n] each: users from 0, items from 1, sorted by user, then by time."""
        raise NotImplementedError

    def scores(self, last: Tensor) -> Tensor:
        """Return the scores [B, N+1] of all tokens for histories whose last items are `last` [B]."""
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------------------- dropout
# Dropout over packed tokens. Beyond the paper, the first dimensions, which the small sizes use, may be left without it.

Share = tuple[int | Tensor, int]  # first token, which a recorded step reads from a tensor; tokens of the whole batch


class Dropout(nn.Module):
    """Dropout of x [T, D].

    Processes that share a batch each draw the mask of the whole batch and use the rows of their own tokens, so that a
    seed gives the same training on any number of processes.
    """

    def __init__(self, p: float, start: int = 0) -> None:
        """p: probability of a zero. start: the number of first dimensions without dropout."""
        super().__init__()
        self.p, self.start = p, start
        self.share: Share | None = None  # None: x is the whole batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or self.start >= x.shape[-1]:
            return x
        if self.start:
            spared, rest = x.tensor_split([self.start], dim=-1)
            return torch.cat([spared, self.drop(rest)], dim=-1)
        return self.drop(x)

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to every dimension."""
        first, total = self.share or (0, len(x))
        # Not F.dropout or torch.rand: on a CPU they take several times as long as 16 random bits for each number.
        drawn = torch.empty(total, *x.shape[1:-1], -(-x.shape[-1] // 4), dtype=torch.int64, device=x.device)
        bits = drawn.random_(-(2**63), None).view(torch.int16)[..., : x.shape[-1]]
        kept = bits >= min(round(self.p * 2**16) - 2**15, 2**15 - 1)  # 2^15 would wrap around to the smallest number
        # The padding of a share may reach beyond the end of the batch.
        if isinstance(first, Tensor):
            kept = kept[(first + torch.arange(len(x), device=x.device)).clamp(max=total - 1)]
        elif self.share is not None:
            kept = kept[first : first + len(x)]
            kept = F.pad(kept, (0,) * (2 * x.ndim - 1) + (len(x) - len(kept),))
        # As numbers of x's dtype: a product with booleans takes several times as long.
        return x * kept.to(x.dtype).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, start={self.start}"


def set_share(model: nn.Module, share: Share | None) -> None:
    """Set which tokens of the batch the next forward pass reads; None: all."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.share = share
