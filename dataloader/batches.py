"""Packed batches: the rows of a batch one after another, with nothing between them. B rows, T tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataloader.split import EvalRows, TrainRows, ranges


@dataclass(frozen=True)
class Batch:
    """Rows to train on, and padding behind them: tokens 0 at position 0 without a label."""

    tokens: Tensor  # [T] int64; 0 begins a sequence
    labels: Tensor  # [T] int64; 0: none
    position: Tensor  # [T] int64, steps since the LRU's state was empty
    longest: int  # the most tokens of one row


@dataclass(frozen=True)
class EvalBatch:
    """Rows to rank."""

    tokens: Tensor  # [T] int64
    position: Tensor  # [T] int64
    longest: int
    last: Tensor  # [B] int64, where each row's last token is in tokens
    targets: Tensor  # [B] int64
    seen_rows: Tensor  # [S] int64, with seen_items: (row, item) of the whole histories
    seen_items: Tensor  # [S] int64


class TrainLoader:
    """Batches of an epoch in an order that depends on seed and epoch alone, so that a resumed run sees the same ones.

    The rows live on the device, and so does the epoch's order.
    """

    def __init__(self, rows: TrainRows, batch_size: int, seed: int, device: torch.device) -> None:
        self.offsets, self.batch_size, self.seed, self.device = rows.offsets, batch_size, seed, device
        self.tokens, self.labels, self.position = (
            torch.as_tensor(np.append(array, 0), device=device) for array in (rows.tokens, rows.labels, rows.position)
        )  # the last is padding

    def __len__(self) -> int:
        """Steps in an epoch."""
        return -(-(len(self.offsets) - 1) // self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch: every user once."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.offsets) - 1)
        begins, ends = self.offsets[order], self.offsets[order + 1]
        _, index, offsets = ranges(begins, ends)
        starts = range(0, len(order), self.batch_size)
        batches = [index[offsets[start] : offsets[min(start + self.batch_size, len(order))]] for start in starts]
        padded = [np.pad(of, (0, bucket(len(of)) - len(of)), constant_values=len(self.tokens) - 1) for of in batches]
        # Once an epoch: a copy would make a GPU wait in every step.
        index = torch.as_tensor(np.concatenate(padded), device=self.device)
        for start, of_batch in zip(starts, index.split([len(of) for of in padded]), strict=True):
            part = slice(start, start + self.batch_size)
            longest = int((ends[part] - begins[part]).max())
            yield Batch(self.tokens[of_batch], self.labels[of_batch], self.position[of_batch], longest)


def bucket(num_tokens: int) -> int:
    """The number of tokens that so many are padded to: a power of two up to 128, then a multiple of it. Batches then
    come in few shapes; for a new one, a CPU in bfloat16 prepares its products longer than it computes them."""
    return -(-num_tokens // 128) * 128 if num_tokens > 128 else 2 ** (num_tokens - 1).bit_length()


def eval_batches(rows: EvalRows, batch_size: int, device: torch.device) -> Iterator[EvalBatch]:
    """Every user once, in order."""
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        _, read, offsets = ranges(rows.starts[part], rows.ends[part])
        seen_rows, seen, _ = ranges(rows.begins[part], rows.ends[part])
        lengths = np.diff(offsets)
        arrays = {
            "tokens": rows.items[read],
            "position": np.arange(len(read)) - np.repeat(offsets[:-1], lengths),
            "last": offsets[1:] - 1,
            "targets": rows.targets[part],
            "seen_rows": seen_rows,
            "seen_items": rows.items[seen],
        }
        tensors = {name: torch.as_tensor(array, device=device) for name, array in arrays.items()}
        yield EvalBatch(longest=int(lengths.max()), **tensors)
