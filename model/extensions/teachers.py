"""Learn from trained models, beyond the paper (knowledge distillation from an ensemble: Hinton et al., 2015).

    target = (1 - x) one-hot + x p,    p = softmax( 1/n Σ_j s_j z_j · E )        of n teachers, each at its largest size

It is the target of every size, with x of `--distill`. T positions, K candidates, N items, D the teachers' widths
together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.base import SequenceModel
from model.extensions.history import history_logits


class Teachers:
    """Trained models whose average scores are the target. Their item tables are computed once."""

    def __init__(self, models: Sequence[SequenceModel]) -> None:
        """models: of the same items; their sizes may differ."""
        self.models = [model.eval().requires_grad_(False) for model in models]
        device = next(self.models[0].parameters()).device  # a table kept without its features is not moved with a model
        with torch.no_grad():
            self.table = torch.cat([model.item_table().to(device) for model in self.models], dim=1)  # [N+1, D]

    @torch.no_grad()
    def encode(self, tokens: Tensor, position: Tensor, longest: int) -> Tensor:
        """Return the scaled z of all teachers side by side, [T, D]: its product with a row of the table is a logit."""
        parts, start = [], 0
        for model in self.models:
            x = self.table[tokens, start : start + model.sizes[-1]]
            log_scale = getattr(model, "log_scale", None)
            scale = 1.0 if log_scale is None else log_scale[-1].exp()
            parts.append(model.encode(x, position, longest) * scale / len(self.models))
            start += model.sizes[-1]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def logits(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits of all items, [T, N+1]. dtype: of the product."""
        return (z.to(dtype) @ self.table.to(dtype).T).to(z.dtype)

    @torch.no_grad()
    def sampled_logits(
        self, z: Tensor, labels: Tensor, items: Tensor, tokens: Tensor, longest: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the logits of each position's label, the drawn items and the history items: [T, 1 + K + longest].

        labels, tokens: [T]; items: [K]; longest: the columns of history items, 0 for none.
        """
        of_label = (z * self.table[labels]).sum(dim=1, keepdim=True)
        parts = [of_label, (z.to(dtype) @ self.table[items].to(dtype).T).to(z.dtype)]
        if longest:
            parts.append(history_logits(z, self.table[tokens], longest, (z.shape[1],))[0])
        return torch.cat(parts, dim=1)
