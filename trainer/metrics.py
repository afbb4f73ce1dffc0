"""Recall, NDCG and MRR of full rankings, as exact means over users. B users, N items."""

import torch
from torch import Tensor


def count_ahead(scores: Tensor, target: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the scores [B, C] are ahead of the target's [B, 1], and how many equal it: each [B] float.

    A score that is not a number counts as ahead. buffer: [B, C] float32, of any content; C below 2^24, so that a float
    counts exactly (comparing into a float and adding up takes a quarter of the time of doing it with booleans).
    """
    not_ahead = torch.le(scores, target, out=buffer).sum(dim=1)
    behind = torch.lt(scores, target, out=buffer).sum(dim=1)
    return scores.shape[1] - not_ahead, not_ahead - behind


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """The rank, from 1, of each user's target among all scores: [B, N+1], [B] -> [B] float. For those
    who have all scores at once, and the plain twin of `count_ahead`.

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


def cut_offs(ks: tuple[int, ...], metric: str) -> tuple[int, ...]:
    """These cut-offs, and that of a metric such as NDCG@10."""
    return tuple(sorted({*ks, int(metric.partition("@")[2])}))


def criterion(metric: str, mask_history: bool) -> str:
    """What picks the best epoch, in words."""
    return f"{metric} (history masked)" if mask_history else metric
