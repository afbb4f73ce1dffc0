"""Packed batches: the rows of a batch one after another, with nothing between them. B rows, T tokens.

Ranks, processes that train together, share a batch out: each holds a run of its rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataloader.split import EvalRows, TrainRows, ranges


@dataclass(frozen=True)
class Batch:
    """Rows to train on, and padding behind them: tokens 0 at position 0 without a label.

    A rank has a share of the rows, which may be none: then there is nothing but padding.
    """

    tokens: Tensor  # [T] int64; 0 begins a sequence
    labels: Tensor  # [T] int64; 0: none
    position: Tensor  # [T] int64, steps since the LRU's state was empty
    longest: int  # the most tokens of one row
    share: tuple[int, int]  # where these rows begin in the batch of all ranks, and how many tokens that is padded to
    num_labels: Tensor  # a scalar int64, of the batch of all ranks


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

    def __init__(
        self, rows: TrainRows, batch_size: int, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> None:
        """batch_size: rows of a batch, of which this loader gives the share of `rank` of `world_size`."""
        self.offsets, self.num_users = rows.offsets, len(rows)
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.rank, self.world_size = rank, world_size
        self.tokens, self.labels, self.position = (
            torch.as_tensor(np.append(array, 0), device=device) for array in (rows.tokens, rows.labels, rows.position)
        )  # the last is padding

    def __len__(self) -> int:
        """Steps in an epoch."""
        return -(-self.num_users // self.batch_size)

    def label_counts(self, num_items: int) -> Tensor:
        """How often each token is a label: [N+1]."""
        return self.labels[:-1].bincount(minlength=num_items + 1)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch: every user once."""
        order = np.random.default_rng([self.seed, number]).permutation(self.num_users)
        begins, ends = self.offsets[order], self.offsets[order + 1]
        _, index, offsets = ranges(begins, ends)
        padded, longest, shares, counts = [], [], [], []
        for start in range(0, len(order), self.batch_size):
            batch = offsets[start : start + self.batch_size + 1]
            low, high = share_rows(batch - batch[0], self.world_size)[self.rank : self.rank + 2]
            begin, first, last, end = batch[[0, low, high, -1]].tolist()
            padding = (0, bucket(last - first) - (last - first))
            padded.append(np.pad(index[first:last], padding, constant_values=len(self.tokens) - 1))
            longest.append(int(np.diff(batch[low : high + 1]).max(initial=1)))
            shares.append((first - begin, bucket(end - begin)))
            counts.append(end - begin)  # every token has one
        # Once an epoch: a copy would make a GPU wait in every step.
        index = torch.as_tensor(np.concatenate(padded), device=self.device).split([len(part) for part in padded])
        num_labels = torch.as_tensor(counts, device=self.device).unbind()
        for i, most, share, labelled in zip(index, longest, shares, num_labels, strict=True):
            yield Batch(self.tokens[i], self.labels[i], self.position[i], most, share, labelled)


def share_rows(offsets: np.ndarray, world_size: int) -> np.ndarray:
    """Share rows out in runs of about equally many tokens: rank r has the rows cuts[r]:cuts[r + 1].

    offsets: [B + 1], row b is the tokens offsets[b]:offsets[b + 1]. Returns cuts [world_size + 1], each the end of a
    row that is nearest to an equal share.
    """
    middles = (offsets[:-1] + offsets[1:]) / 2
    return np.searchsorted(middles, offsets[-1] * np.arange(world_size + 1) / world_size, side="right")


def bucket(num_tokens: int) -> int:
    """The number of tokens that so many are padded to: a power of two up to 128, then a multiple of it. Batches then
    come in few shapes; for a new one, a CPU in bfloat16 prepares its products longer than it computes them."""
    return -(-num_tokens // 128) * 128 if num_tokens > 128 else 2 ** (max(num_tokens, 1) - 1).bit_length()


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
