"""The test of every size on every user's last item; slices against the model's prefix; metrics of recommended lists."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import processes
from common.errors import InputError
from common.files import write_json
from config import METRICS, Config
from dataloader import EvalBatch, EvalRows, eval_batches, eval_rows, times_trained
from datasets.catalog import Sequences
from model import FMRLRec, slice_model
from model.base import CountingModel, increments
from model.baselines.counting import Popularity
from trainer.evaluation import (
    ITEMS,
    Model,
    candidates,
    encode_last,
    evaluate,
    rank_targets,
    rank_targets_alone,
    ranking_metrics,
)
from trainer.plots import plot_metric_by_size
from trainer.runs import (
    BINS,
    EVERY_SIZE,
    LARGEST,
    LIST_METRICS_FILE,
    USER_RANKS,
    describe_model,
    read_config,
    result_file,
    save_ranks,
)

PARITY = 1e-5  # how far a slice's scores may lie from the full model's prefix, relative to the largest score


def test_every_size(
    model: Model,
    sequences: Sequences,
    config: Config,
    folder: Path,
    *,
    mask_history: bool = False,
    alone: bool = False,
    list_metrics: bool = False,
    out: Path | None = None,
) -> dict[int, dict[str, float]]:
    """Test every size, print the table, write the run's files, and return size -> metrics.

    mask_history: exclude history items from the candidates. alone: rank with each slice as a stand-alone model, instead
    of all sizes in one pass. list_metrics: also measure the recommended lists. out: write the files there (default: the
    run's folder). Raises RuntimeError, after all is
    written, if a slice does not score as the model's prefix does.
    """
    rows = eval_rows(sequences, config.lru_max_len, "test")
    trained_ks = processes.on_main_process(lambda: read_config(folder)[0].metric_ks)
    out = out or folder
    ks = tuple(sorted({*config.metric_ks, *trained_ks}))  # the run's files never lose a cut-off
    batch_size, sizes = config.test_batch_size, model.sizes
    if alone and isinstance(model, FMRLRec):  # eval.py refuses a baseline
        ranks = rank_targets_alone(model, rows, sizes=sizes, batch_size=batch_size, mask_history=mask_history)
    else:
        ranks = rank_targets(model, rows, sizes=sizes, batch_size=batch_size, mask_history=mask_history)
    results = {m: ranking_metrics(of_size, ks) for m, of_size in ranks.items()}
    counts = times_trained(sequences, model.num_items)
    popularity = Popularity(model.num_items)
    popularity.counts = torch.from_numpy(counts).float()
    of_popularity = evaluate(popularity, rows, sizes=(1,), batch_size=batch_size, ks=ks, mask_history=mask_history)[1]
    if processes.rank() == 0:
        by_time = "" if sequences.cuts is None else f", split by {sequences.split}"
        protocol = "masked" if mask_history else "kept"
        title = f"{config.dataset_code}{by_time}, {describe_model(config)}: test, history {protocol}"
        of_users = {m: of_size.numpy() for m, of_size in ranks.items()}
        save_ranks(out / result_file(USER_RANKS, mask_history), of_users, max(ks), counts[rows.targets])
        print_table(results, [f"{metric}@{k}" for k in config.metric_ks[:2] for metric in METRICS])
        write_json(out / result_file(LARGEST, mask_history), results[max(results)])
        path = out / result_file(EVERY_SIZE, mask_history)
        write_json(path, {str(m): metrics for m, metrics in results.items()})
        plot_metric_by_size(results, ks, title, path.with_suffix(".png"), of_popularity)
        print(f"written: {path} and {path.with_suffix('.png').name}", flush=True)
        if list_metrics:
            found = list_metrics_of_sizes(model, rows, torch.from_numpy(counts), config.metric_ks[:2], mask_history)
            print_table(found, list(found[model.sizes[-1]]))
            write_json(out / result_file(LIST_METRICS_FILE, mask_history), {str(m): found[m] for m in found})
    if isinstance(model, FMRLRec):  # a baseline has nothing to slice
        batch = next(eval_batches(rows, config.test_batch_size, next(model.parameters()).device))
        for m in model.sizes:
            check_slice(model, slice_model(model, m), batch)
    return results


def validate_every_size(
    model: Model, sequences: Sequences, config: Config, mask_history: bool = False
) -> dict[int, dict[str, float]]:
    """Rank the validation targets, and return size -> metrics.

    Prints the metrics, and the largest size's by how often a target occurs in training. Writes nothing and never reads
    the test set.
    """
    rows = eval_rows(sequences, config.lru_max_len, "val")
    batch_size = config.val_batch_size
    ranks = rank_targets(model, rows, sizes=model.sizes, batch_size=batch_size, mask_history=mask_history)
    results = {m: ranking_metrics(of_size, config.metric_ks) for m, of_size in ranks.items()}
    bins = np.digitize(times_trained(sequences, model.num_items)[rows.targets], list(BINS.values())[1:])
    if processes.rank() == 0:
        shown = [f"{metric}@{k}" for k in config.metric_ks for metric in ("Recall", "NDCG")]
        print_table(results, shown)
        print(f"validation targets of size {model.sizes[-1]} by how often they occur in training:")
        for number, name in enumerate(BINS):
            if len(found := ranks[model.sizes[-1]][torch.from_numpy(bins == number)]):
                metrics = ranking_metrics(found, config.metric_ks)
                values = "  ".join(f"{metric} {metrics[metric]:.4f}" for metric in shown)
                print(f"{name:17} {len(found):6,} users  {values}", flush=True)
    return results


def print_table(results: dict[int, dict[str, float]], names: list[str]) -> None:
    """Print a row for every size, with the metrics `names`."""
    widths = [max(9, len(name)) for name in names]
    print("  size  " + "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    for size, metrics in results.items():
        values = (f"{metrics[name]:{width}.4f}" for name, width in zip(names, widths, strict=True))
        print(f"{size:6d}  " + "  ".join(values))


@torch.inference_mode()
def check_slice(model: FMRLRec, small: FMRLRec, batch: EvalBatch) -> None:
    """Raise RuntimeError unless a slice scores a batch as the model's prefix does, to PARITY."""
    size, scores = small.sizes[-1], []
    some = torch.arange(min(ITEMS, model.num_items + 1), device=batch.tokens.device)  # items enough, memory bounded
    for recommender in (model, small):
        recommender.eval()
        scores.append(encode_last(recommender, batch, None)[:, :size] @ recommender.items(some)[:, :size].T)
    difference = ((scores[0] - scores[1]).abs().max() / scores[0].abs().max().clamp_min(1e-30)).item()
    if not difference <= PARITY:
        raise RuntimeError(f"the slice of size {size} differs from the full model's scores by {difference:.1e}")


# --------------------------------------------------------------------------------------------------------- list metrics
# Metrics of recommended lists: what users are shown, whether or not they took it. U users, K items a list.
#
# Coverage@K  share of the catalogue that is in at least one list (Ge et al., RecSys 2010)
# ARP@K       average recommendation popularity: mean training count of the listed items (Yin et al., VLDB 2012)
# Novelty@K   mean self-information -log2(count / U) of the listed items (Zhou et al., PNAS 2010); a count of 0 is taken
#             as 1
# ILD@K       intra-list diversity: mean 1 - cosine over the pairs of a list, by the items' features (Ziegler et al.,
#             WWW 2005; Zhang and Hurley, RecSys 2008); only for models with features
#
# Add a metric by adding a function to LIST_METRICS.

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
