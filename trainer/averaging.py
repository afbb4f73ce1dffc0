"""The exponential moving average of the weights: what is validated, tested and kept in place of the last step's."""

import copy

import torch

from model.base import SequenceModel


class WeightAverage:
    """Σ_s d^(t-s) w_s / Σ_s d^(t-s) over the weights w_s after the steps s = 1..t: the last 1/(1-d) count most.

    An average of nested weights is nested, so slicing stays exact."""

    def __init__(self, model: SequenceModel, decay: float) -> None:
        """decay: d, above 0 and below 1."""
        frozen = (*model.buffers(), model.items.whitening)  # features above all
        self.model = copy.deepcopy(model, {id(part): part for part in frozen}).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: SequenceModel, step: int) -> None:
        """Take the weights after step t = `step`, from 1, in."""
        share = (1 - self.decay) / (1 - self.decay**step)  # 1 of the first: what was there before does not count
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, share)
