"""What the fast cross-entropies share: chunks of positions, reused memory, and gradients by the logits.

T positions (C in a chunk), K logits of each, M sizes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 2**26  # of the logits in memory at once, for all sizes: 128 positions of 12,101 items and 8 sizes
GPU_SHARE = 32  # on a GPU the logits may take this part of its memory: fewer chunks, larger products
ABSENT = -1e30  # the logit of an excluded candidate: its probability is 0, and 0 times this is still 0
LEAST = 16  # fewest positions in memory at once, whatever they take: every chunk reads the whole item table


def row_chunks(num_positions: int, bytes_a_position: int, device: torch.device) -> list[slice]:
    """Return the positions of each chunk: a power of two of them, so that chunks have few shapes."""
    limit = CHUNK_BYTES
    if device.type == "cuda":
        limit = max(limit, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)
    size = min(num_positions, 2 ** (max(LEAST, limit // bytes_a_position).bit_length() - 1))
    return [slice(start, start + size) for start in range(0, num_positions, size)]


def bias_gradient(of_seen: Tensor, label_seen: Tensor, bias: Tensor) -> Tensor:
    """Return the gradient of a size's cross-entropy by its history bias b, a scalar, with the logits held fixed.

    of_seen: [C], the probability of a position's history items without b, 0 where there is no label; label_seen: [C],
    1 where the label is one of them. Plain twin: `losses_plain` of model/extensions/objective.py.
    """
    return (torch.sigmoid(torch.logit(of_seen.clamp(0, 1)) + bias) - label_seen).sum()


_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def reused_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory, the same in every call on a CPU.

    A new allocation on a CPU is mapped page by page each time. On a GPU torch caches memory itself, and a CUDA graph
    must own what it writes to, which a larger call would free.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size, buffer = math.prod(shape), _buffers.get((device, dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # training cannot write to a tensor made in inference mode
            buffer = _buffers[device, dtype] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a b, in place; total may have a wider dtype than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def residuals_(
    log_ps: Sequence[Tensor],
    label: Tensor,
    valid: Tensor,
    distill: float,
    scale: Tensor | None,
    spare: tuple[Tensor, Tensor],
    loss: Tensor,
    grad_log_scale: Tensor,
    offset: Tensor | None = None,
) -> None:
    """Turn log p_m [C, K] of every size, in place, into the gradient s_m (p_m - target_m) by its unscaled logits.

    The loss, summed over sizes and positions, is added to `loss`, and its gradient by log s to `grad_log_scale` [M].
    Symbols and plain twin (`losses_plain`): model/extensions/objective.py.

    label: [C, 1], a column; valid: [C, 1], false at a position without a label, whose logits must be 0. distill: x;
    scale: s [M], None for 1. spare: two [C, K] of any content. offset: [C, K], was added to the scaled logits, or None.
    """
    p_largest, residual = spare
    if distill:
        torch.exp(log_ps[-1], out=p_largest).mul_(valid)
    for j, log_p in enumerate(log_ps):
        x = distill if j < len(log_ps) - 1 else 0.0
        loss -= (1 - x) * (log_p.gather(1, label) * valid).sum()
        if x:
            loss -= x * p_largest.flatten().dot(log_p.flatten())
        # A position's residuals sum to 0, so below log p may replace the scaled logits, which differ by a constant.
        of_size = torch.exp(log_p, out=log_p if scale is None else residual)
        of_size.scatter_add_(1, label, x * valid.to(log_p.dtype) - 1)
        if x:
            of_size.sub_(p_largest, alpha=x)
        if scale is not None:
            grad_log_scale[j] += of_size.flatten().dot(log_p.flatten())
            if offset is not None:
                grad_log_scale[j] -= of_size.flatten().dot(offset.flatten())
            torch.mul(of_size, scale[j], out=log_p)
