"""Beyond the paper, for both losses (model/loss.py, model/sampled_loss.py): how much a size counts, how sharp its
logits are, and what it learns from the largest one.

    loss = 1/|M| Σ_m w_m CE(target_m, p_m),   p_m = softmax(s_m logits_m)
    target_m = (1 - x) one-hot + x p_M,  of the largest size M: one-hot            (p_M as a target is not trained)

With w_m = s_m = 1 and x = 0 this is the paper's loss. T labelled positions (C of a chunk), K logits of each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1e30  # the logit of what is no candidate: its probability is 0, and 0 times it is a number


class Objective(NamedTuple):
    """What the losses are asked for where that is not the paper's."""

    weights: tuple[float, ...]  # w, of each size
    log_scale: Tensor | None  # [M] log s, learned; None: all 1
    distill: float  # x

    def scale(self, like: Tensor) -> Tensor:
        """s [M] in the type of `like`, without a gradient."""
        if self.log_scale is None:
            return torch.ones(len(self.weights), dtype=like.dtype, device=like.device)
        return self.log_scale.detach().to(like.dtype).exp()

    def taught(self) -> list[float]:
        """x of every size."""
        return [self.distill] * (len(self.weights) - 1) + [0.0]


def weights_of(kind: str, sizes: Sequence[int]) -> tuple[float, ...]:
    """w: "uniform", or "sqrt": proportional to 1/√m, so that small sizes count more. Their mean is 1."""
    w = [1.0 if kind == "uniform" else m**-0.5 for m in sizes]
    return tuple(value * len(w) / sum(w) for value in w)


def losses_plain(logits: Sequence[Tensor], label: Tensor, objective: Objective) -> Tensor:
    """The plain twin of what both losses compute: w_m CE(target_m, p_m) [M] of the scaled logits [T, K] of each size,
    averaged over positions; label: [T], a column."""
    one_hot = F.one_hot(label, logits[-1].shape[1]).to(logits[-1])
    p_largest = logits[-1].detach().softmax(dim=1)
    losses = [
        w * F.cross_entropy(of_size, (1 - x) * one_hot + x * p_largest)
        for w, x, of_size in zip(objective.weights, objective.taught(), logits, strict=True)
    ]
    return torch.stack(losses)


def residuals_(
    log_ps: Sequence[Tensor],
    label: Tensor,
    valid: Tensor,
    objective: Objective,
    spare: tuple[Tensor, Tensor],
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn log p_m [C, K] of every size, in place, into the gradient w_m s_m (p_m - target_m) by its logits before they
    are scaled. Returns the loss, summed over sizes and positions, and its gradient by log s [M].

    label: [C, 1], a column; valid: [C, 1], false where there is none: there logits must be 0. spare: two of
    [C, K], of any content. offset: [C, K] what was added to the scaled logits; None: nothing.
    """
    p_largest, residual = spare
    scale = objective.scale(residual)
    loss, by_log_scale = residual.new_zeros(()), torch.zeros_like(scale)
    torch.exp(log_ps[-1], out=p_largest).mul_(valid)
    for j, (w, x, log_p) in enumerate(zip(objective.weights, objective.taught(), log_ps, strict=True)):
        # Residuals of a position add up to 0, without a label too: log p may stand for the scaled logits further down.
        torch.exp(log_p, out=residual).scatter_add_(1, label, x * valid.to(log_p.dtype) - 1)
        loss -= w * (1 - x) * (log_p.gather(1, label) * valid).sum()
        if x:
            residual.sub_(p_largest, alpha=x)
            loss -= w * x * p_largest.flatten().dot(log_p.flatten())
        by_log_scale[j] = w * residual.flatten().dot(log_p.flatten())
        if offset is not None:
            by_log_scale[j] -= w * residual.flatten().dot(offset.flatten())
        torch.mul(residual, w * scale[j], out=log_p)
    return loss, by_log_scale
