"""The exponential moving average of the weights: what is validated, tested and served in place of the last step's."""

import copy

import torch

from trainer.step import Trained


class WeightAverage:
    """ā <- d ā + (1 - d) w after every step t, with d = min(decay, (1 + t) / (10 + t)): the first weights, which are
    random, are soon forgotten. An average of nested weights is nested, so slicing stays exact."""

    def __init__(self, model: Trained, decay: float) -> None:
        shared = {id(buffer): buffer for buffer in model.buffers()}  # features above all, which no step changes
        self.model, self.decay = copy.deepcopy(model, shared).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: Trained, step: int) -> None:
        """Take the weights after step t = `step`, from 1, in."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
