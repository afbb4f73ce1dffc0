"""Leave-one-out: of a user's items v, train on v[:-2], validate on v[-2] given v[:-2], test on v[-1] given v[:-1].

A history is its last L items (L: lru_max_len). Rows are ragged and flat; `position` counts the steps since the LRU's
state was empty, so that rows can be packed one after another (model/lru.py). U users.
"""

from dataclasses import dataclass

import numpy as np

from common.errors import InputError
from datasets.catalog import Sequences


@dataclass(frozen=True)
class TrainRows:
    """One row a user: row u is tokens[offsets[u]:offsets[u + 1]], and at each token the item that came next.

    A row whose training items all fit into L begins with token 0, begin of sequence, whose label is the first item,
    unless first items are to be no labels. That token's state is not carried on, so both it and the item after it have
    position 0.
    """

    tokens: np.ndarray  # [n] int64
    labels: np.ndarray  # [n] int64
    position: np.ndarray  # [n] int64
    offsets: np.ndarray  # [U + 1] int64

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class EvalRows:
    """One row a user: read items[starts[u]:ends[u]], rank targets[u]. The whole history is items[begins[u]:ends[u]]."""

    items: np.ndarray  # [n] int64, of all users
    begins: np.ndarray  # [U] int64
    starts: np.ndarray  # [U] int64, at most L before ends
    ends: np.ndarray  # [U] int64
    targets: np.ndarray  # [U] int64

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, start: int, stop: int) -> "EvalRows":
        """The rows start:stop."""
        begins, starts, ends, targets = (
            rows[start:stop] for rows in (self.begins, self.starts, self.ends, self.targets)
        )
        return EvalRows(self.items, begins, starts, ends, targets)


def train_rows(sequences: Sequences, max_len: int, first_item: bool = True) -> TrainRows:
    """The training items v[:-2] of every user as inputs and labels. first_item: a user's first item is a label too;
    otherwise no token 0 is read, and users with a single training item have no row. Raises InputError if none is
    left."""
    begins, ends = sequences.offsets[:-1], sequences.offsets[1:] - 2
    if not first_item:
        several = ends - begins > 1
        begins, ends = begins[several], ends[several]
        if not len(begins):
            raise InputError("no user has two training items; without --first_item_label there is nothing to learn")
    first_label = np.maximum(begins if first_item else begins + 1, ends - max_len)
    rows, label_at, offsets = ranges(first_label, ends)
    starts_sequence = label_at == begins[rows]
    tokens = np.where(starts_sequence, 0, sequences.items[label_at - 1])
    # The first token read: the item before the first label, or the first item where a token 0 comes before it.
    first_read = np.maximum(first_label - 1, begins)
    position = np.maximum(label_at - 1 - first_read[rows], 0)
    return TrainRows(tokens, sequences.items[label_at], position, offsets)


def train_items(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """All training items v[:-2], however many: (user, item) of each, users from 0."""
    users, places, _ = ranges(sequences.offsets[:-1], sequences.offsets[1:] - 2)
    return users, sequences.items[places]


def eval_rows(sequences: Sequences, max_len: int, part: str) -> EvalRows:
    """Histories and targets of "val" (v[-2] given v[:-2]) or "test" (v[-1] given v[:-1])."""
    begins, ends = sequences.offsets[:-1], sequences.offsets[1:] - {"val": 2, "test": 1}[part]
    return EvalRows(sequences.items, begins, np.maximum(begins, ends - max_len), ends, sequences.items[ends])


def times_trained(sequences: Sequences, num_items: int) -> np.ndarray:
    """How often each token is among the training items v[:-2]: [N + 1] int64."""
    return np.bincount(train_items(sequences)[1], minlength=num_items + 1)


def ranges(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ranges starts[u]:ends[u] one after another: (u of each element, the element, offsets [U + 1])."""
    lengths = ends - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.repeat(np.arange(len(starts)), lengths)
    return rows, np.arange(offsets[-1]) - offsets[rows] + starts[rows], offsets
