"""Split every user's sequence leave-one-out or by time, and pack the rows into batches without padding.

With a user's items v, oldest first: train on v[:-2], validate on v[-2] given v[:-2], test on v[-1] given v[:-1].
By time: train on what comes before validation begins. Validate and test on the first item of each period, given all
items before it, for users who have both.

The model reads the last L items of a history (L: lru_max_len). Rows are ragged and stored flat. `position` counts the
steps since the LRU's initial state, so rows can be concatenated (model/lru.py).

In distributed training each rank holds a contiguous share of a batch's rows. U users, B rows of a batch, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from datasets.catalog import Sequences


@dataclass(frozen=True)
class TrainRows:
    """One training row per user: row u has tokens[offsets[u]:offsets[u + 1]].

    Each token is labelled with the next item. If all training items fit in L and first items are labels, a row begins
    with token 0 (begin of sequence), whose label is the first item. Its state is not carried over, so this token and
    the next one both have position 0.
    """

    tokens: np.ndarray  # [n] int64
    labels: np.ndarray  # [n] int64
    position: np.ndarray  # [n] int64
    offsets: np.ndarray  # [U + 1] int64

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class EvalRows:
    """One evaluation row per user (by time: per user with a target): read items[starts[u]:ends[u]], rank targets[u].

    The complete history is items[begins[u]:ends[u]].
    """

    items: np.ndarray  # [n] int64, all users
    begins: np.ndarray  # [U] int64
    starts: np.ndarray  # [U] int64, at least ends - L
    ends: np.ndarray  # [U] int64
    targets: np.ndarray  # [U] int64

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, start: int, stop: int) -> "EvalRows":
        """Return the rows start:stop."""
        begins, starts, ends, targets = (
            rows[start:stop] for rows in (self.begins, self.starts, self.ends, self.targets)
        )
        return EvalRows(self.items, begins, starts, ends, targets)


def train_rows(sequences: Sequences, max_len: int, first_item: bool = True) -> TrainRows:
    """Return the training items of every user as inputs and labels.

    first_item: whether a user's first item is a label. If not, there is no token 0, and users with one training item
    have no row; raises InputError if no row is left. By time, users without a training item have no row.
    """
    begins, ends = sequences.offsets[:-1], train_ends(sequences)
    begins, ends = begins[ends > begins], ends[ends > begins]
    if not first_item:
        trainable = ends - begins > 1
        begins, ends = begins[trainable], ends[trainable]
        if not len(begins):
            raise InputError("no user has two training items, so nothing can be learned; give --first_item_label")
    first_label = np.maximum(begins if first_item else begins + 1, ends - max_len)
    rows, label_at, offsets = ranges(first_label, ends)
    starts_sequence = label_at == begins[rows]
    tokens = np.where(starts_sequence, 0, sequences.items[label_at - 1])
    # The first token at position 0: the item before the first label, or the first item if token 0 precedes it.
    first_read = np.maximum(first_label - 1, begins)
    position = np.maximum(label_at - 1 - first_read[rows], 0)
    return TrainRows(tokens, sequences.items[label_at], position, offsets)


def train_items(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Return (users, items) of all training items; users count from 0."""
    users, places, _ = ranges(sequences.offsets[:-1], train_ends(sequences))
    return users, sequences.items[places]


def train_ends(sequences: Sequences) -> np.ndarray:
    """Return the end of every user's training items in `sequences.items`: [U] int64."""
    if sequences.cuts is None:
        return sequences.offsets[1:] - 2
    return sequences.offsets[:-1] + sequences.cuts[:, 0]


def eval_rows(sequences: Sequences, max_len: int, part: str) -> EvalRows:
    """Return histories and targets of the split `part`: "val" or "test"."""
    begins, ends = sequences.offsets[:-1], sequences.offsets[1:] - {"val": 2, "test": 1}[part]
    if sequences.cuts is not None:
        first, last = {"val": (0, 1), "test": (1, 2)}[part]
        bounds = np.column_stack([begins[:, None] + sequences.cuts, sequences.offsets[1:]])
        has_target = (bounds[:, first] > begins) & (bounds[:, last] > bounds[:, first])
        begins, ends = begins[has_target], bounds[has_target, first]
    return EvalRows(sequences.items, begins, np.maximum(begins, ends - max_len), ends, sequences.items[ends])


def times_trained(sequences: Sequences, num_items: int) -> np.ndarray:
    """Count how often each token occurs in the training items: [N + 1] int64."""
    return np.bincount(train_items(sequences)[1], minlength=num_items + 1)


def ranges(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concatenate the ranges starts[u]:ends[u].

    Returns u of each element, the elements, and offsets [U + 1].
    """
    lengths = ends - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.repeat(np.arange(len(starts)), lengths)
    return rows, np.arange(offsets[-1]) - offsets[rows] + starts[rows], offsets


# -------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Training rows of one rank, followed by padding.

    Padding is token 0 at position 0 without a label. A rank's share may be empty; its batch is then padding only.
    """

    tokens: Tensor  # [T] int64; 0: begin of sequence
    labels: Tensor  # [T] int64; 0: no label
    position: Tensor  # [T] int64, steps since the LRU's initial state
    longest: int  # tokens of the longest row
    # The first token's offset in the batch of all ranks, and that batch's padded length.
    share: tuple[int | Tensor, int]
    num_labels: Tensor  # scalar int64, in the batch of all ranks


@dataclass(frozen=True)
class EvalBatch:
    """Evaluation rows."""

    tokens: Tensor  # [T] int64
    position: Tensor  # [T] int64
    longest: int
    last: Tensor  # [B] int64, index of each row's last token in tokens
    targets: Tensor  # [B] int64
    seen_rows: Tensor  # [S] int64, row of each item of the complete histories
    seen_items: Tensor  # [S] int64, that item


class TrainLoader:
    """Training batches in an order that depends only on seed and epoch.

    A resumed run therefore sees the same batches. Rows and the epoch's order live on the device.
    """

    def __init__(
        self, rows: TrainRows, batch_size: int, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> None:
        """batch_size: rows per batch over all ranks, of which `rank` gets a share."""
        self.offsets, self.num_users = rows.offsets, len(rows)
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.rank, self.world_size = rank, world_size
        self.tokens, self.labels, self.position = (
            torch.as_tensor(np.append(array, 0), device=device) for array in (rows.tokens, rows.labels, rows.position)
        )  # the appended 0 is the padding token

    def __len__(self) -> int:
        """Return the number of steps per epoch."""
        return -(-self.num_users // self.batch_size)

    def label_counts(self, num_items: int) -> Tensor:
        """Count how often each token is a label: [N+1]."""
        return self.labels[:-1].bincount(minlength=num_items + 1)

    def token_counts(self, num_items: int) -> Tensor:
        """Count how often each token occurs in the rows, as an input or as a label: [N+1]."""
        first = self.tokens[torch.as_tensor(self.offsets[:-1], device=self.device)]  # every other input is a label too
        return self.label_counts(num_items) + first.bincount(minlength=num_items + 1)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of one epoch; every user occurs once."""
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
            counts.append(end - begin)  # every token has a label
        # Copy once per epoch: a copy in every step would make the GPU wait.
        index = torch.as_tensor(np.concatenate(padded), device=self.device).split([len(tokens) for tokens in padded])
        num_labels = torch.as_tensor(counts, device=self.device).unbind()
        for i, length, share, count in zip(index, longest, shares, num_labels, strict=True):
            yield Batch(self.tokens[i], self.labels[i], self.position[i], length, share, count)


def share_rows(offsets: np.ndarray, world_size: int) -> np.ndarray:
    """Split rows into contiguous shares with about the same number of tokens.

    offsets: [B + 1]; row b has the tokens offsets[b]:offsets[b + 1].
    Returns cuts [world_size + 1]; rank r gets the rows cuts[r]:cuts[r + 1].
    """
    middles = (offsets[:-1] + offsets[1:]) / 2
    return np.searchsorted(middles, offsets[-1] * np.arange(world_size + 1) / world_size, side="right")


def bucket(num_tokens: int) -> int:
    """Return a batch's padded length: a power of two to 128, then a multiple of 128.

    This limits the number of batch shapes: a CPU in bfloat16 prepares each new shape for longer than it computes it.
    """
    return -(-num_tokens // 128) * 128 if num_tokens > 128 else 2 ** (max(num_tokens, 1) - 1).bit_length()


def eval_batches(rows: EvalRows, batch_size: int, device: torch.device) -> Iterator[EvalBatch]:
    """Yield evaluation batches with every user once, in order."""
    for start in range(0, len(rows), batch_size):
        users = slice(start, start + batch_size)
        _, read, offsets = ranges(rows.starts[users], rows.ends[users])
        seen_rows, seen, _ = ranges(rows.begins[users], rows.ends[users])
        lengths = np.diff(offsets)
        arrays = {
            "tokens": rows.items[read],
            "position": np.arange(len(read)) - np.repeat(offsets[:-1], lengths),
            "last": offsets[1:] - 1,
            "targets": rows.targets[users],
            "seen_rows": seen_rows,
            "seen_items": rows.items[seen],
        }
        tensors = {name: torch.as_tensor(array, device=device) for name, array in arrays.items()}
        yield EvalBatch(longest=int(lengths.max()), **tensors)
