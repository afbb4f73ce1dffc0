"""Full ranking: the rank of every user's target among all items, for one model or for every size of a nested one.

Ranks do not depend on batches, chunks of the catalogue or processes. Users are encoded in the same groups of GROUP, and
items projected in the same chunks of ITEMS, whoever asks; scores are compared as trainer/exact.py says. U users,
B users of a batch, C items of a chunk, N items, M sizes, D the largest.

A learned history bias (model/extensions/history.py) is added to the exact scores of history items, which are therefore
counted apart. With masked histories it is left out: no candidate is in the history but the target.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from common import processes
from dataloader import EvalBatch, EvalRows, eval_batches
from model import FMRLRec, slice_model
from model.base import CountingModel, SequenceModel
from model.registry import Model
from model.sizes import increments
from trainer.exact import count_ahead, count_pairs_ahead, exact_scores, longest_row, on_grid
from trainer.metrics import ranking_metrics, target_ranks

T = TypeVar("T")
GROUP = 2**8  # users encoded together
USERS = 2**8 * GROUP  # users whose z is held at once: every dataset of the paper in one go
ITEMS = 2**12  # items projected and scored at once: their scores for 256 users fit into a CPU's cache
TABLE_BYTES = 2**28  # hold a projected item table up to this size; project larger ones chunk by chunk


def evaluate(
    model: Model,
    rows: EvalRows,
    *,
    sizes: tuple[int, ...],
    batch_size: int,
    ks: tuple[int, ...],
    mask_history: bool = False,
) -> dict[int, dict[str, float]]:
    """Return size -> metrics of the ranks that `rank_targets` finds."""
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
    """Return size -> the rank of every user's target, [U] float64; sizes share their scores in one pass.

    Only the last position is scored. Token 0 is never a candidate; history items are excluded if `mask_history` is set,
    except the target. A target is ranked by counting the items ahead of it, so memory grows neither with the catalogue
    nor with the users. batch_size: users scored at once; it bounds memory and does not change the ranks. Under torchrun
    each rank takes a share of the groups, and all return the ranks of all users.
    """
    training = model.training
    model.eval()
    start, stop = (min(GROUP * group, len(rows)) for group in processes.share(-(-len(rows) // GROUP)))
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    found, table = torch.zeros(len(sizes), len(rows), dtype=torch.float64), None
    if not isinstance(model, CountingModel) and 4 * model.num_items * model.sizes[-1] <= TABLE_BYTES:
        table = torch.cat([_project(model, first) for first in range(0, model.num_items + 1, ITEMS)])
    for first in range(start, stop, USERS):
        users = slice(first, min(first + USERS, stop))
        part = rows.part(users.start, users.stop)
        batches = list(eval_batches(part, batch_size, device))
        if isinstance(model, CountingModel):
            found[:, users] = _ranks_of_counts(model, batches, mask_history)
        else:
            groups = _progress(list(eval_batches(part, GROUP, device)), "histories", "group")
            z = torch.cat([encode_last(model, group, table) for group in groups])
            found[:, users] = _ranks(model, batches, z, table, sizes, mask_history)
    model.train(training)
    return dict(zip(sizes, processes.add_up(found), strict=True))


def _progress(parts: Sequence[T], title: str, unit: str) -> Iterable[T]:
    """Show a progress bar over the parts, on rank 0, until they are done."""
    return tqdm(parts, title, leave=False, unit=unit, disable=True if processes.rank() else None)


def encode_last(model: SequenceModel, batch: EvalBatch, table: Tensor | None) -> Tensor:
    """Return z [B, D] of every row's last token."""
    if table is None:
        tokens, place = batch.tokens.unique(return_inverse=True)
        x = model.items(tokens)[place]
    else:
        x = table[batch.tokens]
    return model.encode(x, batch.position, batch.longest, at=batch.last)


def _project(model: SequenceModel, start: int) -> Tensor:
    """Return the rows of the item table from `start` on, [C, D]. All chunks are projected in the same shape, the last
    one filled up with token 0, so that equal features have equal rows."""
    tokens = torch.arange(start, start + ITEMS, device=next(model.parameters()).device)
    return model.items(tokens * (tokens <= model.num_items))[: model.num_items + 1 - start]


def _ranks(
    model: SequenceModel,
    batches: list[EvalBatch],
    z: Tensor,
    table: Tensor | None,
    sizes: tuple[int, ...],
    mask_history: bool,
) -> Tensor:
    """Return the rank, from 1, of every user's target at these sizes: z [U, D] -> [M, U]. Items with the target's score
    share their average rank, so a rank may end in .5."""
    parts = on_grid(z).split([len(batch.targets) for batch in batches])
    target = [part.new_zeros(len(sizes), len(part), dtype=torch.float64) for part in parts]  # its exact score
    of_size = {} if mask_history else dict(zip(model.sizes, model.ranking_bias() or (), strict=False))
    bias = [of_size[m] for m in sizes if m in of_size]  # of history items; empty: none
    history = [_history(batch) for batch in batches] if bias else []
    counts = [part.new_zeros(len(sizes), 2, len(part)) for part in parts]  # ahead of the target, tied with it
    starts = range(0, model.num_items + 1, ITEMS)

    def chunk(start: int) -> Tensor:
        return on_grid(_project(model, start) if table is None else table[start : start + ITEMS])  # [C, D]

    for start in starts:
        columns = chunk(start)
        for batch, z_batch, of_target in zip(batches, parts, target, strict=True):
            row, place = _targets_within(batch, start, start + len(columns))
            for j, m in enumerate(sizes):
                of_target[j, row] = exact_scores(z_batch[row, :m], columns[place, :m])
    for batch, of_target, (row, item) in zip(batches, target, history, strict=False):
        of_target[:, row[item == batch.targets[row]]] += of_target.new_tensor(bias)[:, None]
    for start in _progress(starts, "ranking", "chunk of items"):
        columns = chunk(start)
        longest = [longest_row(columns[:, :m]) for m in sizes]
        buffers = columns.new_empty(2, len(parts[0]), len(columns))
        for i, (batch, z_batch, of_target, count) in enumerate(zip(batches, parts, target, counts, strict=True)):
            scores = candidates(batch, start, start + len(columns), mask_history)
            if bias:
                row, place = _within(*history[i], start, start + len(columns))
                scores[row, place] = -torch.inf  # counted apart
                other = place + start != batch.targets[row]
                count += count_pairs_ahead(z_batch, columns, row[other], place[other], of_target, sizes, bias)
            scores[_targets_within(batch, start, start + len(columns))] = -torch.inf  # it is not counted
            for low, high in increments(model.sizes):
                scores.addmm_(z_batch[:, low:high], columns[:, low:high].T)
                if high in sizes:
                    j, buffer = sizes.index(high), buffers[:, : len(scores)]
                    prefixes = z_batch[:, :high], columns[:, :high]
                    count[j] += torch.stack(count_ahead(scores, of_target[j], *prefixes, longest[j], buffer))
    return torch.cat([1 + ahead.double() + tied.double() / 2 for ahead, tied in (c.unbind(1) for c in counts)], 1).cpu()


def _history(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    """Return (row, item) of the distinct items of every complete history."""
    pairs = torch.stack([batch.seen_rows, batch.seen_items]).unique(dim=1)
    return pairs[0], pairs[1]


def _ranks_of_counts(model: CountingModel, batches: list[EvalBatch], mask_history: bool) -> Tensor:
    """Return the rank of every user's target by a model that only counts: [U]."""
    found = []
    for batch in batches:
        scores = candidates(batch, 0, model.num_items + 1, mask_history) + model.scores(batch.tokens[batch.last])
        found.append(target_ranks(scores, batch.targets).cpu())
    return torch.cat(found)


def candidates(batch: EvalBatch, start: int, stop: int, mask_history: bool, keep_targets: bool = True) -> Tensor:
    """Return [B, stop - start] to add the scores of the tokens start:stop to: 0 for candidates, -inf for the rest."""
    scores = torch.zeros(len(batch.targets), stop - start, device=batch.targets.device)
    if mask_history:
        scores[_within(batch.seen_rows, batch.seen_items, start, stop)] = -torch.inf
        if keep_targets:
            scores[_targets_within(batch, start, stop)] = 0.0
    if start == 0:
        scores[:, 0] = -torch.inf
    return scores


def _within(rows: Tensor, items: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return (row, item - start) of the pairs whose item is in start:stop."""
    here = (items >= start) & (items < stop)
    return rows[here], items[here] - start


def _targets_within(batch: EvalBatch, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return (row, target - start) of the users whose target is in start:stop."""
    return _within(torch.arange(len(batch.targets), device=batch.targets.device), batch.targets, start, stop)


def rank_targets_alone(
    model: FMRLRec, rows: EvalRows, *, sizes: tuple[int, ...], batch_size: int, mask_history: bool = False
) -> dict[int, Tensor]:
    """Rank with a stand-alone slice of every size: the plain twin of the sizes' shared pass in `rank_targets`."""
    return {
        m: rank_targets(slice_model(model, m), rows, sizes=(m,), batch_size=batch_size, mask_history=mask_history)[m]
        for m in sizes
    }
