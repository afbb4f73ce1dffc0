"""Exact scores: the same bits in every batch, chunk and process.

A float32 product of matrices rounds differently in other shapes, so two computations of one score can differ. Here all
vectors are rounded to a grid first, so coarse that float64 adds up their products without any rounding, in any order:

    score(u, i) = z_u · E_i         z_u, E_i: rounded to 22 bits of their largest value (21 beyond 512 dimensions)

That is as fine as float32 products round. Float32 products then decide all comparisons but the few whose scores lie
within the error bound of float32; exact scores decide those. B users, C items, m dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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

    z: [B, D] and rows: [C, D] on the grid; target: [M, B] float64. The bias is added in float64 to an exact score, so
    the sum has the same bits in every batch and chunk.
    """
    products = z[user].double() * rows[item].double()
    counts = z.new_zeros(len(sizes), 2, len(z))
    for count, of_target, m, b in zip(counts, target, sizes, bias, strict=True):
        exact, of_target = products[:, :m].sum(dim=1) + b, of_target[user]
        count[0].index_add_(0, user, (~(exact <= of_target)).float())
        count[1].index_add_(0, user, (exact == of_target).float())
    return counts
