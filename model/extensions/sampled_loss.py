"""The Matryoshka cross-entropy over a sample of the catalogue, for catalogues too large to score in every step.

K items are drawn with replacement from a distribution q, the same for all positions of a step (shared negatives). They
stand for all items but the label. A drawn item i is weighted by 1 / (K q_i) (the log-q correction: Bengio & Senécal,
2008; Yi et al., 2019), so that the sum under the softmax has the expectation of the whole catalogue's:

    loss = Σ_m [ log( exp(s_label) + Σ_k exp(s_k - log(K q_k)) ) - s_label ],    s_i = z[:m] · E[i, :m]

At each position, draws of its own label are left out. With a learned history bias, the items of a position's history
are candidates of their own, without a correction, and draws of them are left out too. T positions, K draws, N items,
L the longest history, D largest size.

A sampled loss has the signature of a loss (model/loss.py), with a Sample in place of the item table. SAMPLED_LOSSES
names the choices of `--loss`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.extensions.objective import (
    CROSS_ENTROPY,
    Objective,
    contains,
    history_logits,
    history_logits_plain,
    losses_plain,
)
from model.fast import ABSENT, sampled_cross_entropy_sum
from model.loss import average, check


class NegativeSampler:
    """Draws items from q, an even mixture of the labels' distribution and the uniform one.

    No draw is weighted by more than 2 N / K, therefore.
    """

    def __init__(self, label_counts: Tensor, num_negatives: int) -> None:
        """label_counts: [N+1], how often each token is a label; token 0 is never drawn."""
        counts = label_counts[1:].double()
        self.num_negatives = num_negatives
        self.q = (counts / counts.sum() + 1 / len(counts)) / 2  # [N]
        self._cumulative = self.q.cumsum(dim=0)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw K items [K]; return them and their log(K q) [K] in float32."""
        u = torch.rand(self.num_negatives, dtype=torch.float64, device=self.q.device) * self._cumulative[-1]
        index = torch.searchsorted(self._cumulative, u, right=True).clamp_max(len(self.q) - 1)
        return index + 1, torch.log(self.num_negatives * self.q[index]).float()


class Sample(NamedTuple):
    """The rows of the item table that a sampled loss reads."""

    own: Tensor  # [T, D] embeddings of the labels
    drawn: Tensor  # [K, D] embeddings of the drawn items; their dtype is the dtype of the products
    items: Tensor  # [K] the drawn items
    log_kq: Tensor  # [K] log(K q) of each
    read: Tensor | None = None  # [T, D] embeddings of the positions' own tokens, with a history bias


def sampled_matryoshka_cross_entropy_plain(
    z: Tensor,
    sample: Sample,
    labels: Tensor,
    sizes: tuple[int, ...],
    *,
    reduction: str = "sum",
    count: Tensor | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """Compute the loss as the equation says. The plain twin: edit it to try an idea."""
    check(z, sizes, reduction)
    own, drawn, items, log_kq, read = sample
    wide = torch.promote_types(drawn.dtype, torch.float32)
    of_label, z_narrow = z.to(wide) * own.to(wide), z.to(drawn.dtype)
    logits = [
        torch.cat([of_label[:, :m].sum(dim=1, keepdim=True), (z_narrow[:, :m] @ drawn[:, :m].T).to(wide)], dim=1)
        for m in sizes
    ]  # each [T, 1 + K]; column 0 is the label
    offset, seen = F.pad(torch.where(labels[:, None] == items, ABSENT, -log_kq), (1, 0)), None
    if objective.history_bias is not None and objective.history is not None and read is not None:
        history = objective.history  # [T, L]
        read_before = contains(history, int(max(labels.max(), items.max(), history.max())) + 1)
        label_seen, no_candidate = read_before.gather(1, labels[:, None]), (history == 0) | (history == labels[:, None])
        of_history = history_logits_plain(z.to(wide), read.to(wide), history.shape[1], sizes).cumsum(dim=0)
        logits = [torch.cat(parts, dim=1) for parts in zip(logits, of_history, strict=True)]  # [T, 1 + K + L]
        of_drawn = offset[:, 1:].masked_fill(read_before[:, items], ABSENT)
        offset = torch.cat([offset[:, :1], of_drawn, ABSENT * no_candidate], dim=1)
        seen = torch.cat([label_seen, torch.zeros_like(of_drawn, dtype=torch.bool), ~no_candidate], dim=1)
    if (prior := objective.prior) is not None:
        candidates = [labels[:, None], items.expand(len(labels), -1)]
        candidates += [] if seen is None or objective.history is None else [objective.history]
        offset = offset + prior[torch.cat(candidates, dim=1)]
    losses = losses_plain(logits, torch.zeros_like(labels), labels > 0, objective, offset, seen)
    return average(losses.sum(), labels, sizes, reduction, count)


def sampled_matryoshka_cross_entropy(
    z: Tensor,
    sample: Sample,
    labels: Tensor,
    sizes: tuple[int, ...],
    *,
    reduction: str = "sum",
    count: Tensor | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """Compute the loss chunk by chunk, gradients included. The fast twin; dtypes and errors as `model.loss`."""
    check(z, sizes, reduction)
    own, drawn, items, log_kq, read = sample
    of_history = None
    if objective.history is not None and read is not None:
        wide = torch.promote_types(drawn.dtype, torch.float32)
        of_history = history_logits(z.to(wide), read.to(wide), objective.history.shape[1], sizes)
    total = sampled_cross_entropy_sum(z, own, drawn, of_history, items, log_kq, labels, sizes, objective)
    return average(total, labels, sizes, reduction, count)


SAMPLED_LOSSES: dict[str, Callable[..., Tensor]] = {
    "fast": sampled_matryoshka_cross_entropy,
    "plain": sampled_matryoshka_cross_entropy_plain,
}
