"""Nested sizes M = (M[0], M[1], ..., D) and the mask P of the fMRLRec operator (section 3.2 of the paper)."""

import itertools

import torch
from torch import Tensor


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
