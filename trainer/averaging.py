"""Exponential moving average of the weights, for evaluation and saving."""

import copy

import torch

from model.base import SequenceModel
from trainer.sparse_rows import SparseRows


class WeightAverage:
    """Weight average Σ_s d^(t-s) w_s / Σ_s d^(t-s) over steps s = 1..t.

    w_s are the weights after step s. The average covers about the last 1/(1-d) steps. An average of
    nested weights is nested, so slicing stays exact.
    """

    def __init__(self, model: SequenceModel, decay: float, rows: SparseRows | None = None) -> None:
        """decay: d, between 0 and 1 (exclusive). rows: averages the learned item embedding itself; None: this does."""
        copies = {id(constant): constant for constant in (*model.buffers(), model.items.whitening)}  # shared
        if rows:
            copies[id(rows.weight)] = rows.start_average(decay)
        self.model = copy.deepcopy(model, copies).requires_grad_(False)
        self.decay, self.rows = decay, rows

    @torch.no_grad()
    def update(self, model: SequenceModel, step: int) -> None:
        """Update the average with the weights after step `step` (1-based)."""
        share = (1 - self.decay) / (1 - self.decay**step)  # 1 at step 1, which discards the initial weights
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            if not self.rows or weight is not self.rows.weight:
                average.lerp_(weight, share)
