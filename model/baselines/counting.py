"""Recommenders that only count the training items of users. U users, N items, B histories.

Popularity: the score of item i is its number of occurrences in training.
ItemKNN (item-based collaborative filtering: Sarwar et al., WWW 2001), for the last item l of a history:

    score of item i = n_li / (√(n_l n_i) + h)           n_i: users who had i, n_li: users who had both, h: SHRINKAGE

This is the cosine of the two items, shrunk if few users had both. Items that no user had together with l are ranked
below, by popularity.
"""

import torch
from torch import Tensor, nn

from model.base import CountingModel

SHRINKAGE = 50.0  # the best of 0, 5, 10, 20, 30, 50 and 100 on Beauty's validation set (NDCG@10 .0441; 0: .0376)


class Popularity(CountingModel):
    """Ranks items by their number of occurrences in training, the same for every user."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.register_buffer("counts", torch.zeros(num_items + 1))
        self.register_load_state_dict_pre_hook(_resize_buffers)

    def count(self, users: Tensor, items: Tensor) -> None:
        self.counts = items.bincount(minlength=self.num_items + 1).float()

    def scores(self, last: Tensor) -> Tensor:
        return self.counts.expand(len(last), -1)


class ItemKNN(Popularity):
    """Ranks items by how often users had them together with the last item of a history.

    Neighbours are stored sparsely: entries begins[i] to begins[i + 1] hold the neighbours of item i and their
    similarities.
    """

    def __init__(self, num_items: int) -> None:
        super().__init__(num_items)
        self.register_buffer("begins", torch.zeros(num_items + 2, dtype=torch.int64))
        self.register_buffer("neighbours", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("alike", torch.zeros(0))

    def count(self, users: Tensor, items: Tensor) -> None:
        """As Popularity. An item that a user had twice counts once here. Needs memory for Σ_u (items of u)² pairs."""
        super().count(users, items)
        users, items = torch.stack([users, items]).unique(dim=1)  # sorted by user
        n = items.bincount(minlength=self.num_items + 1).double()
        length = users.bincount()
        entry, place = entries((length.cumsum(dim=0) - length)[users], length[users])
        pairs, n_ij = (items[entry] * (self.num_items + 1) + items[place]).unique(return_counts=True)
        i, j = pairs // (self.num_items + 1), pairs % (self.num_items + 1)
        i, j, n_ij = (part[i != j] for part in (i, j, n_ij))
        self.neighbours, self.alike = j, (n_ij / ((n[i] * n[j]).sqrt() + SHRINKAGE)).float()
        self.begins = torch.searchsorted(i, torch.arange(self.num_items + 2, device=i.device))

    def scores(self, last: Tensor) -> Tensor:
        scores = (self.counts / (self.counts.max() + 1) - 1).repeat(len(last), 1)  # negative, unlike any similarity
        row, entry = entries(self.begins[last], self.begins[last + 1] - self.begins[last])
        scores[row, self.neighbours[entry]] = self.alike[entry]
        return scores


def entries(begins: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return (row, entry) of the entries begins[b], begins[b] + 1, ... of every row b, lengths[b] of them."""
    row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return row, torch.arange(len(row), device=row.device) - (lengths.cumsum(dim=0) - lengths - begins)[row]


def _resize_buffers(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give the buffers the shapes that are loaded: the number of neighbours is only known once counted."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if prefix + name in state:
            setattr(module, name, buffer.new_empty(state[prefix + name].shape))
