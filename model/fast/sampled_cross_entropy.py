"""The fast twin of `model.extensions.sampled_loss.sampled_matryoshka_cross_entropy_plain`: shared logits, in chunks.

T positions (C in a chunk), K draws, L history items of each, M sizes, D largest size.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.extensions.objective import Objective
from model.fast.context import Context
from model.fast.logits import ABSENT, add_product, bias_gradient, residuals_, reused_buffer, row_chunks
from model.sizes import increments


def sampled_cross_entropy_sum(
    z: Tensor,
    own: Tensor,
    drawn: Tensor,
    of_history: Tensor | None,
    items: Tensor,
    log_kq: Tensor,
    labels: Tensor,
    sizes: tuple[int, ...],
    objective: Objective,
) -> Tensor:
    """Return the sampled cross-entropy summed over sizes and positions.

    Plain twin: `model.extensions.sampled_loss.sampled_matryoshka_cross_entropy_plain`, where Sample describes own,
    drawn, items and log_kq. of_history: [M, T, L], each increment's logits of `objective.history`; None without it.
    """
    learned = of_history, objective.log_scale, objective.history_bias
    return _SampledCrossEntropySum.apply(z, own, drawn, *learned, labels, items, log_kq, sizes, objective)


def _excluded(items: Tensor, candidates: Tensor) -> Tensor:
    """Return [C, K], 1 where a draw of `items` [K] is among the position's candidates [C, n], else 0; 0: none."""
    ordered = items.sort().values
    first = torch.searchsorted(ordered, items)  # equal draws share a column
    place = torch.searchsorted(ordered, candidates).clamp_max(len(items) - 1)
    place = torch.where(ordered[place] == candidates, place, len(items))
    found = torch.zeros(len(candidates), len(items) + 1, device=items.device)
    return found.scatter_(1, place, 1.0).index_select(1, first)


class _SampledCrossEntropySum(torch.autograd.Function):
    """Column 0 of the logits is a position's label, column k its k-th draw; then come its history items."""

    @staticmethod
    def forward(
        ctx: Context,
        z: Tensor,
        own: Tensor,
        drawn: Tensor,
        of_history: Tensor | None,
        log_scale: Tensor | None,  # objective.log_scale, an argument of its own to receive a gradient
        history_bias: Tensor | None,  # objective.history_bias, likewise
        labels: Tensor,
        items: Tensor,
        log_kq: Tensor,
        sizes: tuple[int, ...],
        objective: Objective,
    ) -> Tensor:
        narrow, wide, draws = drawn.dtype, torch.promote_types(drawn.dtype, torch.float32), 1 + len(drawn)
        valid = (labels != 0)[:, None]
        z = z * valid  # a position without a label has logits of 0, and no gradient
        z_wide, own_wide, z_narrow = z.to(wide), own.to(wide), z.to(narrow)
        loss = torch.zeros((), dtype=wide, device=z.device)
        grad_z, grad_own = torch.empty_like(z, dtype=wide), torch.empty_like(own, dtype=wide)
        grad_drawn = torch.zeros_like(drawn, dtype=wide)

        scale, grad_log_scale, grad_bias = objective.scale(loss), *loss.new_zeros(2, len(sizes))
        columns, bias, grad_of_history = draws, None, None
        if of_history is not None and history_bias is not None and objective.history is not None:
            columns, bias = draws + of_history.shape[2], history_bias.detach().to(wide)
            grad_of_history = torch.empty_like(of_history)
            history, own_history = objective.history * valid, objective.history == labels[:, None]  # [T, L]
            label_seen = (own_history & valid).any(dim=1).to(wide)  # [T]
        chunks = row_chunks(len(z), len(sizes) * columns * wide.itemsize, z.device)
        buffer = reused_buffer((len(sizes) + 3, chunks[0].stop, columns), wide, z.device)
        for rows in chunks:
            # Each [C, 1+K+L]; a size's residual: softmax - target; the offset is added to the scaled logits.
            logits, *residuals, offset, spare = buffer[:, : len(z[rows])]
            logits.zero_()
            offset[:, 0] = 0
            if bias is None:
                offset[:, 1:] = torch.where(labels[rows, None] == items, ABSENT, -log_kq)
            else:
                candidates = torch.cat([labels[rows, None], history[rows]], dim=1)
                torch.mul(_excluded(items, candidates), ABSENT, out=offset[:, 1:draws]).sub_(log_kq)
                offset[:, draws:] = ABSENT * ((history[rows] == 0) | own_history[rows])
            for j, ((low, high), residual) in enumerate(zip(increments(sizes), residuals, strict=True)):
                logits[:, 0] += (z_wide[rows, low:high] * own_wide[rows, low:high]).sum(dim=1)
                add_product(logits[:, 1:draws], z_narrow[rows, low:high], drawn[:, low:high].T)
                if of_history is not None:
                    logits[:, draws:] += of_history[j, rows]
                torch.mul(logits, 1 if scale is None else scale[j], out=spare).add_(offset)
                torch.log_softmax(spare, dim=1, out=residual)
                if bias is not None and grad_bias is not None:
                    of_seen = residual[:, draws:].exp().sum(dim=1) + residual[:, 0].exp() * label_seen[rows]
                    grad_bias[j] += bias_gradient(of_seen, label_seen[rows], bias[j])
            column, spares = torch.zeros_like(labels[rows, None]), (logits, spare)
            residuals_(residuals, column, valid[rows], objective.distill, scale, spares, loss, grad_log_scale, offset)
            # An increment's logits are part of its own and every larger size's logits: its gradient sums theirs.
            above = None
            for low, high in reversed(increments(sizes)):
                residual = residuals.pop()
                above = residual if above is None else residual.add_(above)
                of_label, of_drawn = above[:, :1], above[:, 1:draws].to(narrow)
                grad_z[rows, low:high] = of_drawn @ drawn[:, low:high]
                grad_z[rows, low:high] += of_label * own_wide[rows, low:high]
                grad_own[rows, low:high] = of_label * z_wide[rows, low:high]
                add_product(grad_drawn[:, low:high], of_drawn.T, z_narrow[rows, low:high])
                if grad_of_history is not None:
                    grad_of_history[len(residuals), rows] = above[:, draws:]

        gradients = (grad_z.mul_(valid), z), (grad_own.mul_(valid), own), (grad_drawn, drawn)
        learned = grad_of_history, grad_log_scale, grad_bias
        ctx.save_for_backward(*(gradient.to(of.dtype) for gradient, of in gradients), *learned)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(part * grad if needed else None for part, needed in gradients), None, None, None, None, None
