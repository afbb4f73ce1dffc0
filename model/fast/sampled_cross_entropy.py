"""The fast twin of `model.extensions.sampled_loss.sampled_matryoshka_cross_entropy_plain`: shared logits, in chunks.

T positions (C in a chunk), K draws, D largest size.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.extensions.objective import Objective
from model.fast.context import Context
from model.fast.logits import ABSENT, add_product, residuals_, reused_buffer, row_chunks
from model.sizes import increments


def sampled_cross_entropy_sum(
    z: Tensor,
    own: Tensor,
    drawn: Tensor,
    items: Tensor,
    log_kq: Tensor,
    labels: Tensor,
    sizes: tuple[int, ...],
    objective: Objective,
) -> Tensor:
    """Return the sampled cross-entropy summed over sizes and positions.

    Plain twin: `model.extensions.sampled_loss.sampled_matryoshka_cross_entropy_plain`, where Sample describes own,
    drawn, items and log_kq.
    """
    return _SampledCrossEntropySum.apply(z, own, drawn, objective.log_scale, labels, items, log_kq, sizes, objective)


class _SampledCrossEntropySum(torch.autograd.Function):
    """Column 0 of the logits is a position's label, column k its k-th draw."""

    @staticmethod
    def forward(
        ctx: Context,
        z: Tensor,
        own: Tensor,
        drawn: Tensor,
        log_scale: Tensor | None,  # objective.log_scale, an argument of its own to receive a gradient
        labels: Tensor,
        items: Tensor,
        log_kq: Tensor,
        sizes: tuple[int, ...],
        objective: Objective,
    ) -> Tensor:
        narrow, wide = drawn.dtype, torch.promote_types(drawn.dtype, torch.float32)
        valid = (labels != 0)[:, None]
        z = z * valid  # a position without a label has logits of 0, and no gradient
        z_wide, own_wide, z_narrow = z.to(wide), own.to(wide), z.to(narrow)
        loss = torch.zeros((), dtype=wide, device=z.device)
        grad_z, grad_own = torch.empty_like(z, dtype=wide), torch.empty_like(own, dtype=wide)
        grad_drawn = torch.zeros_like(drawn, dtype=wide)

        scale, grad_log_scale = objective.scale(loss), loss.new_zeros(len(sizes))
        chunks = row_chunks(len(z), len(sizes) * (len(drawn) + 1) * wide.itemsize, z.device)
        buffer = reused_buffer((len(sizes) + 3, chunks[0].stop, len(drawn) + 1), wide, z.device)
        for rows in chunks:
            # Each [C, K+1]; a size's residual: softmax - target; the offset is added to the scaled logits.
            logits, *residuals, offset, spare = buffer[:, : len(z[rows])]
            logits.zero_()
            offset[:, 0] = 0
            offset[:, 1:] = torch.where(labels[rows, None] == items, ABSENT, -log_kq)
            for j, ((low, high), residual) in enumerate(zip(increments(sizes), residuals, strict=True)):
                logits[:, 0] += (z_wide[rows, low:high] * own_wide[rows, low:high]).sum(dim=1)
                add_product(logits[:, 1:], z_narrow[rows, low:high], drawn[:, low:high].T)
                torch.mul(logits, 1 if scale is None else scale[j], out=spare).add_(offset)
                torch.log_softmax(spare, dim=1, out=residual)
            column, spares = torch.zeros_like(labels[rows, None]), (logits, spare)
            residuals_(residuals, column, valid[rows], objective.distill, scale, spares, loss, grad_log_scale, offset)
            # An increment's logits are part of its own and every larger size's logits: its gradient sums theirs.
            above = None
            for low, high in reversed(increments(sizes)):
                residual = residuals.pop()
                above = residual if above is None else residual.add_(above)
                of_label, of_drawn = above[:, :1], above[:, 1:].to(narrow)
                grad_z[rows, low:high] = of_drawn @ drawn[:, low:high]
                grad_z[rows, low:high] += of_label * own_wide[rows, low:high]
                grad_own[rows, low:high] = of_label * z_wide[rows, low:high]
                add_product(grad_drawn[:, low:high], of_drawn.T, z_narrow[rows, low:high])

        gradients = (grad_z.mul_(valid), z), (grad_own.mul_(valid), own), (grad_drawn, drawn)
        ctx.save_for_backward(*(gradient.to(of.dtype) for gradient, of in gradients), grad_log_scale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(part * grad if needed else None for part, needed in gradients), None, None, None, None, None
