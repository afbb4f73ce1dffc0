"""The cross-entropy of every size, and options beyond the paper: learned scale, history bias, distillation.

    loss = 1/|M| Σ_m CE(target_m, p_m),    p_m = softmax(s_m logits_m)
    target_m = (1 - x) one-hot + x p_D;    the largest size's target is one-hot              (no gradient through p_D)

With teachers (model/extensions/teachers.py) their p replaces p_D, for the largest size too.

With s_m = 1 and x = 0 this is the paper's loss. The history bias b_m is trained by CE(one-hot, softmax(s_m logits_m +
b_m [item in history])) with the logits held fixed. That adds a gradient by b alone: it changes neither the loss's value
nor any other weight. T positions, K logits of each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(NamedTuple):
    """The options of a loss; the default is the paper's cross-entropy."""

    log_scale: Tensor | None = None  # [M] log s, learned; None: s = 1
    distill: float = 0.0  # x
    history_bias: Tensor | None = None  # [M] b, learned; None: b = 0
    history: Tensor | None = None  # [T, L] the items read at each position (model/extensions/history.py), with a bias
    teacher: Tensor | None = None  # [T, K] the teachers' logits, scaled; None: the largest size is the teacher

    def scale(self, like: Tensor) -> Tensor | None:
        """Return s [M] in the dtype of `like`, detached; None if s = 1."""
        return None if self.log_scale is None else self.log_scale.detach().to(like.dtype).exp()


CROSS_ENTROPY = Objective()


def losses_plain(
    logits: Sequence[Tensor],
    label: Tensor,
    valid: Tensor,
    objective: Objective,
    offset: Tensor | float = 0.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Return Σ_t CE(target_m, p_m) of every size, [M], from each size's logits [T, K].

    label: [T], the column of the label; valid: [T], false at a position without one; offset: added to the scaled
    logits; seen: [T, K], the columns of history items, for a history bias.
    """
    scale = torch.ones(len(logits)) if objective.log_scale is None else objective.log_scale.exp()
    scaled = [(s * of_size + offset)[valid] for s, of_size in zip(scale, logits, strict=True)]
    losses = [F.cross_entropy(of_size, label[valid], reduction="sum") for of_size in scaled]
    x, teacher = objective.distill, objective.teacher
    p = (scaled[-1].detach() if teacher is None else (teacher + offset)[valid]).softmax(dim=1)
    if x:
        for j, of_size in enumerate(scaled[:-1] if teacher is None else scaled):
            losses[j] = (1 - x) * losses[j] + x * F.cross_entropy(of_size, p, reduction="sum")
    if objective.history_bias is not None and seen is not None:
        for j, (b, of_size) in enumerate(zip(objective.history_bias, scaled, strict=True)):
            by_bias = F.cross_entropy(of_size.detach() + b * seen[valid], label[valid], reduction="sum")
            losses[j] = losses[j] + by_bias - by_bias.detach()
    return torch.stack(losses)
