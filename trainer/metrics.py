"""Recall, NDCG and MRR of full rankings, as exact means over users. B users, N items."""

import torch
from torch import Tensor


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """The rank, from 1, of each user's target among all scores: a count, not a sort. [B, N+1], [B] -> [B] float.

    Items with the target's score share their average rank (so a rank may end in .5). A score that is not a number
    counts as ahead of the target, and such a target ranks last.
    """
    target = scores.gather(1, targets[:, None])
    ahead = (~(scores <= target)).sum(dim=1)
    tied = (scores == target).sum(dim=1) - 1
    return 1 + ahead + tied.clamp_min(0) / 2


def ranking_metrics(ranks: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """{"Recall@5": ..., "NDCG@5": ..., "MRR@5": ..., ...} of one relevant item a user: means over all users.

    Recall@K = [rank <= K], NDCG@K = [rank <= K] / log2(rank + 1), MRR@K = [rank <= K] / rank.
    """
    ranks = ranks.double()
    metrics = {}
    for k in ks:
        hit = (ranks <= k).double()
        metrics[f"Recall@{k}"] = hit.mean().item()
        metrics[f"NDCG@{k}"] = (hit / torch.log2(ranks + 1)).mean().item()
        metrics[f"MRR@{k}"] = (hit / ranks).mean().item()
    return metrics
