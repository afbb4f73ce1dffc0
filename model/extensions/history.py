"""A learned bias for the items of a user's own history, beyond the paper: do people buy again?

    score of item i at size m:  s_m (z[:m] · E[i, :m]) + b_m [i in history]

s_m is the learned scale (model/extensions/objective.py). b_m is trained by the same cross-entropy with the logits held
fixed, so it falls far below 0 if nobody buys an item twice, and no other weight depends on it. A ranking leaves s_m
out, so it adds b_m / s_m. In training a position's history is all items of its row up to its own token; in evaluation
it is the complete history, also beyond lru_max_len.

T positions, L the longest history of a batch, M sizes, D the largest.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.sizes import increments

TIMES = 100  # b = TIMES p: AdamW moves a parameter p by about the learning rate per step, and b must reach -10
BLOCK = 64  # positions whose histories are scored in one product


def learned_bias(parameter: Tensor) -> Tensor:
    """Return b = TIMES p [M], with the gradient by b as the gradient by p.

    AdamW does not depend on the gradient's scale, but clipping does: TIMES the gradient would dominate the norm.
    """
    return parameter + ((TIMES - 1) * parameter).detach()


def ranking_bias(parameter: Tensor, log_scale: Tensor | None) -> list[float]:
    """Return b_m / s_m of every size, computed one by one so that a slice has the same numbers."""
    scales = torch.zeros_like(parameter) if log_scale is None else log_scale
    return [TIMES * p / math.exp(s) for p, s in zip(parameter.tolist(), scales.tolist(), strict=True)]


def history_items(tokens: Tensor, position: Tensor, longest: int) -> Tensor:
    """Return the distinct items that each position has read, [T, L]; 0 where there is none.

    Column L - 1 is the position's own token, L - 2 the token before, and so on. An item that occurs twice is at its
    first place. tokens, position: [T], as of `SequenceModel.encode`; longest: L or more.
    """
    steps_back = torch.arange(longest - 1, -1, -1, device=tokens.device)
    items = _windows(tokens, longest) * (steps_back <= position[:, None])
    first = (items[:, :-1] != tokens[:, None]).all(dim=1)
    return items * _windows(first, longest)


def _windows(x: Tensor, length: int) -> Tensor:
    """Return row t's own and the length - 1 values before it: [T] -> [T, length]."""
    return F.pad(x, (length - 1, 0)).unfold(0, length, 1)


def contains(history: Tensor, num_tokens: int) -> Tensor:
    """Return [T, num_tokens]: whether each token is in the history [T, L]."""
    seen = torch.zeros(len(history), num_tokens, dtype=torch.bool, device=history.device)
    seen.scatter_(1, history, True)
    seen[:, 0] = False
    return seen


def history_logits_plain(z: Tensor, x: Tensor, longest: int, sizes: tuple[int, ...]) -> Tensor:
    """Return z_t · x_s of the tokens s in the columns of `history_items`, for each increment of the sizes: [M, T, L].

    z, x: [T, D], what the positions predict with and the embeddings of their tokens.
    """
    windows = F.pad(x, (0, 0, longest - 1, 0)).unfold(0, longest, 1)  # [T, D, L]
    return torch.stack([(z[:, low:high, None] * windows[:, low:high]).sum(dim=1) for low, high in increments(sizes)])


def history_logits(z: Tensor, x: Tensor, longest: int, sizes: tuple[int, ...]) -> Tensor:
    """Compute `history_logits_plain` by one product per BLOCK positions and the tokens that they may have read."""
    blocks = -(-len(z) // BLOCK)
    rest, reach = blocks * BLOCK - len(z), BLOCK + longest - 1
    z = F.pad(z, (0, 0, 0, rest)).unflatten(0, (blocks, BLOCK))  # [blocks, BLOCK, D]
    x = F.pad(x, (0, 0, longest - 1, rest)).unfold(0, reach, BLOCK)  # [blocks, D, reach]
    column = torch.arange(longest, device=z.device) + torch.arange(BLOCK, device=z.device)[:, None]
    widths = [high - low for low, high in increments(sizes)]
    products = torch.stack([a @ b for a, b in zip(z.split(widths, dim=2), x.split(widths, dim=1), strict=True)])
    column = column.expand(*products.shape[:-1], longest)
    return products.gather(-1, column).flatten(1, 2)[:, : blocks * BLOCK - rest]
