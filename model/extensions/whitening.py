"""Whitened features, beyond the paper (WhitenRec: Zhang et al., Are ID Embeddings Necessary?, ICDE 2024).

    x -> Σ^(-1/2) (x - μ), scaled to length 1        μ, Σ: mean and covariance of the catalogue's features

An encoder's features share a few strong directions, in which all items are alike. After whitening every direction has
the same variance. Each encoder's features are whitened separately. A row of zeros (an item without a picture) stays
zero and does not count in μ and Σ. N items, F feature width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from model.mapped import LARGE, new_tensor, unmap_pages

ROWS = 2**14  # items converted to a wider dtype at once
LEAST_VARIANCE = 1e-6  # of the largest: directions below it are dropped; rounding to float16 makes some of 1e-7


def fit_whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return μ [F] and Σ^(-1/2) [F, F] of features [N, F], in float64; zero in directions without variance."""
    count, mean = 0, torch.zeros(features.shape[1], dtype=torch.float64)
    for rows in _nonzero_rows(features):
        count, mean = count + len(rows), mean + rows.sum(dim=0)
    count = max(count, 1)
    mean /= count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in _nonzero_rows(features):
        covariance.addmm_((rows - mean).T, rows - mean, alpha=1 / count)
    U, variance, _ = torch.linalg.svd(covariance)  # eigh fails on some with many directions without variance
    largest = max(variance[0], LEAST_VARIANCE * mean.dot(mean))  # if all features are equal, variance is rounding error
    varies = variance > LEAST_VARIANCE * largest
    return mean, (U[:, varies] / variance[varies].sqrt()) @ U[:, varies].T


def _nonzero_rows(features: Tensor) -> Iterator[Tensor]:
    """Yield the nonzero rows in float64, in chunks."""
    for rows in features.split(ROWS):
        rows = rows.double()
        unmap_pages(features)
        yield rows[rows.any(dim=1)]


def whiten(rows: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Return whitened rows [n, F] of length 1; rows of zeros, and rows equal to the mean, become zero."""
    y = (rows - mean) @ matrix * rows.any(dim=1, keepdim=True)
    return y / y.norm(dim=1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)


class Whitening(nn.Module):
    """The transforms of several features [N, F_1], [N, F_2], ...

    They are buffers: saved with a model's weights, and replaced by what is loaded.
    """

    def __init__(self, parts: Sequence[Tensor], fit: bool = True) -> None:
        """parts: the features before whitening. fit: False leaves zeros, if weights are loaded next."""
        super().__init__()
        self._parts = list(parts)  # not buffers, which would move to a GPU
        for i, part in enumerate(parts):
            width = part.shape[1]
            mean, matrix = fit_whitening(part) if fit else (torch.zeros(width), torch.zeros(width, width))
            self.register_buffer(f"mean_{i}", mean.float())
            self.register_buffer(f"matrix_{i}", matrix.float())

    def transforms(self) -> list[tuple[Tensor, Tensor]]:
        """Return (μ, Σ^(-1/2)) of each part."""
        return [(self.get_buffer(f"mean_{i}"), self.get_buffer(f"matrix_{i}")) for i in range(len(self._parts))]

    def features(self) -> list[Tensor]:
        """Return each part whitened, in its own dtype: in memory, or mapped from a temporary file if it is large."""
        return [_whitened(part, *transform) for part, transform in zip(self._parts, self.transforms(), strict=True)]


def _whitened(part: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    whole = new_tensor(part.shape, part.dtype) if part.nbytes >= LARGE else torch.empty_like(part)
    for rows, target in zip(part.split(ROWS), whole.split(ROWS), strict=True):
        target.copy_(whiten(rows.to(mean), mean, matrix))
        unmap_pages(part)
        unmap_pages(whole)
    return whole
