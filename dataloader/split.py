"""Split every user's sequence leave-one-out, or by time.

With a user's items v, oldest first: train on v[:-2], validate on v[-2] given v[:-2], test on v[-1] given v[:-1].
By time: train on what comes before validation begins. Validate and test on the first item of each period, given all
items before it, for users who have both.
The model reads the last L items of a history (L: lru_max_len). Rows are ragged and stored flat. `position` counts the
steps since the LRU's initial state, so rows can be concatenated (model/lru.py). U users.
"""

from dataclasses import dataclass

import numpy as np

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
