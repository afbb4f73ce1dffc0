"""The item encoder (section 3 of the paper): what frozen encoders say of an item becomes its row of the item table.

    E_i = W f_i + b,  beyond the paper + V_i        f_i: the features of item i, side by side, [F]; row 0 of E: b

N items, F feature width, D largest size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.extensions.whitening import ROWS, Whitening
from model.loss import Factors


class ItemEncoder(nn.Module):
    """The item table E [N+1, D]: a linear projection of frozen features, or learned outright where there are none.

    The projection is not masked: its first m output columns are the sub-model's. Token 0, which begins a sequence, has
    zero features, so its embedding is the projection's bias. Features are kept as they come, in any type of float and
    possibly mapped from a file, side by side [N, F_1], [N, F_2], ...; only the rows that are needed are read.

    Beyond the paper, the features may be whitened ones, and a learned embedding V [N+1, K] may be added to the first K
    columns of the projection, from zero on.
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        features: Tensor | Sequence[Tensor] | None,
        embedding: int = 0,
        whitening: Whitening | None = None,
    ) -> None:
        """features: [N, F] or several, row i - 1 for item i; None: a learned table, to which no V is added. embedding:
        K, 0 for no V. whitening: what made these features of others; it is saved with the weights."""
        super().__init__()
        self.num_items = num_items
        if embedding and features is None:
            raise ValueError("a learned item table has nothing that an embedding could be added to")
        self.V = nn.Parameter(torch.zeros(num_items + 1, embedding)) if embedding else None
        self.parts: list[str] = []
        self._whole: Tensor | None = None
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
        """[N, F_1], [N, F_2], ... of items 1..N; none where the table is learned."""
        return [self.get_buffer(name) for name in self.parts]

    def rows(self, items: Tensor, dtype: torch.dtype) -> Tensor:
        """The features [n, F] of these items [n]; zeros for token 0."""
        row = (items - 1).clamp_min(0)
        rows = torch.cat([part[row].to(dtype) for part in self.features], dim=1)
        return rows * (items > 0)[:, None]

    def forward(self, items: Tensor, sparse_gradient: bool = False) -> Tensor:
        """E of these items [n] (0: begin of sequence): [n, D]. sparse_gradient: of V, on a CPU, where another one, of
        all items, takes it in."""
        if not self.parts:
            return F.embedding(items, self.table)
        projected = self.projection(self.rows(items, self.projection.weight.dtype))
        if self.V is None:
            return projected
        sparse = sparse_gradient and self.V.device.type == "cpu"  # or zeros are made for all others
        V = F.embedding(items, self.V, sparse=sparse)
        return projected + F.pad(V, (0, projected.shape[1] - V.shape[1]))

    def everything(self) -> Tensor:
        """E of all tokens, [N+1, D]; their features are never held at once in the projection's type."""
        if not self.parts:
            return self.table
        tokens = torch.arange(self.num_items + 1, device=self.projection.weight.device)
        return torch.cat([self(some) for some in tokens.split(ROWS)])

    @torch.no_grad()
    def new_item_scale(self) -> float:
        """What the row of an item that has no V is multiplied by, to be as long as the rows of trained items are on
        average: shorter rows have smaller scores, whatever the history asks for. 1 where no item has a V."""
        if self.V is None:
            return 1.0
        table = self.everything()[1:]
        content = table.clone()
        content[:, : self.V.shape[1]] -= self.V[1:]
        return (table.norm(dim=1).mean() / content.norm(dim=1).mean().clamp_min(1e-12)).item()

    def factors(self, dtype: torch.dtype) -> Tensor | Factors:
        """The item table for a loss whose products are computed in `dtype`, as a product where it is one."""
        if not self.parts:
            return self.table.to(dtype)
        device = self.projection.weight.device
        if self._whole is None or self._whole.dtype != dtype or self._whole.device != device:
            tokens = torch.arange(self.num_items + 1, device=device)
            self._whole = torch.cat([self.rows(some, dtype) for some in tokens.split(ROWS)])  # once: they are frozen
        return Factors(self._whole, self.projection.weight, self.V)


def _whiten_again(items: ItemEncoder, *_: object) -> None:
    """Features as the whitening makes them that was just loaded."""
    assert items.whitening is not None  # or this were not registered
    for name, part in zip(items.parts, items.whitening.features(), strict=True):
        items.get_buffer(name).copy_(part)
    items._whole = None
