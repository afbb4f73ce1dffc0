"""The Matryoshka cross-entropy (section 3.4 of the paper): one cross-entropy over the whole catalogue per size.

    loss = Σ_m CE(softmax(z[:, :m] E[:, :m]ᵀ), label)            averaged over positions; over sizes the sum or the mean

T positions, N items, D largest size.

A loss is a function (z, item_table, labels, sizes, *, reduction, count, objective) -> scalar, and LOSSES names the
losses that `--loss` offers:

    z           [T, D]        the encoded histories
    item_table  [N+1, D]      the item table, or its Factors (model/items.py); row 0 (begin of sequence) takes part in
                              the softmax, as in the released code
    labels      [T]           the next items; 0: none
    sizes                     the nested sizes; the last one is D
    reduction                 over sizes: "mean" or "sum"
    count       scalar        the number of labels to average over, if other processes hold a share of them; None: these
    objective                 options beyond the paper (model/extensions/objective.py)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.extensions.objective import CROSS_ENTROPY, Objective, contains, losses_plain
from model.fast import cross_entropy_sum
from model.items import Factors


def matryoshka_cross_entropy_plain(
    z: Tensor,
    item_table: Tensor | Factors,
    labels: Tensor,
    sizes: tuple[int, ...],
    *,
    reduction: str = "sum",
    count: Tensor | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """Compute the loss as the equation says, with all logits in memory. The plain twin: edit it to try an idea."""
    check(z, sizes, reduction)
    E = item_table.table() if isinstance(item_table, Factors) else item_table
    z, wide = z.to(E.dtype), torch.promote_types(E.dtype, torch.float32)
    logits = [(z[:, :m] @ E[:, :m].T).to(wide) for m in sizes]
    seen = None if objective.history is None else contains(objective.history, len(E))  # [T, N+1]
    losses = losses_plain(
        logits, labels, labels > 0, objective, 0.0 if objective.prior is None else objective.prior, seen
    )
    return average(losses.sum(), labels, sizes, reduction, count)


def matryoshka_cross_entropy(
    z: Tensor,
    item_table: Tensor | Factors,
    labels: Tensor,
    sizes: tuple[int, ...],
    *,
    reduction: str = "sum",
    count: Tensor | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """Compute the loss chunk by chunk, gradients included. The fast twin.

    Products have the item table's dtype; sums and the softmax have at least float32. Raises ValueError if the sizes do
    not end at D, and for another reduction.
    """
    check(z, sizes, reduction)
    return average(cross_entropy_sum(z, item_table, labels, sizes, objective), labels, sizes, reduction, count)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "fast": matryoshka_cross_entropy,
    "plain": matryoshka_cross_entropy_plain,
}


def check(z: Tensor, sizes: tuple[int, ...], reduction: str) -> None:
    """Raise ValueError if the sizes do not end at the width of z, or the reduction is unknown."""
    if sizes[-1] != z.shape[1]:
        raise ValueError(f"the largest of the sizes {sizes} is not the width {z.shape[1]} of z")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither 'mean' nor 'sum'")


def average(total: Tensor, labels: Tensor, sizes: tuple[int, ...], reduction: str, count: Tensor | None) -> Tensor:
    """Divide a sum over positions and sizes by the number of labels and, if reduction is "mean", of sizes."""
    if count is None:
        count = labels.count_nonzero()
    return total / count / (len(sizes) if reduction == "mean" else 1)
