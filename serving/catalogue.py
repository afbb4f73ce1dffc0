"""The catalogue of a Recommender: items and their table at one moment. N items, m the size.

A catalogue never changes. `added`, `updated` and `without` return the next one, which shares its memory with this one.
Readers hold on to one catalogue and need no lock; writers take turns and always go on from the newest.

An item keeps its number (1-based) for ever, also while it is removed. An item is given by its id, a string, or by a
whole number. A whole number is the item's number, except if all ids of the export are whole numbers, such as "4711":
then 4711 means the id "4711".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, shown
from common.files import MAX_ID
from serving.engines import Engine, State, Table, decays_of, state_shape
from serving.folder import WEIGHTS, Export, ItemId, Items, make_items
from serving.index import Index
from serving.weights import rounded, whitened

HUGE = 10**MAX_ID  # no id is as long, and Python writes no number of 5,000 digits


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The items 1..N with their embeddings. Its length is N, removed items included."""

    exported: Items
    table: Table
    removed: np.ndarray  # numbers of removed items, sorted
    _titles: Mapping[int, str] = field(default_factory=dict)  # of exported items that were updated
    # Shared with the catalogues before and after this one. The table's length says which of them are in this one.
    _more: list[tuple[str, str]] = field(default_factory=list)  # (id, title) of added items
    _numbers: dict[str, int] = field(default_factory=dict)  # of added items

    def __len__(self) -> int:
        return len(self.table) - 1

    # ------------------------------------------------------------------------------------------------------- reading

    def id(self, item: int) -> str:
        """Return an item's id."""
        added = item - 1 - len(self.exported)
        return self.exported.id(item) if added < 0 else self._more[added][0]

    def title(self, item: int) -> str:
        """Return an item's title; "": it has none."""
        added = item - 1 - len(self.exported)
        if (title := self._titles.get(item)) is not None:
            return title
        return self.exported.title(item) if added < 0 else self._more[added][1]

    def number(self, item: ItemId) -> int:
        """Return an item's number, 0 if it is unknown. Raises InputError for a value that is no id and no number."""
        return self.numbers([item])[0]

    def numbers(self, items: Iterable[ItemId]) -> list[int]:
        """Return the number of each item, 0 if it is unknown; of a removed item too."""
        found: list[int] = []
        ids: dict[int, str] = {}  # place -> id that is not one of an added item
        for place, item in enumerate(items):
            if isinstance(item, bool) or not isinstance(item, str | int | np.integer):
                raise InputError(f"item {shown(item)} must be an id (a string) or a number from 1 to {len(self)}")
            if not isinstance(item, str) and not self.exported.numeric:
                found.append(int(item) if 1 <= item <= len(self) else 0)
                continue
            if not isinstance(item, str) and abs(item) >= HUGE:
                found.append(0)
                continue
            number = self._numbers.get(str(item), 0)
            found.append(number if number <= len(self) else 0)
            if not found[-1]:
                ids[place] = str(item)
        for place, number in zip(ids, self.exported.find(list(ids.values())), strict=True):
            found[place] = number
        return found

    def known(self, items: Iterable[ItemId]) -> tuple[list[int], list[ItemId]]:
        """Return (numbers of the known items, unknown items)."""
        items = list(items)
        numbers = self.numbers(items)
        return [n for n in numbers if n], [item for item, n in zip(items, numbers, strict=True) if not n]

    def unknown(self, items: Sequence[ItemId]) -> str:
        """Describe unknown items for a note or an error."""
        named = ", ".join(shown(item) for item in items[:5]) + (", ..." if len(items) > 5 else "")
        return f"unknown: {named} (of {len(self):,} items)"

    @property
    def count(self) -> int:
        """The number of items that can be recommended."""
        return len(self) - len(self.removed)

    def is_removed(self, numbers: np.ndarray | int) -> np.ndarray:
        """Return whether each item is removed, in the shape of `numbers`."""
        return np.isin(numbers, self.removed)

    @cached_property
    def bias(self) -> np.ndarray:
        """[1, table.width]: 0 for items, -inf for removed ones and for columns without an item."""
        bias = np.zeros((1, self.table.width), dtype=np.float32)
        bias[0, 0] = bias[0, len(self.table) :] = bias[0, self.removed] = -np.inf
        return bias

    # ------------------------------------------------------------------------------------------------------- changing

    def added(self, more: Items, embeddings: np.ndarray) -> Catalogue:
        """Return a catalogue with new items and embeddings [n, m]; removed items come back under their old number.

        Raises InputError for an id that exists.
        """
        ids = [more.id(i) for i in range(1, len(more) + 1)]
        titles = [more.title(i) for i in range(1, len(more) + 1)]
        numbers = np.array(self.numbers(ids), dtype=np.int64)
        exists = (numbers > 0) & ~self.is_removed(numbers)
        if exists.any():
            raise InputError(f"item {ids[int(exists.argmax())]!r} exists already; leave it out, or use update_items")
        now, back = self, np.flatnonzero(numbers)
        if len(back):
            now = self.updated(numbers[back], embeddings[back], [titles[i] for i in back])
            now = replace(now, removed=np.setdiff1d(now.removed, numbers[back]))
        new = np.flatnonzero(numbers == 0)
        table = now.table.extended(embeddings[new])
        for i in new:  # nothing can fail from here on
            self._more.append((ids[i], titles[i]))
            self._numbers[ids[i]] = len(self.exported) + len(self._more)
        return replace(now, table=table)

    def updated(
        self, numbers: np.ndarray, embeddings: np.ndarray | None, titles: Sequence[str] | None = None
    ) -> Catalogue:
        """Return a catalogue with other embeddings [n, m] or titles of some items; None: as they are."""
        table = self.table if embeddings is None else self.table.replaced(numbers, embeddings)
        more = {} if titles is None else dict(zip(numbers.tolist(), titles, strict=True))
        return replace(self, table=table, _titles={**self._titles, **more})

    def without(self, numbers: np.ndarray) -> Catalogue:
        """Return a catalogue in which these items are removed."""
        return replace(self, removed=np.union1d(self.removed, numbers))

    def all_items(self) -> Items:
        """Return ids and titles of all items, as an export stores them."""
        added = range(len(self.exported) + 1, len(self) + 1)
        if self._titles:
            numbers = range(1, len(self) + 1)
            return make_items([self.id(i) for i in numbers], [self.title(i) for i in numbers])
        if not added:
            return self.exported
        return self.exported.extended(make_items([self.id(i) for i in added], [self.title(i) for i in added]))


# ------------------------------------------------------------------------------------------------------------- snapshot
# A model and its catalogue at one moment: all that a call of the Recommender reads. N items, m the size.


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that a call reads."""

    config: dict[str, Any]
    folder: Path
    engine: Engine
    catalogue: Catalogue
    model: str
    eigenvalues: np.ndarray  # λ [rows of a state, m]
    projection: tuple[np.ndarray | None, np.ndarray | None]  # for new items
    whitening: dict[str, np.ndarray]
    encoders: dict[tuple, list]  # loaded modalities, by where their encoders are
    index: Index | None

    @classmethod
    def of(cls, export: Export, engine: Engine, index: Index | None = None) -> Snapshot:
        config, weights = export.config, export.weights
        # The engine has the blocks' weights; keep the others.
        return cls(
            config,
            export.folder,
            engine,
            Catalogue(export.items, engine.table(export).with_room(), export.removed),
            model_name(config),
            decays_of(weights, config),
            (weights.get("projection.weight"), weights.get("projection.bias")),
            {name: value for name, value in weights.items() if name.startswith("whitening.")},
            {},
            index,
        )


def model_name(config: Mapping[str, Any]) -> str:
    """Return a name of a model: its run, its size and a fingerprint of its weights.

    The item table has no part in it: states stay valid while items are added, updated and removed.
    """
    content = [config["files"][WEIGHTS]["sha256"], list(config["sizes"]), config["num_blocks"]]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    return f"{config.get('run', 'a run')}, size {config['size']}, weights {fingerprint}"


def check_state(now: Snapshot, state: State) -> None:
    """Raise InputError for a state of another model, or with items that this catalogue does not have."""
    if not isinstance(state, State):
        raise InputError(f"state {shown(state)} must be a State, as start() and step() return it")
    if state.model != now.model:
        raise InputError(
            f"the state was made by the model {state.model!r}, this is {now.model!r}; encode the history again: start()"
        )
    shape = state_shape(now.config)
    if state.hidden.shape != shape or state.z.shape != shape[2:]:
        raise InputError("the state is damaged: it has another size than its model; encode the history again: start()")
    if (largest := max(state.items, default=0)) > len(now.catalogue):
        raise InputError(
            f"the state remembers item {largest}, this catalogue has {len(now.catalogue)}; reload the catalogue that "
            f"the state was made with, or encode the history again: start()"
        )


def project(now: Snapshot, ids: list[str], features: Any) -> np.ndarray:
    """Return embeddings [n, m] of items with these features, rounded as the table is stored."""
    weight, bias = now.projection
    if weight is None:
        raise InputError("this model's item table was learned without features, so no items can be added")
    try:
        features = np.asarray(features, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"features must be an array of numbers, not {shown(features)}") from None
    if features.shape != (len(ids), len(weight)):
        raise InputError(
            f"features of shape {list(features.shape)} for {len(ids)} items: must be {[len(ids), len(weight)]}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        embeddings = rounded(whitened(features, now.whitening) @ weight + bias, now.config["quantize"])
    bad = ~(np.isfinite(features).all(axis=1) & np.isfinite(embeddings).all(axis=1))
    if bad.any():
        raise InputError(f"the features of item {ids[int(bad.argmax())]!r} are not finite, or far too large")
    return embeddings
