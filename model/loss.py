"""The Matryoshka cross-entropy (section 3.4 of the paper): one cross-entropy over the whole catalogue per size.

    loss = 1/|M| Σ_m CE(softmax(z[:, :m] E[:, :m]ᵀ), label)

Sizes share their logits, logits(M[j]) = logits(M[j-1]) + z[:, M[j-1]:M[j]] E[:, M[j-1]:M[j]]ᵀ, so all sizes together
cost one multiplication of size D. An item table that is a product, E = F Wᵀ + b, need not be multiplied out: where an
increment is wide and positions are few, (z W) Fᵀ costs less than z (F Wᵀ)ᵀ. T labelled positions, N items, F feature
width, D largest size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.extensions.objective import CROSS_ENTROPY, Objective, losses_plain, residuals_
from model.fmrl import Context, increments

CHUNK_BYTES = 2**26  # of the logits that are held at once, for all sizes: 128 positions of 12,101 items and 8 sizes
LEAST = 16  # positions that are, even if their logits take more: every chunk reads the whole table


class Factors(NamedTuple):
    """An item table E = features weightᵀ + bias, or that and V, which is not multiplied out. The bias adds the same to
    all logits of a position, which no softmax notices, so it is left out."""

    features: Tensor  # [N+1, F], frozen, in the type that products are computed in
    weight: Tensor  # [D, F]
    embedding: Tensor | None = None  # V [N+1, K] of the first K dimensions, K a size


def matryoshka_cross_entropy_plain(
    z: Tensor,
    item_table: Tensor,
    labels: Tensor,
    sizes: tuple[int, ...],
    reduction: str = "mean",
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """The plain twin of `matryoshka_cross_entropy`: a cross_entropy per size, with the item table multiplied out."""
    z, wide = z.to(item_table.dtype), torch.promote_types(item_table.dtype, torch.float32)
    logits = [(z[:, :m] @ item_table[:, :m].T).to(wide) for m in sizes]
    losses = losses_plain(logits, labels, labels > 0, objective)
    return losses.mean() if reduction == "mean" else losses.sum()


def matryoshka_cross_entropy(
    z: Tensor,
    item_table: Tensor | Factors,
    labels: Tensor,
    sizes: tuple[int, ...],
    reduction: str = "mean",
    count: Tensor | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """The loss, a scalar: over sizes the mean or the sum (`reduction`), over positions the mean.

    z: [T, D]; item_table: [N+1, D], or its factors; row 0 (begin of sequence) takes part in the softmax as in the
    released code; labels: [T], 0 at a position without one; count: the number of labels to average over where others
    hold a share of them; objective: by default the paper's. The gradients are computed on the way, chunk by chunk, so
    that the logits of a batch are never held. Products are computed in the item table's type, sums and the softmax in
    float32 at least. Raises ValueError where the sizes do not end at D, or for another reduction.
    """
    check(z, sizes, reduction)
    features, weight, V = item_table if isinstance(item_table, Factors) else (None, item_table, None)
    if count is None:
        count = labels.count_nonzero()
    total = _MatryoshkaCrossEntropy.apply(z, weight, V, objective.log_scale, features, labels, sizes, objective)
    return total / count / (len(sizes) if reduction == "mean" else 1)


def check(z: Tensor, sizes: tuple[int, ...], reduction: str) -> None:
    """Raise ValueError for what neither loss can be computed of."""
    if sizes[-1] != z.shape[1]:
        raise ValueError(f"the largest of the sizes {sizes} is not the width {z.shape[1]} of z")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither 'mean' nor 'sum'")


class _MatryoshkaCrossEntropy(torch.autograd.Function):
    """The sum over sizes and positions. The first columns of the item table are multiplied out, the rest are not."""

    @staticmethod
    def forward(
        ctx: Context,
        z: Tensor,
        weight: Tensor,
        V: Tensor | None,
        log_scale: Tensor | None,  # that of the objective, here to have a gradient
        features: Tensor | None,
        labels: Tensor,
        sizes: tuple[int, ...],
        objective: Objective,
    ) -> Tensor:
        narrow = (weight if features is None else features).dtype
        wide = torch.promote_types(narrow, torch.float32)
        out, embedded = sizes[-1], 0 if V is None else V.shape[1]
        if features is not None:
            out = columns_multiplied_out(len(z), features.shape[1], sizes, embedded)
        table = weight if features is None else features @ weight[:out].to(narrow).T  # [N+1, out]
        rest = weight[:0] if features is None else weight[out:].to(narrow)  # [D - out, F]
        if V is not None:
            narrow_V = V.to(narrow)
            table[:, :embedded] += narrow_V[:, :out]
        valid = (labels != 0)[:, None]  # [T, 1]
        z_narrow = (z * valid).to(narrow)  # a position without a label has equal logits, and no gradient

        loss = torch.zeros((), dtype=wide, device=z.device)
        grad_z = torch.empty_like(z, dtype=wide)
        # Transposed, as its products come: turning a residual costs as much as multiplying it.
        grad_table = torch.zeros(table.shape[::-1], dtype=wide, device=z.device)  # [out, N+1]
        grad_rest = torch.zeros_like(rest, dtype=wide)
        grad_V = None if V is None else torch.empty_like(V, dtype=wide)
        scale, grad_log_scale = objective.scale(loss), loss.new_zeros(len(sizes))

        chunks = row_chunks(len(z), len(sizes) * len(table) * wide.itemsize)
        buffer = held_buffer((len(sizes) + 2, chunks[0].stop, len(table)), wide, z.device)
        for rows in chunks:
            z_chunk, label = z_narrow[rows], labels[rows][:, None]  # [C, D], [C, 1]
            logits, *residuals, spare = buffer[:, : len(label)]  # each [C, N+1]; a size's residual: softmax - target
            logits.zero_()
            for j, ((low, high), residual) in enumerate(zip(increments(sizes), residuals, strict=True)):
                if features is None or high <= out:
                    add_product(logits, z_chunk[:, low:high], table[:, low:high].T)
                else:
                    add_product(logits, z_chunk[:, low:high] @ rest[low - out : high - out], features.T)
                    if high <= embedded:
                        add_product(logits, z_chunk[:, low:high], narrow_V[:, low:high].T)
                scaled = logits if scale is None else torch.mul(logits, scale[j], out=spare)
                torch.log_softmax(scaled, dim=1, out=residual)
            spares = logits, spare
            residuals_(residuals, label, valid[rows], objective.distill, scale, spares, loss, grad_log_scale)
            # A logit of an increment is part of every size from there on: its gradient is the sum of theirs.
            above = None
            for low, high in reversed(increments(sizes)):
                residual = residuals.pop()
                above = residual if above is None else residual.add_(above)
                residual, z_part = residual.to(narrow), z_chunk[:, low:high]
                if features is None or high <= out:
                    grad_z[rows, low:high] = residual @ table[:, low:high]
                    add_product(grad_table[low:high], z_part.T, residual)
                else:
                    grad_left = residual @ features  # [C, F]
                    grad_z[rows, low:high] = grad_left @ rest[low - out : high - out].T
                    add_product(grad_rest[low - out : high - out], z_part.T, grad_left)
                    if grad_V is not None and high <= embedded:
                        grad_z[rows, low:high] += residual @ narrow_V[:, low:high]
                        if rows.start:
                            add_product(grad_V[:, low:high], residual.T, z_part)
                        else:  # nothing there yet: as large as it is, filling it with zeros would cost, too
                            grad_V[:, low:high] = residual.T @ z_part

        if features is None:
            grad_weight = grad_table.T.contiguous()  # [N+1, D]
        else:
            grad_weight = torch.cat([(grad_table.to(narrow) @ features).to(wide), grad_rest])  # [D, F]
        if V is not None and grad_V is not None:
            grad_V[:, :out] = grad_table[:embedded].T
            grad_V = grad_V.to(V.dtype)
        grad_z, grad_weight = grad_z.mul_(valid).to(z.dtype), grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_z, grad_weight, grad_V, grad_log_scale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_V: Tensor | None
        grad_z, grad_weight, grad_V, grad_log_scale = ctx.saved_tensors
        by_V = None if grad_V is None else grad_V.mul_(grad)  # in place: it is the largest; torch refuses a second time
        by_log_scale = grad_log_scale * grad if ctx.needs_input_grad[3] else None
        return grad_z * grad, grad_weight * grad, by_V, by_log_scale, None, None, None, None


def columns_multiplied_out(num_positions: int, num_features: int, sizes: tuple[int, ...], embedded: int = 0) -> int:
    """How many columns of the item table are cheaper multiplied out, by the multiplications per item: 2 F a column for
    it and its weight's gradient, and 3 T for its logits and their gradients; an increment left as a product takes 2 F T
    whatever its width, and in the first `embedded`, which have a V, its logits' 3 T a column all the same. One of 0 and
    `sizes`.
    """

    def cost(out: int) -> int:
        products = sum(high > out for _, high in increments(sizes))
        columns = max(out, embedded)
        return out * 2 * num_features + columns * 3 * num_positions + products * 2 * num_features * num_positions

    return min((0, *sizes), key=cost)


def row_chunks(num_positions: int, bytes_a_position: int) -> list[slice]:
    """The positions whose logits are held at once: a power of two of them, so that chunks come in few shapes."""
    size = min(num_positions, 2 ** (max(LEAST, CHUNK_BYTES // bytes_a_position).bit_length() - 1))
    return [slice(start, start + size) for start in range(0, num_positions, size)]


_held: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def held_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of any content. On a CPU it is kept from call to call: that of a new allocation is mapped page by page
    each time. On a GPU torch keeps it, and a CUDA graph must own what it writes to: here a larger call frees it."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size, held = math.prod(shape), _held.get((device, dtype))
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # or training could not write to what an evaluation made
            held = _held[device, dtype] = torch.empty(size, dtype=dtype, device=device)
    return held[:size].view(shape)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in place; total may be of a wider type than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
