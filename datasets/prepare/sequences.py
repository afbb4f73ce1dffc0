"""Reviews to sequences: filters down to the k-core, histories in the order of time, users and items numbered.

n reviews, U users, N items.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import InputError
from datasets.catalog import MIN_ITEMS, Sequences
from datasets.prepare.amazon import Reviews


@dataclass(frozen=True)
class Prepared:
    """Sequences of user rows 0..U-1 over items 1..N, and whose they are."""

    sequences: Sequences
    users: list[str]  # [U]
    items: list[str]  # [N]; item i is items[i - 1]
    filters: list[dict[str, Any]]  # users, items and interactions after each


def make_sequences(
    reviews: Reviews, *, min_uc: int, min_sc: int, min_rating: float = 0.0, repeats: str = "keep"
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
    if lengths.max() < MIN_ITEMS:
        raise InputError(
            f"no user has {MIN_ITEMS} reviews or more (one each to train, validate and test on); lower --min_sc"
        )
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
    """What would leave something: the smallest change to one of the two, or to both."""
    if not len(user):
        return "no review is left before the k-core: lower --min_rating"
    uc, sc = (min(k, int(np.bincount(column).max())) for k, column in ((min_uc, user), (min_sc, item)))

    def largest(pair: Callable[[int], tuple[int, int]], most: int) -> tuple[int, int]:
        """The pair of the largest k up to `most` that leaves something; of 0 where none does."""
        return pair(bisect_left(range(1, most + 1), True, key=lambda k: not len(k_core(user, item, *pair(k)))))

    pairs = [
        largest(lambda k: (k, min_sc), uc),
        largest(lambda k: (min_uc, k), sc),
        largest(lambda k: (min(k, min_uc), min(k, min_sc)), max(uc, sc)),
    ]
    better = min((pair for pair in pairs if 0 not in pair), key=lambda pair: min_uc + min_sc - sum(pair))
    return (
        f"the k-core leaves none of {len(user):,} reviews; --min_uc {better[0]} --min_sc {better[1]} would leave "
        f"{len(k_core(user, item, *better)):,} of them"
    )
