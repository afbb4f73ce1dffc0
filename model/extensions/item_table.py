"""Options of the item table beyond the paper: whitened features, the gate of item embeddings. Large tensors in files.

Whitening (WhitenRec: Zhang et al., Are ID Embeddings Necessary?, ICDE 2024):

    x -> Σ^(-1/2) (x - μ), scaled to length 1        μ, Σ: mean and covariance of the catalogue's features

An encoder's features share a few strong directions, in which all items are alike. After whitening every direction has
the same variance. Each encoder's features are whitened separately. A row of zeros (an item without a picture) stays
zero and does not count in μ and Σ.

N items, F feature width, K width of the learned item embeddings V.
"""

import ctypes
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

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


# ----------------------------------------------------------------------------------------------------------------- gate
# No learned embedding for items without a training event, beyond the paper: E_i = W f_i + b + g_i V_i.
#
# g_i is 1 for an item that occurs in the training sequences, and 0 for the others. An item that never occurs is only
# ever a negative, which pushes its V away from every history, whatever its content.
#
# Without V a row is shorter, so all its scores are smaller. Evaluation therefore multiplies the rows of g_i = 0 by a
# scale that gives them the length of others, as exports do with new products.


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


# -------------------------------------------------------------------------------------------------------- large tensors
# Tensors mapped from files: the system can write their pages out, and they need not stay resident. Features, whitened
# features and the V that trainer/sparse_rows.py collects may be that large.

LARGE = 2**28  # bytes from which on a tensor is worth a file, or unmapping its pages
MADV_DONTNEED = 4  # of Linux


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor, mapped from an unnamed file in the temporary folder.

    Its disk space is reserved first. Without enough of it the tensor is in memory.
    """
    size = math.prod(shape)
    with suppress(OSError, AttributeError), tempfile.NamedTemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(*shape)
    return torch.empty(*shape, dtype=dtype)


def unmap_pages(tensor: Tensor) -> None:
    """Take the pages of a large tensor that is mapped from a file out of resident memory; a read maps them again.

    A tensor in memory is left alone. Values written to a copy-on-write map would be lost.
    """
    if tensor.nbytes < LARGE or tensor.device.type != "cpu":
        return
    with suppress(OSError), Path("/proc/self/maps").open(encoding="utf-8") as lines:
        for line in lines:
            span, _, _, _, inode = line.split(maxsplit=5)[:5]
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= tensor.data_ptr() < high and inode != "0":
                ctypes.CDLL(None).madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), MADV_DONTNEED)
