"""The Matryoshka cross-entropy over a sample of the catalogue, for catalogues too large to score in every step.

K items are drawn with replacement from a distribution q, the same for all positions of a step (shared negatives), and
stand for all that are not the label. Drawn item i counts 1 / (K q_i) times (the log-q correction: Bengio & Senécal,
2008; Yi et al., 2019), so that the sum under the softmax has the expectation of the whole catalogue's:

    loss = 1/|M| Σ_m [ log( exp(s_label) + Σ_k exp(s_k - log(K q_k)) ) - s_label ],   s_i = z[:m] · E[i, :m]

A draw of a position's own label is left out there. T labelled positions, K draws, N items, D largest size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.extensions.objective import ABSENT, CROSS_ENTROPY, Objective, losses_plain, residuals_
from model.fmrl import Context, increments
from model.loss import add_product, check, held_buffer, row_chunks


class NegativeSampler:
    """Draws items: half of the draws by how often an item is a label, half all alike, so that no draw counts more than
    2 N / K times."""

    def __init__(self, label_counts: Tensor, num_negatives: int) -> None:
        """label_counts: [N+1] how often each token is a label; token 0 is never drawn."""
        counts = label_counts[1:].double()
        self.num_negatives = num_negatives
        self.q = (counts / counts.sum() + 1 / len(counts)) / 2  # [N]
        self._cumulative = self.q.cumsum(dim=0)

    def draw(self) -> tuple[Tensor, Tensor]:
        """K items [K] and log(K q) of each [K] float32."""
        u = torch.rand(self.num_negatives, dtype=torch.float64, device=self.q.device) * self._cumulative[-1]
        index = torch.searchsorted(self._cumulative, u, right=True).clamp_max(len(self.q) - 1)
        return index + 1, torch.log(self.num_negatives * self.q[index]).float()


def sampled_matryoshka_cross_entropy_plain(
    z: Tensor,
    own: Tensor,
    drawn: Tensor,
    labels: Tensor,
    items: Tensor,
    log_kq: Tensor,
    sizes: tuple[int, ...],
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """The plain twin of `sampled_matryoshka_cross_entropy`, averaged over sizes: a logsumexp per size."""
    logits = [torch.cat([(z * own)[:, :m].sum(dim=1, keepdim=True), z[:, :m] @ drawn[:, :m].T], dim=1) for m in sizes]
    offset = F.pad(torch.where(labels[:, None] == items, ABSENT, -log_kq), (1, 0))  # none of the label's
    return losses_plain(logits, torch.zeros_like(labels), labels > 0, objective, offset).mean()


def sampled_matryoshka_cross_entropy(
    z: Tensor,
    own: Tensor,
    drawn: Tensor,
    labels: Tensor,
    items: Tensor,
    log_kq: Tensor,
    sizes: tuple[int, ...],
    reduction: str = "mean",
    count: Tensor | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """The loss, a scalar; sizes, reduction, count, objective, labels [T] (0: none), memory and types as of
    `matryoshka_cross_entropy`.

    z: [T, D]; own: [T, D] the labels' embeddings; drawn: [K, D] those of the items [K] of `NegativeSampler.draw`.
    """
    check(z, sizes, reduction)
    if count is None:
        count = labels.count_nonzero()
    total = _SampledCrossEntropy.apply(z, own, drawn, objective.log_scale, labels, items, log_kq, sizes, objective)
    return total / count / (len(sizes) if reduction == "mean" else 1)


class _SampledCrossEntropy(torch.autograd.Function):
    """The sum over sizes and positions. Column 0 of the logits is a position's label, column k its k-th draw."""

    @staticmethod
    def forward(
        ctx: Context,
        z: Tensor,
        own: Tensor,
        drawn: Tensor,
        log_scale: Tensor | None,  # that of the objective, here to have a gradient
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
        chunks = row_chunks(len(z), len(sizes) * (len(drawn) + 1) * wide.itemsize)
        buffer = held_buffer((len(sizes) + 3, chunks[0].stop, len(drawn) + 1), wide, z.device)
        for rows in chunks:
            # Each [C, K+1]; a size's residual: softmax - target; offset: of the logits, once they are scaled.
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
            # A logit of an increment is part of every size from there on: its gradient is the sum of theirs.
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
