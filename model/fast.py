"""The fast twins of layers and losses, with hand-written gradients.

    nested_linear                 model.fmrl.nested_linear_plain
    linear_recurrence             model.lru.linear_recurrence_plain
    cross_entropy_sum             model.loss.matryoshka_cross_entropy_plain
    sampled_cross_entropy_sum     model.extensions.sampled_loss.sampled_matryoshka_cross_entropy_plain

The losses compute logits in chunks that the sizes share. T tokens, rows or positions (C in a chunk), L history items of
a position, N items, K logits of a position or draws, M sizes, F feature width, D the largest size.
"""

import itertools
import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.base import increments
from model.extensions.objective import Objective
from model.items import Factors


class Context(Protocol):
    """What forward saves for backward. torch's own annotations do not allow None among the saved tensors."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


# -------------------------------------------------------------------------------------------------- nested linear layer
# W is multiplied band by band, rows low:high with the inputs 0:high: most of the zeros are not multiplied.


def nested_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """Compute (W ⊙ P) x + b (eq. 5): x [..., D], weight [D, D], bias [D] or None -> [..., D].

    Plain twin: `model.fmrl.nested_linear_plain`. Under autocast, products and the result have the autocast dtype.
    """
    narrow = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if narrow else weight.dtype
    return _NestedLinear.apply(x, weight, bias, sizes, dtype)


def bands(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the increments, with those below D/4 merged into one: products of a few rows cost more than zeros."""
    wide = [m for m in sizes if 4 * m >= sizes[-1]]
    return list(itertools.pairwise((0, *wide)))


class _NestedContext(Context, Protocol):
    sizes: tuple[int, ...]
    wide: torch.dtype
    biased: bool


class _NestedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _NestedContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [T, D]
        parts = _band_weights(weight, sizes, dtype)
        y = [
            F.linear(rows[:, :high], part, None if bias is None else bias[low:high].to(dtype))
            for (low, high), part in zip(bands(sizes), parts, strict=True)
        ]
        ctx.save_for_backward(rows, *parts)
        ctx.sizes, ctx.wide, ctx.biased = sizes, weight.dtype, bias is not None
        return torch.cat(y, dim=1).reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: _NestedContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *parts = ctx.saved_tensors
        wide, dim = ctx.wide, rows.shape[1]
        grad_rows = grad.reshape(-1, dim)
        grad_bias = grad_rows.sum(dim=0, dtype=wide) if ctx.biased else None
        grad_rows = grad_rows.to(rows.dtype)
        grad_x = torch.empty(len(rows), dim, dtype=wide, device=rows.device)
        grad_weight = torch.empty(dim, dim, dtype=wide, device=rows.device)
        for (low, high), part in reversed(list(zip(bands(ctx.sizes), parts, strict=True))):
            add_product(grad_x[:, :high], grad_rows[:, low:high], part, first=high == dim)
            grad_weight[low:high, :high] = grad_rows[:, low:high].T @ rows[:, :high]
        return grad_x.reshape(grad.shape), _mask_(grad_weight, ctx.sizes), grad_bias, None, None


def _band_weights(weight: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return (W ⊙ P)[low:high, :high] of every band, in `dtype`."""
    first, *others = [weight[low:high, :high] for low, high in bands(sizes)]
    # The first is the only band that may hold several increments.
    first = _mask_(first.to(dtype, copy=True), tuple(m for m in sizes if m <= len(first)))
    return [first, *(part.to(dtype) for part in others)]


def _mask_(weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Multiply a weight by P, in place."""
    for low, high in increments(sizes):
        weight[low:high, high:] = 0
    return weight


# ----------------------------------------------------------------------------------------------------------- recurrence
# Histories are packed, and `position` is as in model/lru.py. A CPU scans them step by step, a GPU by doubling.


def linear_recurrence(
    u_re: Tensor, u_im: Tensor, lambda_re: Tensor, lambda_im: Tensor, position: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Compute h_t = u_t + λ ⊙ h_{t-1}, without h_{t-1} where position[t] is 0.

    Plain twin: `model.lru.linear_recurrence_plain`. u_re, u_im: [T, D]; lambda_re, lambda_im: [D]; position: [T];
    longest: the most tokens of one history, or more. Returns (h_re, h_im), each [T, D].
    """
    return _LinearRecurrence.apply(u_re, u_im, lambda_re, lambda_im, position, longest)


class _RecurrenceContext(Context, Protocol):
    longest: int


class _LinearRecurrence(torch.autograd.Function):
    """The gradient is the same recurrence backwards in time, with conj(λ):

        ∂h_t = grad_t + conj(λ) ⊙ ∂h_{t+1},    ∂u_t = ∂h_t,    ∂λ = Σ_t ∂h_t ⊙ conj(h_{t-1})

    Autograd would save every step of the forward pass, at twice the time.
    """

    @staticmethod
    def forward(
        ctx: _RecurrenceContext,
        u_re: Tensor,
        u_im: Tensor,
        lambda_re: Tensor,
        lambda_im: Tensor,
        position: Tensor,
        longest: int,
    ) -> tuple[Tensor, Tensor]:
        eigenvalue = torch.complex(lambda_re, lambda_im)
        h = _scan(torch.complex(u_re, u_im), eigenvalue, position, longest)
        ctx.save_for_backward(h, eigenvalue, position)
        ctx.longest = longest
        return h.real, h.imag

    @staticmethod
    @once_differentiable
    def backward(ctx: _RecurrenceContext, grad_re: Tensor, grad_im: Tensor) -> tuple[Tensor | None, ...]:
        h, eigenvalue, position = ctx.saved_tensors
        grad = _scan(torch.complex(grad_re, grad_im), eigenvalue.conj(), position, ctx.longest, backwards=True)
        carried = (position[1:] > 0)[:, None]
        grad_eigenvalue = torch.where(carried, grad[1:] * h[:-1].conj(), 0).sum(dim=0)
        return grad.real, grad.imag, grad_eigenvalue.real, grad_eigenvalue.imag, None, None


def _scan(h: Tensor, eigenvalue: Tensor, position: Tensor, longest: int, backwards: bool = False) -> Tensor:
    """Compute h_t += λ h_{t-1} (backwards: h_{t-1} += λ h_t) along every history. May overwrite h [T, D], complex."""
    return (_scan_by_steps if h.device.type == "cpu" else _scan_by_doubling)(
        h, eigenvalue, position, longest, backwards
    )


def _scan_by_doubling(h: Tensor, eigenvalue: Tensor, position: Tensor, longest: int, backwards: bool = False) -> Tensor:
    """Scan all tokens in ceil(log2(longest)) steps, for a GPU: no shape depends on the histories.

    After step k, every h_t is the decayed sum of its last (backwards: next) 2^k inputs.
    """
    shift = 1
    while shift < longest:
        reaches = (position[shift:] >= shift)[:, None]
        target, source = (h[:-shift], h[shift:]) if backwards else (h[shift:], h[:-shift])
        target += torch.where(reaches, eigenvalue * source, 0)
        eigenvalue = eigenvalue * eigenvalue
        shift *= 2
    return h


def _scan_by_steps(h: Tensor, eigenvalue: Tensor, position: Tensor, longest: int, backwards: bool = False) -> Tensor:
    """Scan one position after another, for a CPU: every token once.

    Tokens are sorted by position, then by descending length of their history, so that the tokens of a step are
    adjacent and in the order of the step before.
    """
    history = (position == 0).cumsum(dim=0) - 1  # [T]
    length = torch.bincount(history)
    place = torch.empty_like(length)
    place[length.argsort(descending=True)] = torch.arange(len(length))
    order = (position * len(length) + place[history]).argsort()
    counts = torch.bincount(position).tolist()
    steps = h[order].split(counts)
    for k in reversed(range(1, len(counts))) if backwards else range(1, len(counts)):
        now, before = steps[k], steps[k - 1][: counts[k]]
        if backwards:
            before.addcmul_(now, eigenvalue)
        else:
            now.addcmul_(before, eigenvalue)
    h[order] = torch.cat(steps)
    return h


# --------------------------------------------------------------------------------------------------------------- losses
# What both losses use. `a[i].add_(b)` and not `a[i] += b`, which also copies a[i] onto itself.
#
# The matrix products of a chunk of positions are in memory at once. What lies between the products, the softmax of
# every size, goes block by block within a chunk, so that it stays in the processor's cache.

CHUNK_BYTES = 2**28  # of the products in memory at once, for all sizes: 1,024 positions of 12,101 items and 8 sizes
BLOCK_BYTES = 2**25  # of the logits and probabilities in the processor's cache at once, for all sizes
GPU_SHARE = 32  # on a GPU the products may take this part of its memory: fewer chunks, larger products
ABSENT = -1e30  # the logit of an excluded candidate: its probability is 0, and 0 times this is still 0
LEAST = 16  # fewest positions in memory at once, whatever they take: every chunk reads the whole item table


def row_chunks(num_positions: int, bytes_a_position: int, device: torch.device) -> list[slice]:
    """Return the positions whose products are in memory at once: a power of two of them, so few shapes."""
    limit = CHUNK_BYTES
    if device.type == "cuda":
        limit = max(limit, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)
    return _pieces(num_positions, max(LEAST, limit // bytes_a_position))


def row_blocks(chunk: slice, bytes_a_position: int, device: torch.device) -> list[slice]:
    """Return the positions of each block of a chunk, whose logits are in the cache at once; on a GPU all of them."""
    most = max(LEAST // 4, BLOCK_BYTES // bytes_a_position)  # several, for threads to share
    return _pieces(chunk.stop - chunk.start, chunk.stop if device.type == "cuda" else most)


def _pieces(length: int, most: int) -> list[slice]:
    size = min(length, 2 ** (max(1, most).bit_length() - 1))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def bias_gradient(of_seen: Tensor, label_seen: Tensor, bias: Tensor) -> Tensor:
    """Return the gradient of a size's cross-entropy by its history bias b, a scalar, with the logits held fixed.

    of_seen: [C], the probability of a position's history items without b, 0 where there is no label; label_seen: [C],
    1 where the label is one of them. Plain twin: `losses_plain` of model/extensions/objective.py.
    """
    return (torch.sigmoid(torch.logit(of_seen.clamp(0, 1)) + bias) - label_seen).sum()


_buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}


def reused_buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory, the same in every call of that name on a CPU.

    A new allocation on a CPU is mapped page by page each time. On a GPU torch caches memory itself, and a CUDA graph
    must own what it writes to, which a larger call would free.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size, buffer = math.prod(shape), _buffers.get((name, device, dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # training cannot write to a tensor made in inference mode
            buffer = _buffers[name, device, dtype] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """Compute total += a b, in place, or total = a b if it is the first; total may have a wider dtype than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


class Learned(NamedTuple):
    """The loss and the gradients of the objective's own parameters, summed over sizes and positions as they come."""

    loss: Tensor
    grad_log_scale: Tensor  # [M]
    grad_bias: Tensor  # [M]


class Seen(NamedTuple):
    """The history items among the candidates of C positions, for a history bias."""

    bias: Tensor  # b [M]
    column: Tensor  # [C, L]
    counts: Tensor  # [C, L], 1 where the column is a history item, else 0
    label: Tensor  # [C], 1 where the label is one of them

    def of(self, positions: slice) -> "Seen":
        return Seen(self.bias, *(part[positions] for part in self[1:]))


def residuals_(
    logits: Tensor,
    label: Tensor,
    valid: Tensor,
    objective: Objective,
    scale: Tensor | None,
    learned: Learned,
    spare: Tensor,
    offset: Tensor | None = None,
    teacher: Tensor | None = None,
    seen: Seen | None = None,
) -> None:
    """Turn the unscaled logits [M, C, K] of all sizes, in place, into the gradients by their increments' logits.

    An increment's logits are part of its own and every larger size's logits: its gradient is Σ s_m (p_m - target_m)
    over them. Symbols and plain twin (`losses_plain`): model/extensions/objective.py.

    label: [C, 1], a column; valid: [C, 1], false at a position without a label, whose logits must be 0. scale: s [M],
    None for 1. spare: [3, C, K], of any content. offset: [C, K] or [K], is added to the scaled logits. teacher: [C, K],
    the teachers' logits without the offset.
    """
    p, scaled, target = spare
    if teacher is not None:
        torch.softmax(teacher if offset is None else teacher + offset, dim=1, out=target).mul_(valid)
    one_hot = valid.to(p.dtype)  # [C, 1], at the label's column
    of_label, log_sum = p.new_empty(2, *logits.shape[:2], 1)  # each [M, C, 1]
    above = None
    for j, of_size in reversed(list(enumerate(logits))):
        x = objective.distill if above is not None or teacher is not None else 0.0
        if scale is None and offset is None:
            scaled = of_size
        else:
            torch.mul(of_size, 1 if scale is None else scale[j], out=scaled)
            scaled = scaled if offset is None else scaled.add_(offset)
        torch.softmax(scaled, dim=1, out=p)
        # log p = scaled - log_sum. The largest p is at least 1 / K, while the label's may underflow.
        torch.sub(scaled.amax(dim=1, keepdim=True), p.amax(dim=1, keepdim=True).log_(), out=log_sum[j])
        torch.gather(scaled, 1, label, out=of_label[j])
        if x:
            of_target = target.flatten().dot(scaled.flatten()) - target.sum(dim=1).dot(log_sum[j, :, 0])
            learned.loss.sub_(x * of_target)
        elif objective.distill:  # the largest size teaches
            torch.mul(p, valid, out=target)
        if seen is not None:
            of_seen = (p.gather(1, seen.column) * seen.counts).sum(dim=1)
            learned.grad_bias[j] += bias_gradient(of_seen, seen.label, seen.bias[j])
        residual = p.scatter_add_(1, label, x * one_hot - 1)
        if x:
            residual.sub_(target, alpha=x)
        if scale is not None:
            residual.mul_(scale[j])
            learned.grad_log_scale[j] += residual.flatten().dot(of_size.flatten())
        above = of_size.copy_(residual) if above is None else torch.add(residual, above, out=of_size)
    log_p = (of_label - log_sum).mul_(one_hot)
    log_p[: len(logits) if teacher is not None else -1].mul_(1 - objective.distill)
    learned.loss.sub_(log_p.sum())


# ------------------------------------------------------------------------------------------------------------ all items
# Sizes share their logits: logits(M[j]) = logits(M[j-1]) + z[:, M[j-1]:M[j]] E[:, M[j-1]:M[j]]ᵀ, so all sizes together
# cost one multiplication of width D.
#
# An item table that is a product E = F Wᵀ need not be multiplied out: for a wide increment and few positions, (z W) Fᵀ
# costs less than z (F Wᵀ)ᵀ.


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
        table = weight  # [N+1, out]
        if features is not None:
            table = reused_buffer("table", (len(features), out), narrow, z.device)
            torch.mm(features, weight[:out].to(narrow).T, out=table)
        rest = weight[:0] if features is None else weight[out:].to(narrow)  # [D - out, F]
        if V is not None:
            narrow_V = V.to(narrow)
            table[:, :embedded].add_(narrow_V[:, :out])
        valid = (labels != 0)[:, None]  # [T, 1]
        z_narrow = (z * valid).to(narrow)  # a position without a label has logits of 0, and no gradient

        grad_z = torch.empty_like(z, dtype=wide)
        chunks = row_chunks(len(z), len(sizes) * len(table) * narrow.itemsize, z.device)
        of_sum = wide if len(chunks) > 1 else narrow
        # Transposed, as the products come: transposing a residual costs as much as multiplying it.
        grad_table = reused_buffer("grad_table", (out, len(table)), of_sum, z.device)
        grad_weight = torch.empty_like(weight, dtype=wide)  # of Factors; its rows [out:] come chunk by chunk
        grad_V = None if V is None else torch.empty_like(V, dtype=wide)
        loss = torch.zeros((), dtype=wide, device=z.device)
        scale, learned = objective.scale(loss), Learned(loss, *loss.new_zeros(2, len(sizes)))
        history_seen = None
        if history_bias is not None and objective.history is not None:
            history = objective.history * valid  # [T, L]
            label_seen = ((history == labels[:, None]) & valid).any(dim=1)  # [T]
            history_seen = Seen(history_bias.detach().to(wide), history, (history > 0).to(wide), label_seen.to(wide))

        slots = len(sizes) * (1 if V is None else 2)
        buffer = reused_buffer("products", (slots, chunks[0].stop, len(table)), narrow, z.device)
        for rows in chunks:
            first, z_chunk = rows.start == 0, z_narrow[rows]  # [C, D]
            # Each [C, N+1]: an increment's logits, later their gradient; where it is not multiplied out, also by its V.
            products, by_V = buffer[: len(sizes), : len(z_chunk)], buffer[len(sizes) :, : len(z_chunk)]
            for j, (low, high) in enumerate(increments(sizes)):
                z_part = z_chunk[:, low:high]
                if features is None or high <= out:
                    torch.mm(z_part, table[:, low:high].T, out=products[j])
                else:
                    torch.mm(z_part @ rest[low - out : high - out], features.T, out=products[j])
                    if high <= embedded:
                        torch.mm(z_part, narrow_V[:, low:high].T, out=by_V[j])
            for block in row_blocks(rows, (len(sizes) + 3) * len(table) * wide.itemsize, z.device):
                at = slice(rows.start + block.start, rows.start + block.stop)
                scratch = reused_buffer(
                    "logits", (len(sizes) + 3, block.stop - block.start, len(table)), wide, z.device
                )
                logits, spare = scratch[: len(sizes)], scratch[len(sizes) :]
                for j, (_, high) in enumerate(increments(sizes)):
                    logits[j].copy_(products[j, block])
                    if features is not None and out < high <= embedded:
                        logits[j].add_(by_V[j, block])
                    if j:
                        logits[j].add_(logits[j - 1])
                taught = None if objective.teacher is None else objective.teacher[at].to(wide)
                seen = None if history_seen is None else history_seen.of(at)
                residuals_(
                    logits, labels[at, None], valid[at], objective, scale, learned, spare, objective.prior, taught, seen
                )
                products[:, block] = logits
            for j, (low, high) in enumerate(increments(sizes)):
                residual, z_part = products[j], z_chunk[:, low:high]
                if features is None or high <= out:
                    grad_z[rows, low:high] = residual @ table[:, low:high]
                    add_product(grad_table[low:high], z_part.T, residual, first)
                else:
                    grad_left = residual @ features  # [C, F]
                    grad_z[rows, low:high] = grad_left @ rest[low - out : high - out].T
                    add_product(grad_weight[low:high], z_part.T, grad_left, first)
                    if grad_V is not None and high <= embedded:
                        grad_z[rows, low:high].add_(residual @ narrow_V[:, low:high])
                        add_product(grad_V[:, low:high], residual.T, z_part, first)

        if features is None:
            grad_weight = grad_table.T.clone(memory_format=torch.contiguous_format)  # [N+1, D]
        else:
            grad_weight[:out] = grad_table.to(narrow) @ features
        if V is not None and grad_V is not None:
            grad_V[:, :out] = grad_table[:embedded].T
            grad_V = grad_V.to(V.dtype)
        grad_z, grad_weight = grad_z.mul_(valid).to(z.dtype), grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_z, grad_weight, grad_V, learned.grad_log_scale, learned.grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_V: Tensor | None
        grad_z, grad_weight, grad_V, *learned = ctx.saved_tensors
        # In place, because these are large. torch refuses a second backward.
        by_weight, by_V = grad_weight.mul_(grad), None if grad_V is None else grad_V.mul_(grad)
        by_learned = (g * grad if n else None for g, n in zip(learned, ctx.needs_input_grad[3:5], strict=True))
        return grad_z * grad, by_weight, by_V, *by_learned, None, None, None, None


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


# ------------------------------------------------------------------------------------------------ a sample of the items


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
        grad_drawn = torch.empty_like(drawn, dtype=wide)

        scale, learned = objective.scale(loss), Learned(loss, *loss.new_zeros(2, len(sizes)))
        prior = objective.prior
        of_drawn = -log_kq if prior is None else prior[items] - log_kq  # [K], added to the scaled logits
        columns, history_seen, grad_of_history = draws, None, None
        if of_history is not None and history_bias is not None and objective.history is not None:
            columns = draws + of_history.shape[2]
            grad_of_history = torch.empty_like(of_history)
            history, own_history = objective.history * valid, objective.history == labels[:, None]  # [T, L]
            label_seen = (own_history & valid).any(dim=1, keepdim=True).to(wide)  # [T, 1]
            # The label's column takes the place of its history column, which is excluded.
            column = F.pad(torch.arange(draws, columns, device=z.device), (1, 0)).expand(len(z), -1)
            counts = torch.cat([label_seen, torch.ones_like(history, dtype=wide)], dim=1)
            history_seen = Seen(history_bias.detach().to(wide), column, counts, label_seen[:, 0])
        chunks = row_chunks(len(z), len(sizes) * columns * narrow.itemsize, z.device)
        buffer = reused_buffer("products", (len(sizes), chunks[0].stop, len(drawn)), narrow, z.device)
        for rows in chunks:
            products = buffer[:, : len(z_narrow[rows])]  # each [C, K]: an increment's logits, later their gradient
            for (low, high), product in zip(increments(sizes), products, strict=True):
                torch.mm(z_narrow[rows, low:high], drawn[:, low:high].T, out=product)
            for block in row_blocks(rows, (len(sizes) + 4) * columns * wide.itemsize, z.device):
                at = slice(rows.start + block.start, rows.start + block.stop)
                shape = len(sizes) + 4, block.stop - block.start, columns
                scratch = reused_buffer("logits", shape, wide, z.device)
                logits, offset, spare = scratch[: len(sizes)], scratch[-4], scratch[-3:]  # [C, 1+K+L]
                offset[:, 0] = 0 if prior is None else prior[labels[at]]
                if grad_of_history is None:
                    offset[:, 1:] = torch.where(labels[at, None] == items, ABSENT, of_drawn)
                else:
                    candidates = torch.cat([labels[at, None], history[at]], dim=1)
                    torch.mul(_excluded(items, candidates), ABSENT, out=offset[:, 1:draws]).add_(of_drawn)
                    offset[:, draws:] = ABSENT * ((history[at] == 0) | own_history[at])
                    if prior is not None:
                        offset[:, draws:].add_(prior[history[at]])
                for j, (low, high) in enumerate(increments(sizes)):
                    logits[j, :, 0] = (z_wide[at, low:high] * own_wide[at, low:high]).sum(dim=1)
                    logits[j, :, 1:draws] = products[j, block]
                    if of_history is not None:
                        logits[j, :, draws:] = of_history[j, at]
                    if j:
                        logits[j].add_(logits[j - 1])
                column = torch.zeros_like(labels[at, None])
                taught = None if objective.teacher is None else objective.teacher[at].to(wide)
                seen = None if history_seen is None else history_seen.of(at)
                residuals_(logits, column, valid[at], objective, scale, learned, spare, offset, taught, seen)
                products[:, block] = logits[:, :, 1:draws]
                for j, (low, high) in enumerate(increments(sizes)):
                    grad_z[at, low:high] = logits[j, :, :1] * own_wide[at, low:high]
                    grad_own[at, low:high] = logits[j, :, :1] * z_wide[at, low:high]
                if grad_of_history is not None:
                    grad_of_history[:, at] = logits[:, :, draws:]
            for (low, high), residual in zip(increments(sizes), products, strict=True):
                grad_z[rows, low:high].add_(residual @ drawn[:, low:high])
                add_product(grad_drawn[:, low:high], residual.T, z_narrow[rows, low:high], first=rows.start == 0)

        gradients = (grad_z.mul_(valid), z), (grad_own.mul_(valid), own), (grad_drawn, drawn)
        of_learned = grad_of_history, learned.grad_log_scale, learned.grad_bias
        ctx.save_for_backward(*(gradient.to(of.dtype) for gradient, of in gradients), *of_learned)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(part * grad if needed else None for part, needed in gradients), None, None, None, None, None
