"""Full ranking: every user's target among all items, for one model or for every size of a nested one."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import processes
from common.files import write_json
from dataloader import EvalBatch, EvalRows, eval_batches
from model import FMRLRec, slice_model
from model.baselines.counting import Popularity
from model.fmrl import increments
from trainer.metrics import METRICS, count_ahead, ranking_metrics, target_ranks
from trainer.plots import plot_metric_by_size
from trainer.runs import EVERY_SIZE, LARGEST, USER_RANKS, of_test
from trainer.step import Trainable
from trainer.user_ranks import save_ranks

T = TypeVar("T")
Model = Trainable | Popularity  # what is trained, or only counts
USERS = 2**16  # users that are ranked at once: every dataset of the paper in one go
ITEMS = 2**15  # items that are scored at once: every catalogue of the paper in one chunk
TABLE_BYTES = 2**30  # a projected item table up to this is held; otherwise a batch projects what it reads
PARITY = 1e-5  # how far a sliced model's scores may lie from the full model's prefix, relative to the largest score


def evaluate(
    model: Model,
    rows: EvalRows,
    *,
    sizes: tuple[int, ...],
    batch_size: int,
    ks: tuple[int, ...],
    mask_history: bool = False,
) -> dict[int, dict[str, float]]:
    """Metrics of `model` at each of its `sizes`, of the ranks that `rank_targets` finds."""
    found = rank_targets(model, rows, sizes=sizes, batch_size=batch_size, mask_history=mask_history)
    return {m: ranking_metrics(of_size, ks) for m, of_size in found.items()}


@torch.inference_mode()
def rank_targets(
    model: Model,
    rows: EvalRows,
    *,
    sizes: tuple[int, ...],
    batch_size: int,
    mask_history: bool = False,
) -> dict[int, Tensor]:
    """The rank of every user's target at each of `sizes`, [U] float64, from one pass in which sizes share their scores.

    Only the last position is scored. Items are projected once for USERS, in chunks, and a target is ranked by counting
    what is ahead of it, so that memory grows neither with the catalogue nor with the users. Token 0 is never a
    candidate; the items of the user's history are none where `mask_history` is set (the target always is one). Under
    torchrun each rank takes a share of the users, and all return the ranks of all.
    """
    training = model.training
    model.eval()
    start, stop = processes.share(len(rows))
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    found, table = torch.zeros(len(sizes), len(rows), dtype=torch.float64), None
    if not isinstance(model, Popularity) and 4 * model.num_items * model.sizes[-1] <= TABLE_BYTES:
        table = model.item_table()
    for first in range(start, stop, USERS):
        users = slice(first, min(first + USERS, stop))
        batches = list(eval_batches(rows.part(users.start, users.stop), batch_size, device))
        if isinstance(model, Popularity):
            found[:, users] = _ranks_of_counts(model, batches, mask_history)
        else:
            z = [_last(model, batch, table) for batch in _shown(batches, "histories", "batch")]
            found[:, users] = _ranks(model, batches, z, table, sizes, mask_history)
    model.train(training)
    return dict(zip(sizes, processes.add_up(found), strict=True))


def _shown(parts: Sequence[T], title: str, unit: str) -> Iterable[T]:
    """The parts, with a progress bar that goes when they are done."""
    return tqdm(parts, title, leave=False, unit=unit, disable=True if processes.rank() else None)


def _last(model: Trainable, batch: EvalBatch, table: Tensor | None) -> Tensor:
    """z [B, D] of every row's last token."""
    if table is None:
        tokens, place = batch.tokens.unique(return_inverse=True)
        x = model.items(tokens)[place]
    else:
        x = table[batch.tokens]
    return model.encode(x, batch.position, batch.longest, at=batch.last)


def _ranks(
    model: Trainable,
    batches: list[EvalBatch],
    z: list[Tensor],
    table: Tensor | None,
    sizes: tuple[int, ...],
    mask_history: bool,
) -> Tensor:
    """The rank of every user's target at these sizes, from 1: [M, U]. Items with the target's score share their average
    rank, so a rank may end in .5; in a catalogue of several chunks, rounding may tell equal scores apart."""
    chunks = torch.arange(model.num_items + 1, device=z[0].device).split(ITEMS)
    counts = [z_batch.new_zeros(2, len(sizes), len(z_batch)) for z_batch in z]  # ahead of the target, equal to it
    targets = [model.items(batch.targets) if len(chunks) > 1 else None for batch in batches]  # each [B, D]
    for chunk in _shown(chunks, "ranking", "chunk of items"):
        start, stop = int(chunk[0]), int(chunk[-1]) + 1
        columns = model.items(chunk) if table is None else table[start:stop]  # [C, D]
        buffer = columns.new_empty(len(z[0]), len(columns))
        for batch, z_batch, of_targets, count in zip(batches, z, targets, counts, strict=True):
            scores = candidates(batch, start, stop, mask_history)
            row, place = _within(torch.arange(len(z_batch), device=chunk.device), batch.targets, start, stop)
            for low, high in increments(model.sizes):
                scores.addmm_(z_batch[:, low:high], columns[:, low:high].T)
                if high not in sizes:
                    continue
                if of_targets is None:
                    target = scores.gather(1, batch.targets[:, None])
                else:
                    target = (z_batch[:, :high] * of_targets[:, :high]).sum(dim=1, keepdim=True)
                    scores[row, place] = target[row, 0]
                count[:, sizes.index(high)] += torch.stack(count_ahead(scores, target, buffer[: len(scores)]))
    return torch.cat([1 + ahead + (equal - 1).clamp_min(0) / 2 for ahead, equal in counts], dim=1).double().cpu()


def _ranks_of_counts(model: Popularity, batches: list[EvalBatch], mask_history: bool) -> Tensor:
    """The rank of every user's target by a model that only counts: [U]."""
    found = []
    for batch in batches:
        scores = candidates(batch, 0, model.num_items + 1, mask_history) + model.scores(batch.tokens[batch.last])
        found.append(target_ranks(scores, batch.targets).cpu())
    return torch.cat(found)


def candidates(batch: EvalBatch, start: int, stop: int, mask_history: bool) -> Tensor:
    """[B, stop - start] of the tokens start:stop: 0 for what may be recommended and -inf for the rest, to add the
    scores to."""
    scores = torch.zeros(len(batch.targets), stop - start, device=batch.targets.device)
    if mask_history:
        scores[_within(batch.seen_rows, batch.seen_items, start, stop)] = -torch.inf
        scores[_within(torch.arange(len(scores), device=scores.device), batch.targets, start, stop)] = 0.0
    if start == 0:
        scores[:, 0] = -torch.inf
    return scores


def _within(rows: Tensor, items: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(row, item - start) of the pairs whose item is one of start:stop."""
    here = (items >= start) & (items < stop)
    return rows[here], items[here] - start


def rank_targets_alone(
    model: FMRLRec, rows: EvalRows, *, sizes: tuple[int, ...], batch_size: int, mask_history: bool = False
) -> dict[int, Tensor]:
    """The plain twin of `rank_targets`: slice a stand-alone model of every size and let each rank, at its own cost."""
    return {
        m: rank_targets(slice_model(model, m), rows, sizes=(m,), batch_size=batch_size, mask_history=mask_history)[m]
        for m in sizes
    }


@torch.inference_mode()
def check_slice(model: FMRLRec, small: FMRLRec, batch: EvalBatch) -> None:
    """Raise RuntimeError unless a slice scores a batch as the prefix of the model it was cut from does, to PARITY."""
    size, scores = small.sizes[-1], []
    some = torch.arange(min(ITEMS, model.num_items + 1), device=batch.tokens.device)  # items enough, memory bounded
    for recommender in (model, small):
        recommender.eval()
        scores.append(_last(recommender, batch, None)[:, :size] @ recommender.items(some)[:, :size].T)
    difference = ((scores[0] - scores[1]).abs().max() / scores[0].abs().max().clamp_min(1e-30)).item()
    if not difference <= PARITY:
        raise RuntimeError(f"the slice of size {size} scores otherwise than the full model, by {difference:.1e}")


def test_every_size(
    model: Model,
    rows: EvalRows,
    run: Path,
    *,
    batch_size: int,
    ks: tuple[int, ...],
    printed: tuple[int, ...],
    mask_history: bool,
    title: str,
    times_trained: np.ndarray,
    alone: bool = False,
) -> dict[int, dict[str, float]]:
    """Test every size; print the table, write the run's test metrics, ranks and curve. Returns size -> metrics.

    All sizes are ranked in one pass, or, with `alone`, each as the stand-alone model that its slice is. printed: those
    of the cut-offs ks that the table has. times_trained: [U], how often each user's target occurs in training. Raises
    RuntimeError, when all is written, if a slice does not score as the model's prefix does.
    """
    if alone:
        assert isinstance(model, FMRLRec)  # eval.py refuses a baseline
        found = rank_targets_alone(model, rows, sizes=model.sizes, batch_size=batch_size, mask_history=mask_history)
    else:
        found = rank_targets(model, rows, sizes=model.sizes, batch_size=batch_size, mask_history=mask_history)
    results = {m: ranking_metrics(of_size, ks) for m, of_size in found.items()}
    if processes.rank() == 0:
        of_users = {m: of_size.numpy() for m, of_size in found.items()}
        save_ranks(run / of_test(USER_RANKS, mask_history), of_users, max(ks), times_trained)
        _report(results, run, ks, printed, title, mask_history)
    if isinstance(model, FMRLRec):  # a baseline has nothing to slice
        batch = next(eval_batches(rows, batch_size, next(model.parameters()).device))
        for m in model.sizes:
            check_slice(model, slice_model(model, m), batch)
    return results


def _report(
    results: dict[int, dict[str, float]],
    run: Path,
    ks: tuple[int, ...],
    printed: tuple[int, ...],
    title: str,
    mask_history: bool,
) -> None:
    names = [f"{metric}@{k}" for k in printed for metric in METRICS]
    print("  size  " + "  ".join(f"{name:>9}" for name in names))
    for size, metrics in results.items():
        print(f"{size:6d}  " + "  ".join(f"{metrics[name]:9.4f}" for name in names))
    write_json(run / of_test(LARGEST, mask_history), results[max(results)])
    path = run / of_test(EVERY_SIZE, mask_history)
    write_json(path, {str(m): metrics for m, metrics in results.items()})
    picture = path.with_suffix(".png")
    plot_metric_by_size(results, ks, title + (", history masked" if mask_history else ""), picture)
    print(f"written: {path} and {picture.name}", flush=True)
