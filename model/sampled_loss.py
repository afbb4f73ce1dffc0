"""The Matryoshka cross-entropy over a sample of the catalogue, for catalogues too large to score in every step.

K items are drawn with replacement from a distribution q, the same for all positions of a step (shared negatives), and
stand for all that are not the label. Drawn item i counts 1 / (K q_i) times (the log-q correction: Bengio & Senécal,
2008; Yi et al., 2019), so that the sum under the softmax has the expectation of the whole catalogue's:

    loss = 1/|M| Σ_m [ log( exp(s_label) + Σ_k exp(s_k - log(K q_k)) ) - s_label ],   s_i = z[:m] · E[i, :m]

A draw of a position's own label is left out there. T labelled positions, K draws, N items, D largest size.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fmrl import Context, increments
from model.loss import add_product, held_buffer, row_chunks
from model.objective import ABSENT, Objective, losses_plain, residuals_


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
    objective: Objective | None = None,
) -> Tensor:
    """The plain twin of `sampled_matryoshka_cross_entropy`, averaged over sizes: a logsumexp per size."""
    labelled = labels > 0
    hit = labels[:, None] == items
    if objective is not None:
        s = torch.ones(len(sizes)) if objective.log_scale is None else objective.log_scale.exp()
        scaled = []
        for j, m in enumerate(sizes):
            label_logit = s[j] * (z[:, :m] * own[:, :m]).sum(dim=1, keepdim=True)
            logits = (s[j] * z[:, :m] @ drawn[:, :m].T - log_kq).masked_fill(hit, ABSENT)
            scaled.append(torch.cat([label_logit, logits], dim=1)[labelled])
        return losses_plain(scaled, torch.zeros_like(labels[labelled]), objective).mean()
    losses = []
    for m in sizes:
        label_logit = (z[:, :m] * own[:, :m]).sum(dim=1, keepdim=True)
        logits = (z[:, :m] @ drawn[:, :m].T - log_kq).masked_fill(hit, -torch.inf)
        losses.append((torch.cat([label_logit, logits], dim=1).logsumexp(dim=1) - label_logit[:, 0])[labelled].mean())
    return torch.stack(losses).mean()


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
    objective: Objective | None = None,
) -> Tensor:
    """The loss, a scalar; sizes, reduction, count, objective, labels [T] (0: none), memory and types as of
    `matryoshka_cross_entropy`.

    z: [T, D]; own: [T, D] the labels' embeddings; drawn: [K, D] those of the items [K] of `NegativeSampler.draw`.
    """
    if count is None:
        count = labels.count_nonzero()
    log_scale = None if objective is None else objective.log_scale
    total = _SampledCrossEntropy.apply(z, own, drawn, log_scale, labels, items, log_kq, sizes, objective)
    return total / count / (len(sizes) if reduction == "mean" else 1)


class _SampledCrossEntropy(torch.autograd.Function):
    """The sum over sizes and positions. Column 0 of the logits is a position's label, column k its k-th draw."""

    @staticmethod
    def forward(
        ctx: Context,
        z: Tensor,
        own: Tensor,
        drawn: Tensor,
        log_scale: Tensor | None,
        labels: Tensor,
        items: Tensor,
        log_kq: Tensor,
        sizes: tuple[int, ...],
        objective: Objective | None,
    ) -> Tensor:
        narrow, wide = drawn.dtype, torch.promote_types(drawn.dtype, torch.float32)
        valid = (labels != 0)[:, None]
        z = z * valid  # a position without a label has logits of 0, and no gradient
        z_wide, own_wide, z_narrow = z.to(wide), own.to(wide), z.to(narrow)
        loss = torch.zeros((), dtype=wide, device=z.device)
        grad_z, grad_own = torch.empty_like(z, dtype=wide), torch.empty_like(own, dtype=wide)
        grad_drawn = torch.zeros_like(drawn, dtype=wide)

        scale = None if objective is None else objective.scale(loss)
        grad_log_scale = loss.new_zeros(0 if objective is None else len(sizes))

        chunks = row_chunks(len(z), len(sizes) * (len(drawn) + 1) * wide.itemsize)
        slots = len(sizes) + (1 if objective is None else 3)
        buffer = held_buffer((slots, chunks[0].stop, len(drawn) + 1) if chunks else (0,), wide, z.device)
        for rows in chunks:
            held = buffer[:, : len(z[rows])]
            logits, *residuals = held[: len(sizes) + 1]  # each [C, K+1]; a size's residual: softmax - one-hot
            offset = logits if objective is None else held[-2]  # of the logits, once they are scaled
            logits.zero_()
            offset[:, 0] = 0
            absent = -torch.inf if objective is None else ABSENT
            offset[:, 1:] = torch.where(labels[rows, None] == items, absent, -log_kq)
            for j, ((low, high), residual) in enumerate(zip(increments(sizes), residuals, strict=True)):
                logits[:, 0] += (z_wide[rows, low:high] * own_wide[rows, low:high]).sum(dim=1)
                add_product(logits[:, 1:], z_narrow[rows, low:high], drawn[:, low:high].T)
                scaled = logits if scale is None else torch.addcmul(offset, logits, scale[j], out=held[-1])
                log_p = torch.log_softmax(scaled, dim=1, out=residual)
                if objective is None:
                    loss -= (log_p[:, :1] * valid[rows]).sum()
                    log_p.exp_()[:, 0] -= 1
            if objective is not None:
                column = torch.zeros_like(labels[rows, None])
                of_chunk, by_log_scale = residuals_(
                    residuals, column, valid[rows], objective, (logits, held[-1]), offset
                )
                loss += of_chunk
                grad_log_scale += by_log_scale
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
