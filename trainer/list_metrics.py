"""Metrics of recommended lists: what users are shown, whether or not they took it. U users, K items a list.

Coverage@K   share of the catalogue that is in at least one list (Ge et al., RecSys 2010)
ARP@K        average recommendation popularity: mean training count of the listed items (Yin et al., VLDB 2012)
Novelty@K    mean self-information -log2(count / U) of the listed items (Zhou et al., PNAS 2010); a count of 0 is taken
             as 1
ILD@K        intra-list diversity: mean 1 - cosine over the pairs of a list, by the items' features (Ziegler et al.,
             WWW 2005; Zhang and Hurley, RecSys 2008); only for models with features

Add a metric by adding a function to LIST_METRICS.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from dataloader import EvalRows, eval_batches
from model.base import CountingModel
from model.sizes import increments
from trainer.evaluation import Model, candidates, encode_last

SCORES = 2**26  # user-item scores held at once


@dataclass(frozen=True)
class Lists:
    """Recommended lists, and what describes their items."""

    items: Tensor  # [U, K] int64, best first
    counts: Tensor  # [N+1] how often each item occurs in training
    features: Callable[[Tensor], Tensor] | None  # items [n] -> [n, F]; None: the model has none


def coverage(lists: Lists) -> float:
    return lists.items.unique().numel() / (len(lists.counts) - 1)


def average_popularity(lists: Lists) -> float:
    return lists.counts[lists.items].double().mean().item()


def novelty(lists: Lists) -> float:
    share = lists.counts[lists.items].double().clamp_min(1) / len(lists.items)
    return -torch.log2(share).mean().item()


def intra_list_diversity(lists: Lists) -> float | None:
    k = lists.items.shape[1]
    if lists.features is None or k < 2:
        return None
    total = 0.0
    for part in lists.items.split(1024):
        rows = F.normalize(lists.features(part.flatten()).float(), dim=1).unflatten(0, part.shape)  # [u, K, F]
        length = rows.sum(dim=1).square().sum(dim=1)  # the sum of all K² cosines
        own = rows.square().sum(dim=(1, 2))  # those of an item with itself
        total += (1 - (length - own) / (k * (k - 1))).double().sum().item()
    return total / len(lists.items)


LIST_METRICS: dict[str, Callable[[Lists], float | None]] = {
    "Coverage": coverage,
    "ARP": average_popularity,
    "Novelty": novelty,
    "ILD": intra_list_diversity,
}


def list_metrics_of_sizes(
    model: Model, rows: EvalRows, counts: Tensor, ks: tuple[int, ...], mask_history: bool
) -> dict[int, dict[str, float]]:
    """Return size -> {"Coverage@5": ..., ...} of the lists that each size recommends to all users.

    counts: [N+1] how often each item occurs in training. mask_history: never list what is in a user's history.
    """
    ks = tuple(k for k in ks if k <= model.num_items)
    if not ks:
        raise InputError(
            f"--list_metrics needs a cut-off of at most {model.num_items}, the items; give --metric_ks 1,2"
        )
    top = top_items(model, rows, max(ks), mask_history)
    items = None if isinstance(model, CountingModel) else model.items
    features = partial(items.rows, dtype=torch.float32) if items and items.parts else None
    results: dict[int, dict[str, float]] = {}
    for size, listed in top.items():
        values = {
            f"{name}@{k}": metric(Lists(listed[:, :k], counts, features))
            for k in ks
            for name, metric in LIST_METRICS.items()
        }
        results[size] = {name: value for name, value in values.items() if value is not None}
    return results


@torch.inference_mode()
def top_items(model: Model, rows: EvalRows, k: int, mask_history: bool) -> dict[int, Tensor]:
    """Return size -> [U, k], the items of highest score for every user, best first.

    Unlike in a test, a user's target is no candidate if it is in the masked history.
    """
    model.eval()
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    table = torch.empty(0) if isinstance(model, CountingModel) else model.item_table()
    found: dict[int, list[Tensor]] = {m: [] for m in model.sizes}
    bias = None if mask_history or isinstance(model, CountingModel) else model.ranking_bias()
    for batch in eval_batches(rows, max(1, min(256, SCORES // (model.num_items + 1))), device):
        scores = candidates(batch, 0, model.num_items + 1, mask_history, keep_targets=False)
        if isinstance(model, CountingModel):
            found[model.sizes[0]].append((scores + model.scores(batch.tokens[batch.last])).topk(k).indices.cpu())
            continue
        z = encode_last(model, batch, table)
        for j, (low, high) in enumerate(increments(model.sizes)):
            scores.addmm_(z[:, low:high], table[:, low:high].T)
            shown = scores
            if bias:
                shown = scores.clone()
                shown[batch.seen_rows, batch.seen_items] += bias[j]  # once, also for an item that occurs twice
            found[high].append(shown.topk(k).indices.cpu())
    return {m: torch.cat(parts) for m, parts in found.items()}
