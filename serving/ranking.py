"""Answer requests: read histories, batch them, rank items. B users, N items, m the size."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import InputError, shown
from serving.catalogue import Catalogue, Snapshot, check_state
from serving.engines import Encoder, State, VectorEngine, bias_before_scaling, encode_by_steps
from serving.folder import ItemId

SCORES = 1 << 21  # user-item scores held at once
TOGETHER = 64  # histories encoded at once; larger batches add padding and are no faster
FEWEST_COLUMNS = 64  # products with fewer columns may round differently than those with the whole table


@dataclass(frozen=True)
class Recommendation:
    """The recommendations for one history, best first."""

    ids: list[str]
    numbers: list[int]  # item numbers, 1-based
    titles: list[str]
    scores: list[float]
    notes: list[str]  # which parts of the request were skipped
    unknown: int = 0  # how many items of the history are unknown


@dataclass(frozen=True)
class Request:
    """A history or a state, as it was understood."""

    state: State | None
    items: tuple[int, ...]  # known items, oldest first
    notes: list[str]
    unknown: int = 0


def read_request(now: Snapshot, history: Sequence[ItemId] | State) -> Request:
    """Look up a history's items, or check a state. Raises InputError for a state of another model."""
    longest, notes = now.config["max_len"], []
    if isinstance(history, State):
        check_state(now, history)
        if len(history.items) > longest:
            notes.append(f"the state remembers {len(history.items)} items, training had at most {longest}")
        return Request(history, history.items, notes)
    items, unknown = now.catalogue.known(listed(history, "each of the histories", "['id', 'id']"))
    if unknown:
        notes.append(f"{now.catalogue.unknown(unknown)}; skipped")
    if unknown and not items:
        notes.append("no item of the history is known: this is the answer for an empty history")
    if len(items) > longest:
        notes.append(f"the last {longest} of {len(items)} items are read, as in training")
    return Request(None, tuple(items), notes, len(unknown))


def batches(requests: list[Request], choices: list[Choice], whole: int) -> Iterable[list[int]]:
    """Yield the rows of each batch: states apart from histories, histories sorted by length.

    whole: how many rows the table has.
    """
    largest = max([choice.count for choice in choices if choice.bias is None], default=0)
    columns = whole if any(choice.bias is not None for choice in choices) else min(whole, TOGETHER * (1 + largest))
    together = max(1, min(TOGETHER, SCORES // columns))
    for states in (True, False):
        rows = [row for row, request in enumerate(requests) if (request.state is not None) == states]
        rows.sort(key=lambda row: len(requests[row].items))
        yield from (rows[start : start + together] for start in range(0, len(rows), together))


def filled(now: Snapshot, batch: list[Request]) -> np.ndarray:
    """Return [B, L]: the last items of each history, left-padded with 0."""
    longest = min(now.config["max_len"], max([1, *(len(request.items) for request in batch)]))
    histories = np.zeros((len(batch), longest), dtype=np.int64)
    for row, request in enumerate(batch):
        if request.items:
            histories[row, -len(request.items[-longest:]) :] = request.items[-longest:]
    return histories


def vectors_of(now: Snapshot, batch: list[Request]) -> np.ndarray:
    """Return the vectors to rank with [B, m] (or [B, w]) of a batch, which has only states or only histories."""
    table = now.catalogue.table
    if states := [request.state for request in batch if request.state]:
        z = np.stack([state.z for state in states])
    elif isinstance(now.engine, Encoder):
        z = now.engine.encode(filled(now, batch), table)
    elif table.wide is not table:
        assert isinstance(now.engine, VectorEngine)  # baselines have one width
        z = now.engine.vectors(filled(now, batch), table)
    else:
        z = encode_by_steps(now.engine, table, now.eigenvalues, filled(now, batch))[0]
    return table.vectors_to_rank(z)


def ranked(now: Snapshot, batch: list[Request], choices: list[Choice], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, item numbers), both [B, k], best first; items that are not allowed have -inf.

    choices: one for all users, or one for each. Few items are gathered into a table of their own.
    """
    if k == 0:
        return np.zeros((len(batch), 0), dtype=np.float32), np.zeros((len(batch), 0), dtype=np.int64)
    table, read = now.catalogue.table, None
    histories = None if batch[0].state else filled(now, batch)
    if len(choices) == 1 and choices[0].bias is not None:
        bias, boosted = choices[0].bias, choices[0].boost is not None
        if now.index is not None and (now.index.any_bias or bias is now.catalogue.bias):
            assert isinstance(now.engine, VectorEngine)  # as Recommender.from_pretrained opens it
            if histories is None:
                z = vectors_of(now, batch)
            else:
                z = table.vectors_to_rank(now.engine.vectors(histories, table))
            return now.index.rank(z, table, bias, k)
    else:
        numbers = [choice.numbers for choice in choices if choice.numbers is not None]
        boosted = choices[0].boost is not None
        own_items = np.zeros(1, np.int64) if histories is None else histories.ravel()
        read = np.unique(np.concatenate([np.zeros(1, np.int64), *numbers, own_items]))
        read = np.append(read, np.full(max(0, FEWEST_COLUMNS - len(read)), read[-1]))
        table = table.gathered(read)
        bias = np.full((len(choices), table.width), -np.inf, dtype=np.float32)
        for row, (choice, own) in enumerate(zip(choices, numbers, strict=True)):
            bias[row, np.searchsorted(read, own)] = choice.boost_of(own)
        histories = None if histories is None else np.searchsorted(read, histories)
    whole = now.catalogue.table
    if histories is not None and whole.wide is whole and not (boosted and whole.scale is not None):
        scores, items = now.engine.recommend(histories, table, bias, k)
    else:
        z = vectors_of(now, batch)
        scores, items = now.engine.rank(z, table, bias_before_scaling(z, table, bias) if boosted else bias, k)
    return scores, items if read is None else read[items]


def ranked_histories(now: Snapshot, batch: list[Request], choices: list[Choice]) -> list[list[tuple[int, float]]]:
    """Return the (item, score) pairs of each request's own history items, those that its choice allows.

    choices: one for all users, or one for each. The history bias of config.json is added to the scores.
    """
    own = []
    for row, request in enumerate(batch):
        choice = choices[row if len(choices) > 1 else 0]
        numbers = np.unique(np.array(request.items, dtype=np.int64))
        numbers = numbers[~now.catalogue.is_removed(numbers)]
        if choice.numbers is not None:
            numbers = np.intersect1d(numbers, choice.numbers)
        own.append(Choice(len(numbers), numbers, choice.boost, None))
    bias = np.float32(now.config["history_bias"])
    scores, items = ranked(now, batch, own, max(choice.count for choice in own))
    return [
        [(item, score) for item, score in zip(*pair, strict=True) if score > -np.inf]
        for pair in zip(items.tolist(), (scores + bias).tolist(), strict=True)
    ]


def make_answer(
    catalogue: Catalogue, best: list[tuple[int, float]], top_k: int, notes: list[str], unknown: int = 0
) -> Recommendation:
    """Return the answer of the `best` (item, score) pairs, with a note if they are fewer than `top_k`."""
    numbers = [item for item, _ in best]
    if len(best) < top_k:
        notes = [*notes, f"only {len(best)} items are left to rank, fewer than top_k {top_k}"]
    return Recommendation(
        [catalogue.id(i) for i in numbers],
        numbers,
        [catalogue.title(i) for i in numbers],
        [score for _, score in best],
        notes,
        unknown,
    )


# -------------------------------------------------------------------------------------------------------------- filters
# Which items a call may recommend, and what is added to their scores. N items.

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
            try:
                mask = np.asarray(items)
            except ValueError:  # of lists of several lengths
                mask = np.empty(0)
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
        raise InputError(f"{what} must be a list such as {example}, not {shown(values)}")
    return values
