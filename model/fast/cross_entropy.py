"""The fast twin of `model.loss.matryoshka_cross_entropy_plain`: shared logits, in chunks, with their gradients.

Sizes share their logits: logits(M[j]) = logits(M[j-1]) + z[:, M[j-1]:M[j]] E[:, M[j-1]:M[j]]ᵀ, so all sizes together
cost one multiplication of width D.

An item table that is a product E = F Wᵀ need not be multiplied out: for a wide increment and few positions, (z W) Fᵀ
costs less than z (F Wᵀ)ᵀ. T positions (C in a chunk), N items, F feature width, D largest size.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.extensions.objective import Objective
from model.fast.context import Context
from model.fast.logits import add_product, bias_gradient, residuals_, reused_buffer, row_chunks
from model.items import Factors
from model.sizes import increments


def cross_entropy_sum(
    z: Tensor, item_table: Tensor | Factors, labels: Tensor, sizes: tuple[int, ...], objective: Objective
) -> Tensor:
    """Return the cross-entropy summed over sizes and positions; arguments as in model/loss.py.

    Plain twin: `model.loss.matryoshka_cross_entropy_plain`. The forward pass computes the gradients chunk by chunk, so
    that the logits of a batch are never in memory at once.
    """
    features, weight, V = item_table if isinstance(item_table, Factors) else (None, item_table, None)
    learned = objective.log_scale, objective.history_bias
    return _CrossEntropySum.apply(z, weight, V, *learned, features, labels, sizes, objective)


class _CrossEntropySum(torch.autograd.Function):
    """The first `out` columns of the item table are multiplied out, the others stay a product."""

    @staticmethod
    def forward(
        ctx: Context,
        z: Tensor,
        weight: Tensor,
        V: Tensor | None,
        log_scale: Tensor | None,  # objective.log_scale, an argument of its own to receive a gradient
        history_bias: Tensor | None,  # objective.history_bias, likewise
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
        z_narrow = (z * valid).to(narrow)  # a position without a label has logits of 0, and no gradient

        loss = torch.zeros((), dtype=wide, device=z.device)
        grad_z = torch.empty_like(z, dtype=wide)
        # Transposed, as the products come: transposing a residual costs as much as multiplying it.
        grad_table = torch.zeros(table.shape[::-1], dtype=wide, device=z.device)  # [out, N+1]
        grad_rest = torch.zeros_like(rest, dtype=wide)
        grad_V = None if V is None else torch.empty_like(V, dtype=wide)
        scale, grad_log_scale, grad_bias = objective.scale(loss), *loss.new_zeros(2, len(sizes))
        bias = None
        if history_bias is not None and objective.history is not None:
            history = objective.history * valid  # [T, L]
            bias, seen = history_bias.detach().to(wide), (history > 0).to(wide)
            label_seen = ((history == labels[:, None]) & valid).any(dim=1).to(wide)  # [T]

        chunks = row_chunks(len(z), len(sizes) * len(table) * wide.itemsize, z.device)
        buffer = reused_buffer((len(sizes) + 2, chunks[0].stop, len(table)), wide, z.device)
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
                if bias is not None:
                    of_seen = (residual.gather(1, history[rows]).exp() * seen[rows]).sum(dim=1)
                    grad_bias[j] += bias_gradient(of_seen, label_seen[rows], bias[j])
            spares = logits, spare
            residuals_(residuals, label, valid[rows], objective.distill, scale, spares, loss, grad_log_scale)
            # An increment's logits are part of its own and every larger size's logits: its gradient sums theirs.
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
                        else:  # the first chunk writes: filling so large a tensor with zeros first would cost time
                            grad_V[:, low:high] = residual.T @ z_part

        if features is None:
            grad_weight = grad_table.T.contiguous()  # [N+1, D]
        else:
            grad_weight = torch.cat([(grad_table.to(narrow) @ features).to(wide), grad_rest])  # [D, F]
        if V is not None and grad_V is not None:
            grad_V[:, :out] = grad_table[:embedded].T
            grad_V = grad_V.to(V.dtype)
        grad_z, grad_weight = grad_z.mul_(valid).to(z.dtype), grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_z, grad_weight, grad_V, grad_log_scale, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_V: Tensor | None
        grad_z, grad_weight, grad_V, *learned = ctx.saved_tensors
        by_V = None if grad_V is None else grad_V.mul_(grad)  # in place: it is large; torch refuses a second backward
        by_learned = (g * grad if n else None for g, n in zip(learned, ctx.needs_input_grad[3:5], strict=True))
        return grad_z * grad, grad_weight * grad, by_V, *by_learned, None, None, None, None


def columns_multiplied_out(num_positions: int, num_features: int, sizes: tuple[int, ...], embedded: int = 0) -> int:
    """Return the number of the item table's columns that are cheaper multiplied out: 0 or a size.

    Counted in multiplications per item. A column multiplied out costs 2 F (itself and its weight's gradient) and 3 T
    (its logits and their gradients). An increment left as a product costs 2 F T whatever its width. A column with a V
    (the first `embedded`) costs 3 T either way.
    """

    def cost(out: int) -> int:
        products = sum(high > out for _, high in increments(sizes))
        columns = max(out, embedded)
        return out * 2 * num_features + columns * 3 * num_positions + products * 2 * num_features * num_positions

    return min((0, *sizes), key=cost)
