"""The item table (section 3 of the paper): frozen features of an item, projected.

    E_i = W f_i + b                   f_i: the features of item i, concatenated, [F]; token 0: f_0 = 0, so E_0 = b
    E_i = W f_i + b + V_i             beyond the paper, in the first K dimensions
    E_i = W f_i + b + g_i V_i         and with a gate (model/extensions/item_table.py)

N items, F feature width, D largest size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.extensions.item_table import ROWS, EmbeddingGate, Whitening, unmap_pages

MAPPED = 2**12  # rows read of large features until their pages are unmapped; each maps up to 64 KB around it on Linux
Lookup = Callable[[Tensor, Tensor], Tensor]  # items [n] and a weight [N+1, K] -> rows [n, K], as F.embedding


class Factors(NamedTuple):
    """An item table as a product, E = features weightᵀ (+ V in the first K dimensions), for the loss.

    The bias is left out: it adds the same number to all logits of a position, which a softmax ignores.
    """

    features: Tensor  # [N+1, F], frozen, in the dtype of the products
    weight: Tensor  # [D, F]
    embedding: Tensor | None = None  # V [N+1, K], gated if there is a gate; K is a size

    def table(self) -> Tensor:
        """Multiply E out: [N+1, D]."""
        E = self.features @ self.weight.to(self.features.dtype).T
        if self.embedding is None:
            return E
        V = self.embedding.to(E.dtype)
        return E + F.pad(V, (0, E.shape[1] - V.shape[1]))


class ItemEncoder(nn.Module):
    """The item table E [N+1, D]: a linear projection of frozen features, or a learned table if there are none.

    The projection has no mask: the sub-model of size m uses its first m output columns. Features keep their dtype and
    may be mapped from files, [N, F_1], [N, F_2], ...; only the rows in use are read.
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        features: Tensor | Sequence[Tensor] | None,
        embedding: int = 0,
        whitening: Whitening | None = None,
        gate: bool = False,
    ) -> None:
        """features: [N, F], or several to concatenate, row i - 1 for item i; None: a learned table. embedding: K, the
        width of V, initially zero; 0: no V. whitening: the transform that made these features; saved with the weights.
        gate: whether V is left out for items without a training event.

        Raises ValueError for features of another number of items, and for an embedding without features.
        """
        super().__init__()
        self.num_items = num_items
        if embedding and features is None:
            raise ValueError("a learned item table takes no item embedding; give features, or leave embedding at 0")
        self.lookup: Lookup = F.embedding  # reads rows of the learned embedding; another one where they are spread
        self.V = nn.Parameter(torch.zeros(num_items + 1, embedding)) if embedding else None
        self.gate = EmbeddingGate(num_items) if embedding and gate else None
        self.parts: list[str] = []
        self._mapped = 0  # rows of large features read since their pages were unmapped
        self._whole: Tensor | None = None
        self.kept: Tensor | None = None  # E, for an export without the features
        self.whitening: Whitening | None = None
        if features is None:
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_items + 1, dim), std=0.02, a=-0.04, b=0.04))
            return
        for part in [features] if isinstance(features, Tensor) else features:
            if part.ndim != 2 or len(part) != num_items:
                raise ValueError(f"features of shape {list(part.shape)} do not describe {num_items} items")
            self.parts.append(f"features_{len(self.parts)}")
            self.register_buffer(self.parts[-1], part, persistent=False)
        self.projection = nn.Linear(sum(part.shape[1] for part in self.features), dim)
        self.whitening = whitening
        if whitening:
            self.register_load_state_dict_post_hook(_whiten_again)

    @property
    def features(self) -> list[Tensor]:
        """The features [N, F_1], [N, F_2], ... of items 1..N; empty for a learned table."""
        return [self.get_buffer(name) for name in self.parts]

    def rows(self, items: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the features [n, F] of items [n]; zeros for token 0."""
        items = items.to(self.features[0].device)
        row = (items - 1).clamp_min(0)
        rows = torch.cat([part[row].to(dtype) for part in self.features], dim=1)
        self._mapped += len(items)
        if self._mapped >= MAPPED:
            self._mapped = 0
            for part in self.features:
                unmap_pages(part)
        return rows * (items > 0)[:, None]

    @property
    def spread(self) -> bool:
        """Whether the rows of the learned embedding are spread over processes, which read them together."""
        return self.lookup is not F.embedding

    @property
    def learned(self) -> nn.Parameter | None:
        """The learned embedding [N+1, K]: V, or the table if there are no features; None without one."""
        return self.V if self.parts else self.table

    def forward(
        self,
        items: Tensor,
        sparse_gradient: bool = False,
        lookup: Lookup | None = None,
    ) -> Tensor:
        """Return E of items [n] (0: begin of sequence): [n, D].

        sparse_gradient: use a sparse gradient for V on a CPU; it is added to the loss's dense one. lookup: reads rows
        of the learned embedding; None: `self.lookup`.
        """
        lookup = lookup or self.lookup
        if not self.parts:
            return lookup(items, self.table)
        projected = self.projection(self.rows(items, self.projection.weight.dtype))
        if self.V is None:
            return projected
        sparse = sparse_gradient and self.V.device.type == "cpu"  # saves a dense gradient of zeros
        V = F.embedding(items, self.V, sparse=True) if sparse else lookup(items, self.V)
        V = self.gate(V, items) if self.gate else V
        E = projected + F.pad(V, (0, projected.shape[1] - V.shape[1]))
        return self.gate.rescaled(E, items) if self.gate and not self.training else E

    def everything(self) -> Tensor:
        """Return E of all tokens, [N+1, D]: the kept one, or computed in chunks of items."""
        if self.kept is not None:
            return self.kept
        if not self.parts:
            return self.table
        tokens = torch.arange(self.num_items + 1, device=self.projection.weight.device)
        return torch.cat([self(some) for some in tokens.split(ROWS)])

    @torch.no_grad()
    def new_item_scale(
        self, chunks: Iterable[Tensor] | None = None, total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> float:
        """Return the factor that gives rows without V the mean norm of trained items' rows; 1 for a model without V.

        New products have no V. Their rows are shorter, so all their scores would be smaller. chunks: the items that
        this process measures, in parts; None: all. total: sums over the processes.
        """
        if self.V is None:
            return 1.0
        norms = torch.zeros(2, dtype=torch.float64, device=self.V.device)  # summed over E and over E - V
        for items in chunks or torch.arange(self.num_items + 1, device=self.V.device).split(ROWS):
            E, V = self(items) if self.kept is None else self.kept[items], self.lookup(items, self.V)
            content = E.clone()
            content[:, : V.shape[1]] -= self.gate(V, items) if self.gate else V
            trained = items > 0 if self.gate is None else self.gate.trained[items] & (items > 0)
            norms += torch.stack([rows[trained].norm(dim=1).sum(dtype=torch.float64) for rows in (E, content)])
        of_rows, of_content = total(norms).tolist()
        return of_rows / max(of_content, 1e-12) if of_rows or of_content else 1.0

    def factors(self, dtype: torch.dtype) -> Tensor | Factors:
        """Return the item table for a loss that multiplies in `dtype`: factors, or a learned table [N+1, D]."""
        if not self.parts:
            return self.table.to(dtype)
        device = self.projection.weight.device
        if self._whole is None or self._whole.dtype != dtype or self._whole.device != device:
            tokens = torch.arange(self.num_items + 1, device=device)
            self._whole = torch.cat([self.rows(some, dtype) for some in tokens.split(ROWS)])  # once: they are frozen
        return Factors(self._whole, self.projection.weight, self.gate(self.V) if self.gate else self.V)


def _whiten_again(items: ItemEncoder, *_: object) -> None:
    """Recompute the features with the whitening that was just loaded."""
    assert items.whitening is not None  # the hook is registered only with one
    for name, part in zip(items.parts, items.whitening.features(), strict=True):
        items.get_buffer(name).copy_(part)
    items._whole = None
