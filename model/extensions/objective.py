"""What both losses (model/loss.py, extensions/sampled_loss.py) ask of the sizes' logits; beyond the paper, how sharp
those are, and what a size learns from the largest one.

    loss = 1/|M| Σ_m CE(target_m, p_m),   p_m = softmax(s_m logits_m)
    target_m = (1 - x) one-hot + x p_M,  of the largest size M: one-hot            (p_M as a target is not trained)

With s_m = 1 and x = 0 this is the paper's loss. T labelled positions (C of a chunk), K logits of each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1e30  # the logit of what is no candidate: its probability is 0, and 0 times it is a number


class Objective(NamedTuple):
    """What the losses are asked for; by default the cross-entropies of the paper."""

    log_scale: Tensor | None = None  # [M] log s, learned; None: all 1
    distill: float = 0.0  # x

    def scale(self, like: Tensor) -> Tensor | None:
        """s [M] in the type of `like`, without a gradient; None: all 1."""
        return None if self.log_scale is None else self.log_scale.detach().to(like.dtype).exp()


CROSS_ENTROPY = Objective()


def losses_plain(
    logits: Sequence[Tensor], label: Tensor, valid: Tensor, objective: Objective, offset: Tensor | float = 0.0
) -> Tensor:
    """The plain twin of what both losses compute: CE(target_m, p_m) [M] of the logits [T, K] of each size, averaged
    over positions. label: [T], a column; valid: [T], false where there is none; offset: added to the scaled logits."""
    scale = torch.ones(len(logits)) if objective.log_scale is None else objective.log_scale.exp()
    scaled = [(s * of_size + offset)[valid] for s, of_size in zip(scale, logits, strict=True)]
    losses = [F.cross_entropy(of_size, label[valid]) for of_size in scaled]
    x, p_largest = objective.distill, scaled[-1].detach().softmax(dim=1)
    for j, of_size in enumerate(scaled[:-1]) if x else ():
        losses[j] = (1 - x) * losses[j] + x * F.cross_entropy(of_size, p_largest)
    return torch.stack(losses)


def residuals_(
    log_ps: Sequence[Tensor],
    label: Tensor,
    valid: Tensor,
    distill: float,
    scale: Tensor | None,
    spare: tuple[Tensor, Tensor],
    loss: Tensor,
    grad_log_scale: Tensor,
    offset: Tensor | None = None,
) -> None:
    """Turn log p_m [C, K] of every size, in place, into the gradient s_m (p_m - target_m) by its logits before they are
    scaled. Adds the loss, summed over sizes and positions, to `loss`, and its gradient by log s to grad_log_scale [M].

    label: [C, 1], a column; valid: [C, 1], false where there is none: there logits must be 0. distill: x; scale: s [M],
    None for 1. spare: two of [C, K], of any content. offset: [C, K] what was added to the scaled logits; None: nothing.
    """
    p_largest, residual = spare
    if distill:
        torch.exp(log_ps[-1], out=p_largest).mul_(valid)
    for j, log_p in enumerate(log_ps):
        x = distill if j < len(log_ps) - 1 else 0.0
        loss -= (1 - x) * (log_p.gather(1, label) * valid).sum()
        if x:
            loss -= x * p_largest.flatten().dot(log_p.flatten())
        # Residuals of a position add up to 0, without a label too: log p may stand for the scaled logits further down.
        of_size = torch.exp(log_p, out=log_p if scale is None else residual)
        of_size.scatter_add_(1, label, x * valid.to(log_p.dtype) - 1)
        if x:
            of_size.sub_(p_largest, alpha=x)
        if scale is not None:
            grad_log_scale[j] += of_size.flatten().dot(log_p.flatten())
            if offset is not None:
                grad_log_scale[j] -= of_size.flatten().dot(offset.flatten())
            torch.mul(of_size, scale[j], out=log_p)
