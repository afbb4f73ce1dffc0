"""No learned embedding for items without a training event, beyond the paper: E_i = W f_i + b + g_i V_i.

g_i is 1 for an item that occurs in the training sequences, and 0 for the others. An item that never occurs is only ever
a negative, which pushes its V away from every history, whatever its content.

Without V a row is shorter, so all its scores are smaller. Evaluation therefore multiplies the rows of g_i = 0 by a
scale that gives them the length of others, as exports do with new products. N items, K width of V.
"""

import torch
from torch import Tensor, nn


class EmbeddingGate(nn.Module):
    """Multiplies rows of V by g. Set `trained` before training; both buffers are saved with the weights."""

    trained: Tensor  # [N+1] bool, whether g_i = 1; of token 0, whether a sequence begins with it
    scale: Tensor  # [] of the rows of g_i = 0 in evaluation

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.register_buffer("trained", torch.zeros(num_items + 1, dtype=torch.bool))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, V: Tensor, items: Tensor | None = None) -> Tensor:
        """Return g V of rows [n, K] of `items` [n], or of all rows [N+1, K]."""
        trained = self.trained if items is None else self.trained[items]
        return V * trained[:, None]

    def rescaled(self, E: Tensor, items: Tensor) -> Tensor:
        """Return the rows [n, D] of `items` [n] for evaluation."""
        return torch.where(self.trained[items][:, None], E, self.scale.to(E.dtype) * E)
