"""Whitened features, beyond the paper (WhitenRec: Zhang et al., Are ID Embeddings Necessary?, ICDE 2024).

    x -> Σ^(-1/2) (x - μ), of length 1        μ, Σ: mean and covariance of the catalogue's features

Features of an encoder share a few strong directions, in which all items are alike. Whitened, every direction has the
same variance. Each encoder's features are whitened on their own. A row of zeros is what an item without a picture has:
it stays zero and is left out of μ and Σ. N items, F feature width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

ROWS = 2**14  # items that are widened at once
LEAST_VARIANCE = 1e-6  # of the largest: a direction below it is left out; rounding to float16 makes some 1e-7


def fit_whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """μ [F] and Σ^(-1/2) [F, F] of features [N, F], float64; zero in directions that do not vary."""
    count, mean = 0, torch.zeros(features.shape[1], dtype=torch.float64)
    for rows in _described(features):
        count, mean = count + len(rows), mean + rows.sum(dim=0)
    count = max(count, 1)
    mean /= count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in _described(features):
        covariance.addmm_((rows - mean).T, rows - mean, alpha=1 / count)
    U, variance, _ = torch.linalg.svd(covariance)  # eigh gives up on some with many directions that do not vary
    largest = max(variance[0], LEAST_VARIANCE * mean.dot(mean))  # of features that are all the same: rounding
    varies = variance > LEAST_VARIANCE * largest
    return mean, (U[:, varies] / variance[varies].sqrt()) @ U[:, varies].T


def _described(features: Tensor) -> Iterator[Tensor]:
    """The rows that are not zero, in float64, a chunk at a time."""
    for rows in features.split(ROWS):
        rows = rows.double()
        yield rows[rows.any(dim=1)]


def whiten(rows: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Whitened rows [n, F], of length 1; those of zeros, and those that lie at the mean, are zero."""
    y = (rows - mean) @ matrix * rows.any(dim=1, keepdim=True)
    return y / y.norm(dim=1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)


class Whitening(nn.Module):
    """The transforms of several features [N, F_1], [N, F_2], ..., fitted on them; buffers, so that they are saved with
    a model's weights and what is loaded takes the place of what was fitted."""

    def __init__(self, parts: Sequence[Tensor], fit: bool = True) -> None:
        """fit: False leaves zeros, where weights are loaded next."""
        super().__init__()
        self._parts = list(parts)  # as they come: no buffers, which would be moved to a GPU
        for i, part in enumerate(parts):
            width = part.shape[1]
            mean, matrix = fit_whitening(part) if fit else (torch.zeros(width), torch.zeros(width, width))
            self.register_buffer(f"mean_{i}", mean.float())
            self.register_buffer(f"matrix_{i}", matrix.float())

    def transforms(self) -> list[tuple[Tensor, Tensor]]:
        """(μ, Σ^(-1/2)) of each."""
        return [(self.get_buffer(f"mean_{i}"), self.get_buffer(f"matrix_{i}")) for i in range(len(self._parts))]

    def features(self) -> list[Tensor]:
        """What it makes of each, in the type that it comes in, in memory."""
        return [
            torch.cat([whiten(rows.to(mean), mean, matrix).to(part.dtype) for rows in part.split(ROWS)])
            for part, (mean, matrix) in zip(self._parts, self.transforms(), strict=True)
        ]
