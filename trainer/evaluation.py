"""Full ranking: the rank of every user's target among all items, for one model or for every size of a nested one.

Ranks do not depend on batches, chunks of the catalogue or processes. Users are encoded in the same groups of GROUP, and
items projected in the same chunks of ITEMS, whoever asks; scores are compared exactly, as below. U users,
B users of a batch, C items of a chunk, N items, M sizes, D the largest.

Under torchrun each rank takes a share of the users. If the rows of the item embedding are spread over the ranks
(trainer/sparse_rows.py), each rank takes a share of the chunks for all users instead: it projects and counts only
those, and the counts are summed. Only z, target scores and the rows of a chunk travel, so no rank holds them all.

A learned history bias (model/extensions/objective.py) is added to the exact scores of history items, which are
therefore counted apart. With masked histories it is left out: no candidate is in the history but the target.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import processes
from dataloader import EvalBatch, EvalRows, eval_batches
from model import FMRLRec, Model, slice_model
from model.base import CountingModel, SequenceModel, increments

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
    all ranks return the ranks of all users.
    """
    training = model.training
    model.eval()
    spread = not isinstance(model, CountingModel) and model.items.spread
    share = (0, -(-len(rows) // GROUP)) if spread else processes.share(-(-len(rows) // GROUP))
    start, stop = (min(GROUP * group, len(rows)) for group in share)
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    found, table = torch.zeros(len(sizes), len(rows), dtype=torch.float64), None
    if not isinstance(model, CountingModel) and not spread and 4 * model.num_items * model.sizes[-1] <= TABLE_BYTES:
        table = torch.cat([_project(model, tokens) for tokens in _chunks(model, 0, 1)])
    for first in range(start, stop, USERS):
        users = slice(first, min(first + USERS, stop))
        part = rows.part(users.start, users.stop)
        batches = list(eval_batches(part, batch_size, device))
        if isinstance(model, CountingModel):
            found[:, users] = _ranks_of_counts(model, batches, mask_history)
        else:
            z = _encode(model, list(eval_batches(part, GROUP, device)), table)
            found[:, users] = _ranks(model, batches, z, table, sizes, mask_history)
    model.train(training)
    return dict(zip(sizes, found if spread else processes.add_up(found), strict=True))


def _progress(parts: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Show a progress bar over the parts, on rank 0, until they are done. total: their number, if they have no len."""
    return tqdm(parts, title, total, leave=False, unit=unit, disable=True if processes.rank() else None)


def _spread_over(model: SequenceModel) -> tuple[int, int, Callable[[Tensor], Tensor]]:
    """Return (rank, ranks, sum over the ranks) if the rows of the item embedding are spread; else those of one rank."""
    if model.items.spread:
        return processes.rank(), processes.world_size(), processes.add_up
    return 0, 1, lambda tensor: tensor


def _encode(model: SequenceModel, groups: list[EvalBatch], table: Tensor | None) -> Tensor:
    """Return z [U, D] of the users of all groups. If rows are spread, each rank encodes every R-th group."""
    rank, ranks, total = _spread_over(model)
    parts = []
    for first in _progress(range(0, len(groups), ranks), "histories", "group"):
        some = groups[first : first + ranks]
        # A rank without a group encodes the last one too, since the ranks fetch rows together.
        z = encode_last(model, some[min(rank, len(some) - 1)], table)
        parts += [z if r == rank else z.new_zeros(len(some[r].targets), z.shape[1]) for r in range(len(some))]
    return total(torch.cat(parts))


def encode_last(model: SequenceModel, batch: EvalBatch, table: Tensor | None) -> Tensor:
    """Return z [B, D] of every row's last token."""
    if table is None:
        tokens, place = batch.tokens.unique(return_inverse=True)
        x = _project(model, tokens)[place]
    else:
        x = table[batch.tokens]
    return model.encode(x, batch.position, batch.longest, at=batch.last)


def _chunks(model: SequenceModel, rank: int, ranks: int) -> Iterator[Tensor]:
    """Yield the tokens of every R-th chunk of the catalogue from chunk `rank` on, each [C].

    All ranks get the same number of chunks, of which the last may be empty.
    """
    device = next(model.parameters()).device
    for start in range(0, model.num_items + 1, ranks * ITEMS):
        tokens = torch.arange(ITEMS, device=device) + (start + rank * ITEMS)
        yield tokens[tokens <= model.num_items]


def _project(model: SequenceModel, tokens: Tensor) -> Tensor:
    """Return the rows of the item table of tokens [n], [n, D].

    They are filled up with token 0 to a multiple of ITEMS, so that equal features have equal rows: products of few
    rows round otherwise.
    """
    return model.items(F.pad(tokens, (0, -len(tokens) % ITEMS)))[: len(tokens)]


@torch.inference_mode()
def set_new_item_scale(model: SequenceModel) -> None:
    """Set the scale of items without a training event (model/extensions/item_table.py), if there is a gate."""
    if gate := model.items.gate:
        rank, ranks, total = _spread_over(model)
        gate.scale.fill_(model.items.new_item_scale(_chunks(model, rank, ranks), total))


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
    rank, ranks, total = _spread_over(model)
    parts = on_grid(z).split([len(batch.targets) for batch in batches])
    target = [part.new_zeros(len(sizes), len(part), dtype=torch.float64) for part in parts]  # its exact score
    of_size = {} if mask_history else dict(zip(model.sizes, model.ranking_bias() or (), strict=False))
    bias = [of_size[m] for m in sizes if m in of_size]  # of history items; empty: none
    history = [_history(batch) for batch in batches] if bias else []
    num_chunks = -(-(model.num_items + 1) // (ranks * ITEMS))
    counts = [torch.zeros_like(of_target)[:, None].repeat(1, 2, 1) for of_target in target]  # ahead of it, tied with it

    def chunks() -> Iterator[tuple[int, Tensor]]:
        """Yield (first token, rows [C, D]) of the chunks that this rank ranks."""
        for tokens in _chunks(model, rank, ranks):
            columns = _project(model, tokens) if table is None else table[tokens]
            if len(tokens):
                yield int(tokens[0]), on_grid(columns)

    for start, columns in chunks():
        for batch, z_batch, of_target in zip(batches, parts, target, strict=True):
            row, place = _targets_within(batch, start, start + len(columns))
            for j, m in enumerate(sizes):
                of_target[j, row] = exact_scores(z_batch[row, :m], columns[place, :m])
    target = [total(of_target) for of_target in target]
    for batch, of_target, (row, item) in zip(batches, target, history, strict=False):
        of_target[:, row[item == batch.targets[row]]] += of_target.new_tensor(bias)[:, None]
    for start, columns in _progress(chunks(), "ranking", "chunk of items", num_chunks):
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
    return torch.cat([1 + ahead + tied / 2 for ahead, tied in (total(count).unbind(1) for count in counts)], 1).cpu()


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


# ---------------------------------------------------------------------------------------------------------------- exact
# Exact scores: the same bits in every batch, chunk and process.
#
# A float32 product of matrices rounds differently in other shapes, so two computations of one score can differ. Here
# all vectors are rounded to a grid first, so coarse that float64 adds up their products without any rounding, in any
# order:
#
#     score(u, i) = z_u · E_i         z_u, E_i: rounded to 22 bits of their largest value (21 beyond 512 dimensions)
#
# That is as fine as float32 products round. Float32 products then decide all comparisons but the few whose scores lie
# within the error bound of float32; exact scores decide those. B users, C items, m dimensions.

EPSILON = torch.finfo(torch.float32).eps


def on_grid(x: Tensor) -> Tensor:
    """Round each row of x [n, D] to multiples of 2^-b of its largest value: float32 [n, D].

    b is the most bits at which a sum of D products stays below 2^53. Values that are not finite stay as they are.
    """
    x, bits = x.float(), min(22, (53 - (x.shape[1] - 1).bit_length()) // 2)
    largest = x.abs().nan_to_num_(0, 0, 0).amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    shift = largest / largest.frexp().mantissa * (1.5 * 2 ** (23 - bits))  # the last bit of x + shift is the grid's
    return (x + shift) - shift


def exact_scores(z: Tensor, rows: Tensor) -> Tensor:
    """z_n · rows_n [n] float64 of vectors [n, m] on the grid."""
    return (z.double() * rows.double()).sum(dim=1)


def longest_row(rows: Tensor) -> Tensor:
    """The largest norm of the finite rows [C, m]: a scalar."""
    return rows.norm(dim=1).nan_to_num(0, 0, 0).amax()


def count_ahead(
    scores: Tensor, target: Tensor, z: Tensor, rows: Tensor, longest: Tensor, buffers: Tensor
) -> tuple[Tensor, Tensor]:
    """Count the items whose exact score is ahead of the target's, and those that tie with it: each [B] float32.

    scores: [B, C] float32 products of z and rows, in any order of summation, -inf for items that are no candidates and
    for the target; NaN counts as ahead. target: [B] float64, its exact score; z: [B, m] and rows: [C, m] on the grid;
    longest: of these rows; buffers: [2, B, C] float32, of any content; C below 2^24, so that a float counts exactly.
    """
    # Adding up m products rounds by at most m eps/2 |z| |E_i|; the rest is for the norms and for low and high, also of
    # a target that is longer than |z| |E_i| by its history bias.
    slack = 1.01 * (z.shape[1] + 4) * EPSILON / 2 * z.norm(dim=1).nan_to_num(0, 0, 0) * longest
    slack = slack + EPSILON * target.abs()
    low, high = ((target + side).float()[:, None] for side in (-slack, slack))
    # Comparing into floats and adding up takes a quarter of the time of doing it with booleans.
    not_ahead = torch.le(scores, high, out=buffers[0]).sum(dim=1)
    behind = torch.lt(scores, low, out=buffers[1]).sum(dim=1)
    ahead, tied = scores.shape[1] - not_ahead, torch.zeros_like(behind)
    user = (not_ahead > behind).nonzero()[:, 0]
    if len(user):
        near = buffers[0].sub_(buffers[1])
        item = near.sum(dim=0).nonzero()[:, 0]
        pairs = user[:, None], item  # [users, items]; `near` marks the undecided ones
        near = (near[pairs] > 0) & (scores[pairs] > -torch.inf)
        exact, of_target = z[user].double() @ rows[item].double().T, target[user, None]
        ahead[user] += (near & ~(exact <= of_target)).sum(dim=1)
        tied[user] += (near & (exact == of_target)).sum(dim=1)
    return ahead, tied


def count_pairs_ahead(
    z: Tensor,
    rows: Tensor,
    user: Tensor,
    item: Tensor,
    target: Tensor,
    sizes: tuple[int, ...],
    bias: Sequence[float],
) -> Tensor:
    """Count, of given pairs (user, item) [P], those whose exact score plus the size's bias is ahead of the user's
    target, and those that tie with it: [M, 2, B] float32.

    z: [B, D] and rows: [C, D or wider] on the grid; target: [M, B] float64. The bias is added in float64 to an exact
    score, so the sum has the same bits in every batch and chunk.
    """
    products = z[user].double() * rows[item, : z.shape[1]].double()
    counts = z.new_zeros(len(sizes), 2, len(z))
    for count, of_target, m, b in zip(counts, target, sizes, bias, strict=True):
        exact, of_target = products[:, :m].sum(dim=1) + b, of_target[user]
        count[0].index_add_(0, user, (~(exact <= of_target)).float())
        count[1].index_add_(0, user, (exact == of_target).float())
    return counts


# -------------------------------------------------------------------------------------------------------------- metrics
# Recall, NDCG and MRR of full rankings, as exact means over users. B users, N items.


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the rank, from 1, of each user's target among all scores: [B, N+1], [B] -> [B] float.

    The plain twin of `rank_targets`, for scores that are all there at once. Items with the
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
