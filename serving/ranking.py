"""Answer requests: read histories, batch them, rank items. B users, N items, m the size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from serving.catalogue import Catalogue
from serving.engines import Encoder, VectorEngine, bias_before_scaling
from serving.filters import Choice, listed
from serving.items import ItemId
from serving.snapshot import Snapshot, check_state
from serving.states import State, encode

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
        z = encode(now.engine, table, now.eigenvalues, filled(now, batch))[0]
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
