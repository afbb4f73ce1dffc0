"""A gate for the learned item embedding, beyond the paper: E_i = W f_i + b + g(n_i) V_i.

n_i is how often item i occurs in the training sequences. An item that never occurs is only ever a negative, which
pushes its V away from every history, whatever its content. N items, K width of V.

    trained    g(n) = 0 for n = 0, else 1
    learned    g(n) = 0 for n = 0, else 1 + SPEED β_k        k: the bucket of n, one of 1, 2, 3-4, 5-8, 9-16, ...

Without V a row is shorter, so all its scores are smaller. Evaluation therefore multiplies the rows of n = 0 by a scale
that gives them the length of others, as exports do with new products.
"""

import torch
from torch import Tensor, nn

BUCKETS = 13  # the last one has all counts above 2,048
SPEED = 10.0  # Adam moves a parameter by about the learning rate a step: with 1e-3 a gate can double in 100 steps


class EmbeddingGate(nn.Module):
    """Multiplies rows of V by g(n). The counts n are saved with the weights; set them before training."""

    counts: Tensor  # [N+1] int32; n of token 0 (begin of sequence) is the number of sequences that it begins
    scale: Tensor  # [] of the rows of n = 0 in evaluation; saved with the weights
    edges: Tensor  # the largest count of each bucket but the last

    def __init__(self, num_items: int, learned: bool) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_items + 1, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("edges", 2 ** torch.arange(BUCKETS - 1, dtype=torch.int32), persistent=False)
        self.register_load_state_dict_pre_hook(_without_scale)
        self.bias = nn.Parameter(torch.zeros(BUCKETS)) if learned else None  # β; biases have no weight decay

    def forward(self, V: Tensor, items: Tensor | None = None) -> Tensor:
        """Return g(n) V of rows [n, K] of `items` [n], or of all rows [N+1, K]."""
        counts = self.counts if items is None else self.counts[items]
        g = (counts > 0).to(V.dtype)
        if self.bias is not None:
            g = g * (1 + SPEED * self.bias[torch.bucketize(counts, self.edges)])
        return V * g[:, None]

    def rescaled(self, E: Tensor, items: Tensor) -> Tensor:
        """Return the rows [n, D] of `items` [n] for evaluation."""
        return torch.where(self.counts[items][:, None] > 0, E, self.scale.to(E.dtype) * E)


def _without_scale(gate: EmbeddingGate, weights: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Accept weights without a scale, which evaluate those rows as they are."""
    weights.setdefault(f"{prefix}scale", torch.ones(()))
