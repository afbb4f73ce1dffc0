"""Reviews to sequences: filters down to the k-core, histories in the order of time, users and items numbered.

n reviews, U users, N items.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from config import InputError
from datasets.amazon import Reviews
from datasets.catalog import Sequences


@dataclass(frozen=True)
class Prepared:
    """Sequences of user rows 0..U-1 over items 1..N, and whose they are."""

    sequences: Sequences
    users: list[str]  # [U]
    items: list[str]  # [N]; item i is items[i - 1]
    filters: list[dict[str, Any]] = field(default_factory=list)  # users, items and interactions after each


def make_sequences(
    reviews: Reviews, *, min_uc: int = 5, min_sc: int = 5, min_rating: float = 0.0, repeats: str = "keep"
) -> Prepared:
    """Leave out reviews rated below `min_rating` (0: none), with `repeats` "drop" all but the first of a user for an
    item, and then, again and again, users with fewer than `min_uc` reviews and items with fewer than `min_sc`.

    A history is in the order of time, reviews of the same time in that of the file. Users are numbered in the order of
    their first line in the file, items in that of their first appearance when the users' histories are read in turn.
    Raises InputError where nothing is left, naming a k that would leave something.
    """
    filters: list[dict[str, Any]] = []

    def count(name: str, rows: np.ndarray) -> None:
        users, items = (len(np.unique(column[rows])) for column in (reviews.user, reviews.item))
        filters.append({"after": name, "users": users, "items": items, "interactions": len(rows)})

    rows = np.lexsort((reviews.time, reviews.user))  # stable, so that equal times stay in the file's order
    count("reading", rows)
    if min_rating > 0:
        rows = rows[reviews.rating[rows] >= min_rating]  # a review without rating fails too
        count(f"ratings below {min_rating:g} left out", rows)
    if repeats == "drop":
        pairs = reviews.user[rows].astype(np.int64) * len(reviews.items) + reviews.item[rows]
        rows = rows[np.sort(np.unique(pairs, return_index=True)[1])]
        count("repeats left out", rows)
    core = k_core(reviews.user[rows], reviews.item[rows], min_uc, min_sc)
    if not len(core):
        raise InputError(_nothing_left(reviews.user[rows], reviews.item[rows], min_uc, min_sc))
    rows = rows[core]
    count(f"{min_uc}-core of users, {min_sc}-core of items", rows)

    user, item = reviews.user[rows], reviews.item[rows]
    users, lengths = np.unique(user, return_counts=True)
    items, first, code = np.unique(item, return_index=True, return_inverse=True)
    order = np.argsort(first)  # items by first appearance
    number = np.empty(len(items), dtype=np.int64)
    number[order] = np.arange(1, len(items) + 1)
    sequences = Sequences(number[code], np.concatenate([[0], np.cumsum(lengths)]))
    names = [reviews.users[u] for u in users], [reviews.items[i] for i in items[order]]
    return Prepared(sequences, *names, filters)


def k_core(user: np.ndarray, item: np.ndarray, min_uc: int, min_sc: int) -> np.ndarray:
    """The rows [n'] of the largest set of reviews [n] in which every user has `min_uc` and every item `min_sc`."""
    rows = np.arange(len(user))
    while True:
        users, items = user[rows], item[rows]
        stays = (np.bincount(users)[users] >= min_uc) & (np.bincount(items)[items] >= min_sc)
        if stays.all():
            return rows
        rows = rows[stays]


def _nothing_left(user: np.ndarray, item: np.ndarray, min_uc: int, min_sc: int) -> str:
    if not len(user):
        return "no review is left before the k-core: lower --min_rating"
    left = 0
    while not left:  # ends at 1-core, which is everything
        min_uc, min_sc = max(1, min_uc - 1), max(1, min_sc - 1)
        left = len(k_core(user, item, min_uc, min_sc))
    return (
        f"the k-core leaves none of {len(user):,} reviews; --min_uc {min_uc} --min_sc {min_sc} would leave {left:,} of "
        f"them"
    )
