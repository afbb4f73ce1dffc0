"""AdamW for a large item embedding, row by row: a step reads and writes only the rows that it uses.

A row w without a gradient still moves in AdamW, by its momentum and by weight decay λ. If its last gradient came in
step s and left the moments m and v, then step u > s computes

    w_u = (1 - lr_u λ) w_{u-1} - lr_u (β1/√β2)^(u-s) √(1-β2^u) / (1-β1^u) d,      d = m / (√v + ε √(1-β2^s))

so w_t = a w_s - b d. All rows of the same s share a and b, which are updated once a step; a row catches up when it is
read. Its moving average catches up in the same way: average_t = p average_s + q w_s - c d.

This is dense AdamW to rounding, but for ε: dense AdamW adds a constant ε to the √v that shrinks in skipped steps; here
both shrink. The plain twin is torch.optim.AdamW over all rows.

Compact moments take a quarter of the bytes: m in bfloat16, and one v for each row and increment of the sizes, the mean
over its coordinates, as in Adam-mini (Zhang et al., 2024). Coordinates of smaller sizes have larger gradients.

Under torchrun rank r of R holds the rows i with i % R = r, as row i // R, with their moments and average. Each step it
asks their ranks for the rows that it reads, and sends their gradients back. Evaluation reads them in the same way.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import processes
from config import TrainingSettings
from model.base import SequenceModel
from model.extensions.item_table import new_tensor
from model.items import ItemEncoder

BETA1, BETA2 = 0.9, 0.999  # the defaults of torch.optim.AdamW
WINDOW = 4096  # steps after which all rows catch up, which bounds the table of coefficients
ROWS = 2**14  # rows that catch up at once
ROWS_FROM = 100_000  # items from which on a CPU updates the embedding by rows


class SparseRows:
    """AdamW and moving average of one weight [N+1, K], by the rows that a step reads.

    n: the rows that this rank holds, all N+1 in a single process. Under torchrun the weight itself is a view of one
    zero, except within `loading` and after `end`.
    """

    def __init__(self, weight: nn.Parameter, settings: TrainingSettings, blocks: Sequence[int] | None = None) -> None:
        """blocks: widths of the parts of a row that share a compact v; None: exact moments."""
        self.weight, self.decay, self.epsilon = weight, settings.weight_decay, settings.adam_epsilon
        self.ranks, self.rank = processes.world_size(), processes.rank()
        self.rows = self._own(weight.data)  # [n, K]
        if self.ranks > 1:
            weight.data = self._without_rows()
        self.widths = None if blocks is None else torch.tensor(blocks, device=weight.device)
        self.m = torch.zeros_like(self.rows, dtype=torch.bfloat16 if blocks else None)
        self.v = self.rows.new_zeros(len(self.rows), len(blocks)) if blocks else torch.zeros_like(self.rows)
        self.last = torch.zeros(len(self.rows), dtype=torch.int64, device=weight.device)  # step of a row's last update
        self.step = self.begin = 0  # finished steps; the step up to which every row has caught up
        self.coefficients = torch.zeros(5, WINDOW, dtype=torch.float64)  # a, b, p, q, c by s - begin
        self._open_window()
        self.average: Tensor | None = None  # [n, K], or None without a moving average
        self.average_decay = 0.0
        self._reads: list[tuple[Tensor, Tensor]] = []

    def start_average(self, decay: float) -> nn.Parameter:
        """Keep a moving average of the weight too. Returns it as a weight [N+1, K]."""
        self.average, self.average_decay = self.rows.clone(), decay
        average = self.average if self.ranks == 1 else self._without_rows()
        return nn.Parameter(average, requires_grad=False)

    def read(self, items: Tensor, _: Tensor) -> Tensor:
        """Return the current rows of items [n], [n, K], as a leaf whose gradient `collect` reads.

        Has the signature of F.embedding.
        """
        with torch.no_grad():
            rows = self._caught_up(items) if self.ranks == 1 else self._fetch(items, self._caught_up)
        self._reads.append((items, rows.requires_grad_()))
        return rows

    def _fetch(self, items: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the rows of items [n], [n, K], from the ranks that hold them. read: returns some that a rank holds."""
        wanted, place = items.unique(return_inverse=True)
        holders = [wanted % self.ranks == rank for rank in range(self.ranks)]
        asked = processes.exchange([wanted[held] // self.ranks for held in holders])
        answers = processes.exchange([read(some) for some in asked])
        rows = self.rows.new_empty(len(wanted), self.rows.shape[1])
        for held, answer in zip(holders, answers, strict=True):
            rows[held] = answer
        return rows[place]

    def collect(self) -> Tensor:
        """Sum the gradients of this step's reads by row, over all ranks. Returns a tensor with that .grad."""
        items, gradient = _sum_by_row(*(torch.cat(parts) for parts in zip(*self._gradients(), strict=True)))
        if self.ranks > 1:
            holders = [items % self.ranks == rank for rank in range(self.ranks)]
            rows = processes.exchange([items[held] // self.ranks for held in holders])
            gradients = processes.exchange([gradient[held] for held in holders])
            items, gradient = _sum_by_row(torch.cat(rows), torch.cat(gradients))
        self._collected, self._summed = items, torch.zeros_like(gradient)
        self._summed.grad = gradient
        return self._summed

    def gradient_or_norm(self) -> Tensor:
        """Return a tensor whose norm is the norm of the collected gradient over all ranks."""
        assert self._summed.grad is not None
        if self.ranks == 1:
            return self._summed.grad
        return processes.add_up(self._summed.grad.square().sum()[None]).sqrt()

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for items, rows in self._reads:
            assert rows.grad is not None
            yield items, rows.grad
        self._reads.clear()

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Apply AdamW to the rows that were collected."""
        rows, gradient = self._collected, self._summed.grad
        assert gradient is not None
        w, m, v, average = self._current(rows, with_average=True)
        self.step += 1
        share = self._advance(lr)
        m.lerp_(gradient, 1 - BETA1)
        v.mul_(BETA2).add_(self._by_block(gradient.square()), alpha=1 - BETA2)
        denominator = self._spread(v.sqrt()).div_(math.sqrt(1 - BETA2**self.step)).add_(self.epsilon)
        w.mul_(1 - lr * self.decay).addcdiv_(m, denominator, value=-lr / (1 - BETA1**self.step))
        if average is not None:
            average.lerp_(w, share)
        self._write(rows, w, m, v, average)
        if self.step - self.begin == self.coefficients.shape[1] - 1:
            self.catch_up()

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring every row up to date, for reading the weight itself."""
        for rows in torch.arange(len(self.rows), device=self.rows.device).split(ROWS):
            self._write(rows, *self._current(rows, with_average=True))
        self._open_window()

    @contextmanager
    def reading(self, items: ItemEncoder) -> Iterator[None]:
        """Let `items` read the rows of the weight, or of its average, from their ranks within the block.

        All rows must have caught up. All ranks must read equally often.
        """
        if self.ranks > 1 and items.learned is not None:
            stored = self.stored(items.learned)
            items.lookup = lambda tokens, _: self._fetch(tokens, stored.__getitem__)
        try:
            yield
        finally:
            items.lookup = F.embedding

    @contextmanager
    def loading(self, *weights: nn.Parameter) -> Iterator[None]:
        """Take the rows of this rank from values that are assigned to the weight, its average, or both in the block."""
        for weight in weights if self.ranks > 1 else ():
            weight.data = self.rows.new_empty(weight.shape)
        try:
            yield
        finally:
            for weight in weights if self.ranks > 1 else ():
                self.stored(weight).copy_(self._own(weight.data))
                weight.data = self._without_rows()

    def end(self) -> None:
        """Hold all rows of the weight on every rank again, on a CPU in a mapped temporary file."""
        if self.ranks > 1:
            whole = new_tensor(self.weight.shape, self.rows.dtype)
            self._gather(self.rows, whole, everywhere=True)
            self.weight.data = whole.to(self.rows.device)

    def gather(self, own: Tensor) -> Tensor:
        """Return what all ranks hold of `own` [n, ...], by item: [N+1, ...]; an empty tensor on other ranks than 0.

        It is mapped from a temporary file. Every rank takes part in it.
        """
        if self.ranks == 1:
            return own
        whole = new_tensor((len(self.weight) if self.rank == 0 else 0, *own.shape[1:]), own.dtype)
        self._gather(own, whole, everywhere=False)
        return whole

    def _gather(self, own: Tensor, whole: Tensor, everywhere: bool) -> None:
        """Fill `whole` [N+1, ...] with what all ranks hold, ROWS rows at a time, on rank 0 or everywhere."""
        some = -(-ROWS // self.ranks)
        for start in range(0, len(own), some):
            part = own[start : start + some]
            parts = processes.exchange([part if everywhere or rank == 0 else part[:0] for rank in range(self.ranks)])
            if everywhere or self.rank == 0:
                target = whole[self.ranks * start :][: self.ranks * len(part)]
                target.copy_(torch.stack(parts, dim=1).flatten(0, 1)[: len(target)])

    def state(self) -> dict[str, Any]:
        """Return all that resuming needs beside the weight and its average. Every rank takes part in it."""
        whole: dict[str, Any] = {name: self.gather(getattr(self, name)) for name in ("m", "v", "last")}
        return whole | {name: getattr(self, name) for name in ("coefficients", "step", "begin")}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`, of any number of ranks."""
        for name in ("m", "v", "last"):
            saved = self._own(state[name])
            if name == "v" and saved.shape != self.v.shape:  # of a version without compact moments
                saved = self._by_block(saved)
            getattr(self, name).copy_(saved)
        self.coefficients.copy_(state["coefficients"])
        self.step, self.begin = state["step"], state["begin"]

    def stored(self, weight: nn.Parameter) -> Tensor:
        """Return the rows of the weight, or of its average, that this rank holds."""
        if weight is self.weight:
            return self.rows
        assert self.average is not None
        return self.average

    def _own(self, whole: Tensor) -> Tensor:
        """Return this rank's rows of [N+1, ...]: [n, ...], filled up with zeros to the same n on all ranks."""
        if self.ranks == 1:
            return whole
        own = whole.new_zeros(-(-len(whole) // self.ranks), *whole.shape[1:])
        part = whole[self.rank :: self.ranks]
        own[: len(part)] = part
        return own

    def _without_rows(self) -> Tensor:
        """Return zeros in the weight's shape that take no memory."""
        return self.rows.new_zeros(()).expand(self.weight.shape)

    def _by_block(self, squares: Tensor) -> Tensor:
        """Return the mean of each block [n, G] of squares [n, K], or all of them without blocks."""
        if self.widths is None:
            return squares
        parts = squares.split(self.widths.tolist(), dim=1)
        return torch.stack([part.mean(dim=1) for part in parts], dim=1)

    def _spread(self, v: Tensor) -> Tensor:
        """Return one number for each coordinate, [n, K]."""
        return v if self.widths is None else v.repeat_interleave(self.widths, dim=1, output_size=self.rows.shape[1])

    def _open_window(self) -> None:
        self.begin = self.step
        self.coefficients[:, 0] = torch.tensor([1.0, 0, 1, 0, 0])

    def _advance(self, lr: float) -> float:
        """Take a step without a gradient in all coefficients. Returns the new weights' share of the average."""
        t, count = self.step, self.step - self.begin
        a, b, p, q, c = self.coefficients[:, :count]
        kept = 1 - lr * self.decay
        skipped = torch.arange(count, 0, -1, dtype=torch.float64)  # t - s
        moved = lr * math.sqrt(1 - BETA2**t) / (1 - BETA1**t) * (BETA1 / math.sqrt(BETA2)) ** skipped
        a.mul_(kept)
        b.mul_(kept).add_(moved)
        share = (1 - self.average_decay) / (1 - self.average_decay**t)
        p.mul_(1 - share)
        q.mul_(1 - share).add_(a, alpha=share)
        c.mul_(1 - share).add_(b, alpha=share)
        self.coefficients[:, count] = torch.tensor([1.0, 0, 1, 0, 0])  # of the rows that this step updates
        return share

    def _current(self, rows: Tensor, with_average: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return (w, m, v, average or None) of some rows after the last step, as new tensors."""
        last, w, v = self.last[rows], self.rows[rows], self.v[rows]
        m = self.m[rows].to(w.dtype)
        coefficients = self.coefficients[:, (last - self.begin).cpu()].to(w)[..., None]
        a, b, p, q, c = coefficients
        epsilon = self.epsilon * (1 - BETA2 ** last.double()).sqrt().to(w.dtype)[:, None]
        d = m / (self._spread(v.sqrt()) + epsilon).clamp_min(torch.finfo(w.dtype).tiny)
        average = None
        if with_average and self.average is not None:
            average = self.average[rows].mul_(p).addcmul_(q, w).addcmul_(c, d, value=-1)
        skipped = (self.step - last).double()
        m.mul_((BETA1**skipped).to(m.dtype)[:, None])
        v.mul_((BETA2**skipped).to(v.dtype)[:, None])
        return w.mul_(a).addcmul_(b, d, value=-1), m, v, average

    def _caught_up(self, rows: Tensor) -> Tensor:
        """Return some rows of the weight after the last step."""
        return self._current(rows)[0]

    def _write(self, rows: Tensor, w: Tensor, m: Tensor, v: Tensor, average: Tensor | None) -> None:
        for whole, part in ((self.rows, w), (self.m, m), (self.v, v), (self.average, average)):
            if whole is not None and part is not None:
                whole.index_copy_(0, rows, part.to(whole.dtype))
        self.last[rows] = self.step


def _sum_by_row(items: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct items [r], and the sum of each one's gradients [n, K]: [r, K]."""
    rows, place = items.unique(return_inverse=True)
    return rows, gradient.new_zeros(len(rows), gradient.shape[1]).index_add_(0, place, gradient)


def sparse_rows(model: SequenceModel, settings: TrainingSettings, sampled: bool) -> SparseRows | None:
    """Return an object that updates a learned item embedding by rows, or None if the optimizer updates it.

    sampled: whether the softmax is sampled; if not, a step reads all rows.
    """
    how, weight = settings.item_embedding_updates, model.items.learned
    if weight is None or not sampled or settings.optimizer != "adamw" or how == "all":
        return None
    if how == "auto" and (len(weight) <= ROWS_FROM or weight.device.type != "cpu"):
        return None
    bounds = [0, *(m for m in model.sizes if m < weight.shape[1]), weight.shape[1]]
    blocks = [high - low for low, high in itertools.pairwise(bounds)]
    return SparseRows(weight, settings, None if how == "rows" else blocks)
