"""Which items a call may recommend, and what is added to their scores. N items."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import InputError
from serving.catalogue import Catalogue
from serving.states import State

FEW = 8  # up to one item in 8 is ranked from gathered rows; more are ranked from the whole table


@dataclass(frozen=True, eq=False)
class Choice:
    """The items of a filter in one catalogue, removed ones left out."""

    count: int
    numbers: np.ndarray | None  # sorted; None: all
    boost: np.ndarray | None
    bias: np.ndarray | None  # [1, table.width]: 0 or the boost, -inf for all others; None: few items, to be gathered

    def boost_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return what is added to the scores of some items [n]."""
        if self.boost is None:
            return np.zeros(len(numbers), dtype=np.float32)
        padded = np.append(self.boost, np.float32(0))
        return padded[np.minimum(numbers - 1, len(self.boost))]


class Filter:
    """Which items may be recommended, and what is added to their scores; `Recommender.filter` makes one.

    It holds item numbers, so it stays valid while items are added, updated and removed, but not after a reload. It
    keeps what it computed for the newest catalogue, so using it again costs nothing.
    """

    def __init__(
        self, catalogue: Catalogue, numbers: np.ndarray | None, boost: np.ndarray | None, notes: Sequence[str] = ()
    ) -> None:
        """numbers: allowed items, sorted and unique; None: all. boost [n]: for items 1..n; later ones get 0."""
        self.numbers, self.boost, self.notes = numbers, boost, list(notes)
        self._exported = catalogue.exported
        self._last: tuple[weakref.ref[Catalogue], Choice] | None = None  # keeps no old table in memory

    def choice(self, catalogue: Catalogue, gather: bool = False) -> Choice:
        """Return the filter's items in this catalogue. gather: even if there are many.

        Raises InputError if the catalogue is of another export, whose items have other numbers.
        """
        last = self._last
        if last is None or last[0]() is not catalogue:
            if catalogue.exported is not self._exported:
                raise InputError("the filter was made before the export was reloaded; make it again: filter()")
            last = self._last = (weakref.ref(catalogue), self._choose(catalogue, gather))
        return last[1]

    def _choose(self, catalogue: Catalogue, gather: bool) -> Choice:
        count, numbers, bias = catalogue.count, self.numbers, catalogue.bias
        if numbers is not None:
            numbers = numbers[~catalogue.is_removed(numbers)]
            count = len(numbers)
            if gather or count * FEW <= len(catalogue):
                return Choice(count, numbers, self.boost, None)
            bias = np.full_like(bias, -np.inf)
            bias[0, numbers] = 0
        if self.boost is not None:
            bias = bias.copy() if numbers is None else bias
            bias[0, 1 : len(self.boost) + 1] += self.boost
        return Choice(count, numbers, self.boost, bias)


def filters_of(catalogue: Catalogue, candidates: Any, boost: Any, users: int) -> list[Filter]:
    """Return one filter for all users, or one for each."""
    if isinstance(candidates, Filter):
        if boost is not None:
            raise InputError("candidates is a filter, so give the boost to it: filter(items, boost)")
        return [candidates]
    if candidates is not None:
        candidates = list(listed(candidates, "candidates", "['id', 'id'], or a list of them for each history"))
        if candidates and not any(isinstance(each, str | int | np.integer | np.bool_) for each in candidates):
            if len(candidates) != users:
                raise InputError(f"{len(candidates)} lists of candidates for {users} histories; give one for each")
            return [
                make_filter(catalogue, listed(each, "each of the candidates", "['id']"), boost) for each in candidates
            ]
    chosen = make_filter(catalogue, candidates, boost)
    if candidates is not None and not len(chosen.numbers if chosen.numbers is not None else ()):
        raise InputError("no candidate is known, so there is nothing to rank; give ids of this catalogue")
    return [chosen]


def make_filter(catalogue: Catalogue, items: Any, boost: Any) -> Filter:
    """Return a filter. items: ids or a mask; None: all. Raises InputError if a mask or a boost does not fit."""
    numbers, notes = None, []
    if items is not None:
        items = items if isinstance(items, np.ndarray) else list(listed(items, "items", "['id', 'id']"))
        if len(items) and isinstance(items[0], bool | np.bool_):
            mask = np.asarray(items)
            if mask.dtype != bool or mask.ndim != 1 or len(mask) > len(catalogue):
                raise InputError(f"a mask must have a truth value for each of at most {len(catalogue)} items")
            numbers = np.flatnonzero(mask) + 1
        else:
            known, unknown = catalogue.known(items)
            numbers = np.unique(np.array(known, dtype=np.int64))
            if unknown:
                notes.append(f"candidates {catalogue.unknown(unknown)}; skipped")
    if boost is not None:
        try:
            boost = np.asarray(boost)
        except ValueError:  # of lists of several lengths
            boost = np.empty((0, 0))
        if boost.ndim != 1 or boost.dtype.kind not in "iuf" or len(boost) > len(catalogue):
            raise InputError(f"boost must be an array of at most {len(catalogue)} numbers, one for each item")
        boost = boost.astype(np.float32)
        if not np.isfinite(boost).all():
            raise InputError("boost must be finite; leave items out by a mask: filter(mask, boost)")
    return Filter(catalogue, numbers, boost, notes)


def listed(values: Any, what: str, example: str) -> Iterable:
    """Return `values` if it is list-like. Raises InputError for a string, a dict or a single value."""
    if isinstance(values, str | bytes | State | Mapping) or not isinstance(values, Iterable):
        raise InputError(f"{what} must be a list such as {example}, not {values!r:.80}")
    return values
