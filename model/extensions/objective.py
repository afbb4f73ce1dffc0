"""The cross-entropy of every size, and options beyond the paper: scale, history bias, teachers, logit adjustment.

    loss = 1/|M| Σ_m CE(target_m, p_m),    p_m = softmax(s_m logits_m + prior)
    target_m = (1 - x) one-hot + x p_D;    the largest size's target is one-hot              (no gradient through p_D)

With teachers their p replaces p_D, for the largest size too.

With s_m = 1, x = 0 and a prior of 0 this is the paper's loss. The history bias b_m is trained by CE(one-hot,
softmax(s_m logits_m + prior + b_m [item in history])) with the logits held fixed. That adds a gradient by b alone: it
changes neither the loss's value nor any other weight.

T positions, K logits of each, L the longest history of a batch, N items, M sizes, D the largest, W the largest sizes of
all teachers together.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import SequenceModel, increments


class Objective(NamedTuple):
    """The options of a loss; the default is the paper's cross-entropy."""

    log_scale: Tensor | None = None  # [M] log s, learned; None: s = 1
    distill: float = 0.0  # x
    history_bias: Tensor | None = None  # [M] b, learned; None: b = 0
    history: Tensor | None = None  # [T, L] the items read at each position, with a bias
    teacher: Tensor | None = None  # [T, K] the teachers' logits, scaled; None: the largest size is the teacher
    prior: Tensor | None = None  # [N+1] of each token, added to scaled logits in training alone; None: 0

    def scale(self, like: Tensor) -> Tensor | None:
        """Return s [M] in the dtype of `like`, detached; None if s = 1."""
        return None if self.log_scale is None else self.log_scale.detach().to(like.dtype).exp()


CROSS_ENTROPY = Objective()


def adjusted_prior(counts: Tensor, adjustment: float) -> Tensor:
    """Return log(n / (n + A)) of each token, [N+1] float32, from counts [N+1]: how often it is a label. A: adjustment.

    Logit adjustment (Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021) for a smoothed prior: an item
    that is a label n times, at least 1, is expected n + A times among new events. A ranking leaves the prior out, so
    rare items rise.
    """
    n = counts.clamp_min(1).float()
    return torch.log(n / (n + adjustment))


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


# --------------------------------------------------------------------------------------------------------- history bias
# A learned bias for the items of a user's own history, beyond the paper: do people buy again?
#
#     score of item i at size m:  s_m (z[:m] · E[i, :m]) + b_m [i in history]
#
# b_m falls far below 0 if nobody buys an item twice. A ranking leaves the scale s_m out, so it adds b_m / s_m. In
# training a position's history is all items of its row up to its own token; in evaluation it is the complete history,
# also beyond lru_max_len.

TIMES = 100  # b = TIMES p: AdamW moves a parameter p by about the learning rate per step, and b must reach -10
BLOCK = 64  # positions whose histories are scored in one product


def learned_bias(parameter: Tensor) -> Tensor:
    """Return b = TIMES p [M], with the gradient by b as the gradient by p.

    AdamW does not depend on the gradient's scale, but clipping does: TIMES the gradient would dominate the norm.
    """
    return parameter + ((TIMES - 1) * parameter).detach()


def ranking_bias(parameter: Tensor, log_scale: Tensor | None) -> list[float]:
    """Return b_m / s_m of every size, computed one by one so that a slice has the same numbers."""
    scales = torch.zeros_like(parameter) if log_scale is None else log_scale
    return [TIMES * p / math.exp(s) for p, s in zip(parameter.tolist(), scales.tolist(), strict=True)]


def history_items(tokens: Tensor, position: Tensor, longest: int) -> Tensor:
    """Return the distinct items that each position has read, [T, L]; 0 where there is none.

    Column L - 1 is the position's own token, L - 2 the token before, and so on. An item that occurs twice is at its
    first place. tokens, position: [T], as of `SequenceModel.encode`; longest: L or more.
    """
    steps_back = torch.arange(longest - 1, -1, -1, device=tokens.device)
    items = _windows(tokens, longest) * (steps_back <= position[:, None])
    first = (items[:, :-1] != tokens[:, None]).all(dim=1)
    return items * _windows(first, longest)


def _windows(x: Tensor, length: int) -> Tensor:
    """Return row t's own and the length - 1 values before it: [T] -> [T, length]."""
    return F.pad(x, (length - 1, 0)).unfold(0, length, 1)


def contains(history: Tensor, num_tokens: int) -> Tensor:
    """Return [T, num_tokens]: whether each token is in the history [T, L]."""
    seen = torch.zeros(len(history), num_tokens, dtype=torch.bool, device=history.device)
    seen.scatter_(1, history, True)
    seen[:, 0] = False
    return seen


def history_logits_plain(z: Tensor, x: Tensor, longest: int, sizes: tuple[int, ...]) -> Tensor:
    """Return z_t · x_s of the tokens s in the columns of `history_items`, for each increment of the sizes: [M, T, L].

    z, x: [T, D], what the positions predict with and the embeddings of their tokens.
    """
    windows = F.pad(x, (0, 0, longest - 1, 0)).unfold(0, longest, 1)  # [T, D, L]
    return torch.stack([(z[:, low:high, None] * windows[:, low:high]).sum(dim=1) for low, high in increments(sizes)])


def history_logits(z: Tensor, x: Tensor, longest: int, sizes: tuple[int, ...]) -> Tensor:
    """Compute `history_logits_plain` by one product per BLOCK positions and the tokens that they may have read."""
    blocks = -(-len(z) // BLOCK)
    rest, reach = blocks * BLOCK - len(z), BLOCK + longest - 1
    z = F.pad(z, (0, 0, 0, rest)).unflatten(0, (blocks, BLOCK))  # [blocks, BLOCK, D]
    x = F.pad(x, (0, 0, longest - 1, rest)).unfold(0, reach, BLOCK)  # [blocks, D, reach]
    column = torch.arange(longest, device=z.device) + torch.arange(BLOCK, device=z.device)[:, None]
    widths = [high - low for low, high in increments(sizes)]
    products = torch.stack([a @ b for a, b in zip(z.split(widths, dim=2), x.split(widths, dim=1), strict=True)])
    column = column.expand(*products.shape[:-1], longest)
    return products.gather(-1, column).flatten(1, 2)[:, : blocks * BLOCK - rest]


# ------------------------------------------------------------------------------------------------------------- teachers
# Learn from trained models, beyond the paper (knowledge distillation from an ensemble: Hinton et al., 2015).
#
#     target = (1 - x) one-hot + x p,    p = softmax( 1/n Σ_j s_j z_j · E_j )      of n teachers at their largest sizes
#
# It is the target of every size, with x of `--distill`.


class Teachers:
    """Trained models whose average scores are the target. Their item tables are computed once."""

    def __init__(self, models: Sequence[SequenceModel], adjustments: Sequence[float] = ()) -> None:
        """models: of the same items; their sizes may differ. adjustments: A of each one's training; empty: 0."""
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.adjustments = list(adjustments) or [0.0] * len(models)
        device = next(self.models[0].parameters()).device  # a table kept without its features is not moved with a model
        with torch.no_grad():
            self.table = torch.cat([model.item_table().to(device) for model in self.models], dim=1)  # [N+1, W]

    @torch.no_grad()
    def add_priors(self, counts: Tensor, prior: Tensor | None) -> None:
        """Add the mean of the teachers' priors to their logits, less the student's prior, which the loss adds later.

        The target is then what the teachers were trained to predict. counts: [N+1], how often each token is a label;
        prior: [N+1] of the student, None: 0.
        """
        own = torch.stack([adjusted_prior(counts, adjustment) for adjustment in self.adjustments]).mean(dim=0)
        bias = own if prior is None else own - prior
        if bias.any():
            self.table = torch.cat([self.table, bias.to(self.table)[:, None]], dim=1)

    @torch.no_grad()
    def encode(self, tokens: Tensor, position: Tensor, longest: int) -> Tensor:
        """Return the scaled z of all teachers side by side, [T, W]: its product with a row of the table is a logit."""
        parts, start = [], 0
        for model in self.models:
            x = self.table[tokens, start : start + model.sizes[-1]]
            log_scale = getattr(model, "log_scale", None)
            scale = 1.0 if log_scale is None else log_scale[-1].exp()
            parts.append(model.encode(x, position, longest) * scale / len(self.models))
            start += model.sizes[-1]
        parts += [torch.ones_like(parts[0][:, :1])] * (self.table.shape[1] - start)  # times the bias
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def logits(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits of all items, [T, N+1], for z [T, W]. dtype: of the product."""
        return (z.to(dtype) @ self.table.to(dtype).T).to(z.dtype)

    @torch.no_grad()
    def sampled_logits(
        self, z: Tensor, labels: Tensor, items: Tensor, tokens: Tensor, longest: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the logits of each position's label, the drawn items and the history items: [T, 1 + n + longest].

        z: [T, W]; labels, tokens: [T]; items: [n]; longest: the columns of history items, 0 for none.
        """
        of_label = (z * self.table[labels]).sum(dim=1, keepdim=True)
        parts = [of_label, (z.to(dtype) @ self.table[items].to(dtype).T).to(z.dtype)]
        if longest:
            parts.append(history_logits(z, self.table[tokens], longest, (z.shape[1],))[0])
        return torch.cat(parts, dim=1)
