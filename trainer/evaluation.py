"""Full ranking: every user's target among all items, for one model or for every size of a nested one."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dataloader import EvalBatch, EvalRows, eval_batches
from datasets.files import write_json
from model import FMRLRec, slice_model
from model.fmrl import increments
from trainer.metrics import ranking_metrics, target_ranks
from trainer.plots import plot_metric_by_size

PARITY = 1e-5  # how far a sliced model's scores may lie from the full model's prefix, relative to the largest score


@torch.inference_mode()
def evaluate(
    model: FMRLRec,
    rows: EvalRows,
    *,
    sizes: tuple[int, ...],
    batch_size: int,
    ks: tuple[int, ...],
    mask_history: bool = False,
) -> dict[int, dict[str, float]]:
    """Metrics of `model` at each of its `sizes`, from one pass in which sizes share their scores.

    The item table is projected once and only the last position is scored. Token 0 is never a candidate; the items of
    the user's history are none where `mask_history` is set (the target always is one).
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ranks: dict[int, list[Tensor]] = {m: [] for m in sizes}
    table = model.item_table()
    for batch in eval_batches(rows, batch_size, device):
        z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]  # [B, D]
        scores = candidates(batch, len(table), mask_history)
        for low, high in increments(model.sizes):
            scores.addmm_(z[:, low:high], table[:, low:high].T)
            if high in ranks:
                ranks[high].append(target_ranks(scores, batch.targets))
    model.train(training)
    return {m: ranking_metrics(torch.cat(parts).cpu(), ks) for m, parts in ranks.items()}


def candidates(batch: EvalBatch, num_tokens: int, mask_history: bool) -> Tensor:
    """[B, N+1]: 0 for what may be recommended and -inf for the rest, to add the scores to."""
    scores = torch.zeros(len(batch.targets), num_tokens, device=batch.targets.device)
    if mask_history:
        scores[batch.seen_rows, batch.seen_items] = -torch.inf
        scores.scatter_(1, batch.targets[:, None], 0.0)
    scores[:, 0] = -torch.inf
    return scores


def evaluate_slices(
    model: FMRLRec,
    rows: EvalRows,
    *,
    batch_size: int,
    ks: tuple[int, ...],
    mask_history: bool = False,
    say: Callable[[int, dict[str, float]], None] = lambda size, metrics: None,
) -> dict[int, dict[str, float]]:
    """Slice a stand-alone model of every size and evaluate each alone; `say` hears of each as it is done."""
    results = {}
    for m in model.sizes:
        small = slice_model(model, m)
        results |= evaluate(small, rows, sizes=(m,), batch_size=batch_size, ks=ks, mask_history=mask_history)
        say(m, results[m])
    return results


@torch.inference_mode()
def check_slice(model: FMRLRec, small: FMRLRec, batch: EvalBatch) -> None:
    """Raise RuntimeError unless a slice scores a batch as the prefix of the model it was cut from does, to PARITY."""
    size, scores = small.sizes[-1], []
    for recommender in (model, small):
        recommender.eval()
        table = recommender.item_table()
        z = recommender.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
        scores.append(z[:, :size] @ table[:, :size].T)
    difference = ((scores[0] - scores[1]).abs().max() / scores[0].abs().max().clamp_min(1e-30)).item()
    if not difference <= PARITY:
        raise RuntimeError(f"the slice of size {size} scores otherwise than the full model, by {difference:.1e}")


def test_every_size(
    model: FMRLRec, rows: EvalRows, run: Path, *, batch_size: int, ks: tuple[int, ...], mask_history: bool, title: str
) -> dict[int, dict[str, float]]:
    """Slice and test every size; print the table, write the run's test metrics and curve. Returns size -> metrics.

    Raises RuntimeError, when all is written, if a slice does not score as the model's prefix does.
    """
    names = [f"{metric}@{k}" for k in ks[:2] for metric in ("Recall", "NDCG", "MRR")]
    print("  size  " + "  ".join(f"{name:>9}" for name in names), flush=True)

    def say(size: int, metrics: dict[str, float]) -> None:
        print(f"{size:6d}  " + "  ".join(f"{metrics[name]:9.4f}" for name in names), flush=True)

    results = evaluate_slices(model, rows, batch_size=batch_size, ks=ks, mask_history=mask_history, say=say)
    suffix = "_history_masked" if mask_history else ""
    write_json(run / f"test_metrics{suffix}.json", results[model.sizes[-1]])
    write_json(run / f"test_mrl_metrics{suffix}.json", {str(m): metrics for m, metrics in results.items()})
    picture = run / f"test_mrl_metrics{suffix}.png"
    plot_metric_by_size(results, ks, title + (", history masked" if mask_history else ""), picture)
    print(f"written: {run / f'test_mrl_metrics{suffix}.json'} and {picture.name}", flush=True)
    batch = next(eval_batches(rows, batch_size, next(model.parameters()).device))
    for m in model.sizes:
        check_slice(model, slice_model(model, m), batch)
    return results
