"""AdamW for a large item embedding, row by row: a step reads and writes only the rows that it uses.

A row w without a gradient still moves in AdamW, by its momentum and by weight decay λ. If its last gradient came in
step s and left the moments m and v, then step u > s computes

    w_u = (1 - lr_u λ) w_{u-1} - lr_u (β1/√β2)^(u-s) √(1-β2^u) / (1-β1^u) d,      d = m / (√v + ε √(1-β2^s))

so w_t = a w_s - b d. All rows of the same s share a and b, which are updated once a step; a row catches up when it is
read. Its moving average catches up in the same way: average_t = p average_s + q w_s - c d.

This is dense AdamW to rounding, but for ε: dense AdamW adds a constant ε to the √v that shrinks in skipped steps; here
both shrink. The plain twin is torch.optim.AdamW over all rows.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common import processes
from config import TrainingSettings

BETA1, BETA2 = 0.9, 0.999  # the defaults of torch.optim.AdamW
WINDOW = 4096  # steps after which all rows catch up, which bounds the table of coefficients
ROWS = 2**14  # rows that catch up at once
ROWS_FROM = 100_000  # items from which on a CPU updates the embedding by rows


class SparseRows:
    """AdamW and moving average of one weight [N+1, K], by the rows that a step reads."""

    def __init__(self, weight: nn.Parameter, settings: TrainingSettings) -> None:
        self.weight, self.decay, self.epsilon = weight, settings.weight_decay, settings.adam_epsilon
        self.m, self.v = torch.zeros_like(weight.data), torch.zeros_like(weight.data)
        self.last = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)  # step of a row's last update
        self.step = self.begin = 0  # finished steps; the step up to which every row has caught up
        self.coefficients = torch.zeros(5, WINDOW, dtype=torch.float64)  # a, b, p, q, c by s - begin
        self._open_window()
        self.average: Tensor | None = None  # [N+1, K], or None without a moving average
        self.average_decay = 0.0
        self._reads: list[tuple[Tensor, Tensor]] = []

    def read(self, items: Tensor, _: Tensor) -> Tensor:
        """Return the current rows of items [n], [n, K], as a leaf whose gradient `collect` reads.

        Has the signature of F.embedding.
        """
        with torch.no_grad():
            rows = self._current(items)[0]
        self._reads.append((items, rows.requires_grad_()))
        return rows

    def collect(self) -> Tensor:
        """Sum the gradients of this step's reads by row, over all ranks. Returns a tensor with that .grad."""
        items, gradient = (torch.cat(parts) for parts in zip(*self._gradients(), strict=True))
        if processes.world_size() > 1:
            touched = torch.zeros(len(self.weight), dtype=torch.int32, device=items.device)
            touched[items] = 1
            self._rows = processes.add_up(touched).nonzero()[:, 0]
            place = torch.searchsorted(self._rows, items)
        else:
            self._rows, place = items.unique(return_inverse=True)
        self._summed = gradient.new_zeros(len(self._rows), gradient.shape[1])
        self._summed.grad = processes.add_up(torch.zeros_like(self._summed).index_add_(0, place, gradient))
        return self._summed

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for items, rows in self._reads:
            assert rows.grad is not None
            yield items, rows.grad
        self._reads.clear()

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Apply AdamW to the rows that were collected."""
        rows, gradient = self._rows, self._summed.grad
        assert gradient is not None
        w, m, v, average = self._current(rows, with_average=True)
        self.step += 1
        share = self._advance(lr)
        m.lerp_(gradient, 1 - BETA1)
        v.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        denominator = v.sqrt().div_(math.sqrt(1 - BETA2**self.step)).add_(self.epsilon)
        w.mul_(1 - lr * self.decay).addcdiv_(m, denominator, value=-lr / (1 - BETA1**self.step))
        if average is not None:
            average.lerp_(w, share)
        self._write(rows, w, m, v, average)
        if self.step - self.begin == self.coefficients.shape[1] - 1:
            self.catch_up()

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring every row up to date, for reading the weight itself."""
        for rows in torch.arange(len(self.weight), device=self.weight.device).split(ROWS):
            self._write(rows, *self._current(rows, with_average=True))
        self._open_window()

    def state(self) -> dict[str, Any]:
        """Return all that resuming needs beside the weight and its average."""
        names = "m", "v", "last", "coefficients", "step", "begin"
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        for name in ("m", "v", "last", "coefficients"):
            getattr(self, name).copy_(state[name])
        self.step, self.begin = state["step"], state["begin"]

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
        last, w, m, v = self.last[rows], self.weight.detach()[rows], self.m[rows], self.v[rows]
        coefficients = self.coefficients[:, (last - self.begin).cpu()].to(w)[..., None]
        a, b, p, q, c = coefficients
        epsilon = self.epsilon * (1 - BETA2 ** last.double()).sqrt().to(w.dtype)[:, None]
        d = m / (v.sqrt() + epsilon).clamp_min(torch.finfo(w.dtype).tiny)
        average = None
        if with_average and self.average is not None:
            average = self.average[rows].mul_(p).addcmul_(q, w).addcmul_(c, d, value=-1)
        skipped = (self.step - last).double()
        m.mul_((BETA1**skipped).to(m.dtype)[:, None])
        v.mul_((BETA2**skipped).to(v.dtype)[:, None])
        return w.mul_(a).addcmul_(b, d, value=-1), m, v, average

    def _write(self, rows: Tensor, w: Tensor, m: Tensor, v: Tensor, average: Tensor | None) -> None:
        for whole, part in ((self.weight.data, w), (self.m, m), (self.v, v), (self.average, average)):
            if whole is not None and part is not None:
                whole.index_copy_(0, rows, part)
        self.last[rows] = self.step


def sparse_rows(
    weight: nn.Parameter | None, settings: TrainingSettings, device: torch.device, sampled: bool
) -> SparseRows | None:
    """Return an object that updates a learned item embedding by rows, or None if the optimizer updates it.

    weight: the embedding, or None without one. sampled: whether the softmax is sampled; if not, a step reads all rows.
    """
    how = settings.item_embedding_updates
    if weight is None or not sampled or settings.optimizer != "adamw" or how == "all":
        return None
    if how == "auto" and (len(weight) <= ROWS_FROM or device.type != "cpu"):
        return None
    return SparseRows(weight, settings)
