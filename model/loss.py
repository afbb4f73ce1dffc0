"""The Matryoshka cross-entropy (section 3.4 of the paper): one cross-entropy over the whole catalogue per size.

    loss = 1/|M| Σ_m CE(softmax(z[:, :m] E[:, :m]ᵀ), label)

Sizes share their logits, logits(M[j]) = logits(M[j-1]) + z[:, M[j-1]:M[j]] E[:, M[j-1]:M[j]]ᵀ, so all sizes together
cost one multiplication of size D. T labelled positions, N items, D largest size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fmrl import increments

CHUNK = 128  # positions whose logits are held at once, for all sizes: 8 x 128 x 12,101 float32 are 50 MB


def matryoshka_cross_entropy_plain(
    z: Tensor, item_table: Tensor, labels: Tensor, sizes: tuple[int, ...], reduction: str = "mean"
) -> Tensor:
    """The plain twin of `matryoshka_cross_entropy`: a cross_entropy per size."""
    z, wide = z.to(item_table.dtype), torch.promote_types(item_table.dtype, torch.float32)
    losses = torch.stack([F.cross_entropy((z[:, :m] @ item_table[:, :m].T).to(wide), labels) for m in sizes])
    return losses.mean() if reduction == "mean" else losses.sum()


def matryoshka_cross_entropy(
    z: Tensor, item_table: Tensor, labels: Tensor, sizes: tuple[int, ...], reduction: str = "mean"
) -> Tensor:
    """The loss, a scalar: over sizes the mean or the sum (`reduction`), over positions the mean.

    z: [T, D]; item_table: [N+1, D], row 0 (begin of sequence) takes part in the softmax as in the released code;
    labels: [T]. The gradients are computed on the way, chunk by chunk, so that the logits of a batch are never held.
    Products are computed in the item table's type (bfloat16 under autocast), sums and the softmax in float32 at least.
    """
    scale = 1 / len(labels) / (len(sizes) if reduction == "mean" else 1)
    return _MatryoshkaCrossEntropy.apply(z, item_table, labels, sizes, scale)


class _MatryoshkaCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, item_table: Tensor, labels: Tensor, sizes: tuple[int, ...], scale: float) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        # Grouped by increment, so that each increment's product reads and writes one contiguous block.
        parts = increments(sizes)
        tables = [item_table[:, low:high].contiguous() for low, high in parts]
        wide = torch.promote_types(item_table.dtype, torch.float32)
        grad_tables = [torch.zeros_like(table, dtype=wide) for table in tables] if needs_grad else []
        grad_z = torch.empty_like(z, dtype=wide)
        loss = torch.zeros((), dtype=wide, device=z.device)

        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            z_chunk, label = z[rows].to(item_table.dtype), labels[rows][:, None]  # [C, D], [C, 1]
            minus_one = torch.full_like(label, -1, dtype=wide)
            logits = torch.zeros(len(label), len(item_table), dtype=wide, device=z.device)  # [C, N+1]
            residuals = []  # softmax - one-hot of every size
            for (low, high), table in zip(parts, tables, strict=True):
                _add_product(logits, z_chunk[:, low:high], table.T)
                log_z = logits.logsumexp(dim=1, keepdim=True)
                loss += (log_z - logits.gather(1, label)).sum()
                if needs_grad:
                    residuals.append(torch.sub(logits, log_z).exp_().scatter_add_(1, label, minus_one))
            # A logit of increment j is part of every size from M[j] on: its gradient is the sum of theirs.
            for j in range(len(parts) - 1, -1, -1) if needs_grad else ():
                (low, high) = parts[j]
                if j + 1 < len(parts):
                    residuals[j] += residuals[j + 1]
                residual = residuals[j].to(item_table.dtype)
                grad_z[rows, low:high] = residual @ tables[j]
                _add_product(grad_tables[j], residual.T, z_chunk[:, low:high])

        if needs_grad:
            grad_table = torch.cat(grad_tables, dim=1).mul_(scale)
            ctx.save_for_backward(grad_z.mul_(scale).to(z.dtype), grad_table.to(item_table.dtype))
        return loss * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_z, grad_table = ctx.saved_tensors
        return grad_z * grad, grad_table * grad, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in place; total may be of a wider type than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
