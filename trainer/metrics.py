"""Recall, NDCG and MRR of full rankings, as exact means over users. B users, N items."""

from collections.abc import Callable

import torch
from torch import Tensor


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the rank, from 1, of each user's target among all scores: [B, N+1], [B] -> [B] float.

    The plain twin of `rank_targets` (trainer/evaluation.py), for scores that are all there at once. Items with the
    target's score share their average rank, so a rank may end in .5. A score of NaN counts as ahead of the target, and
    a target whose score is NaN ranks last.
    """
    target = scores.gather(1, targets[:, None])
    ahead = (~(scores <= target)).sum(dim=1)
    tied = (scores == target).sum(dim=1) - 1
    return 1 + ahead + tied.clamp_min(0) / 2


def recall(ranks: Tensor, k: int) -> Tensor:
    """[rank <= K]: 1 for a hit, otherwise 0."""
    return (ranks <= k).double()


def ndcg(ranks: Tensor, k: int) -> Tensor:
    """[rank <= K] / log2(rank + 1): NDCG@K of one relevant item."""
    return recall(ranks, k) / torch.log2(ranks + 1)


def mrr(ranks: Tensor, k: int) -> Tensor:
    """[rank <= K] / rank: the reciprocal rank, 0 beyond K."""
    return recall(ranks, k) / ranks


# name -> function of the ranks [U] float64 and the cut-off K that returns the metric of each user [U]
METRICS: dict[str, Callable[[Tensor, int], Tensor]] = {"Recall": recall, "NDCG": ndcg, "MRR": mrr}


def ranking_metrics(ranks: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """Return {"Recall@5": ..., "NDCG@5": ..., "MRR@5": ..., ...} of METRICS: means over users.

    ranks: [U], from 1, of the one relevant item of each user.
    """
    ranks = ranks.double()
    return {f"{name}@{k}": metric(ranks, k).mean().item() for k in ks for name, metric in METRICS.items()}


def cut_offs(ks: tuple[int, ...], metric: str) -> tuple[int, ...]:
    """Return the cut-offs with the cut-off of a metric such as NDCG@10 added, increasing."""
    return tuple(sorted({*ks, int(metric.partition("@")[2])}))


def criterion(metric: str, mask_history: bool) -> str:
    """Return the name of the criterion that picks the best epoch."""
    return f"{metric} (history masked)" if mask_history else metric
