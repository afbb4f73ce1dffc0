"""Recommend the next items from an export. Needs no torch if the export has ONNX graphs.

    r = Recommender.from_pretrained("exports/beauty-64")
    r.recommend([["B004756YJA", "B004ZT0SSG"], []], top_k=10)      # one answer per history
    state = r.step(r.start(), "B004756YJA")                          # a user's events one by one
    r.recommend([state])
    r.add_items(["NEW1"], r.embed_items([{"title": "Rose soap"}]))   # new products, no retraining

Any number of threads may call one Recommender. Each call reads one snapshot of model and catalogue, so it sees all of
a change or nothing of it. Changes take turns.

N items, m the size, F feature width. The settings of the export are in `r.config`, ids and titles in `r.items`. Items
are given by id or number as serving/catalogue.py says.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import read_json
from serving.catalogue import Catalogue, Choice, Filter
from serving.engines import Engine, bias_before_scaling, open_engine
from serving.folder import CONFIG, GRAPHS, HINT, ITEMS, WEIGHTS, Export, pack_items, read_folder, write_folder
from serving.items import ItemId, make_items
from serving.quantize import rounded
from serving.states import State, eigenvalues_of, encode
from serving.weights import whitened

SCORES = 1 << 21  # user-item scores held at once
TOGETHER = 64  # histories encoded at once; larger batches add padding and are no faster
FEWEST_COLUMNS = 64  # products with fewer columns may round differently than those with the whole table
CHUNK = 1 << 16  # items compared at once


@dataclass(frozen=True)
class Recommendation:
    """The recommendations for one history, best first."""

    ids: list[str]
    numbers: list[int]  # item numbers, 1-based
    titles: list[str]
    scores: list[float]
    notes: list[str]  # which parts of the request were skipped
    unknown: int = 0  # how many items of the history are unknown


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """Everything that a call reads."""

    config: dict[str, Any]
    folder: Path
    engine: Engine
    catalogue: Catalogue
    model: str
    eigenvalues: np.ndarray  # λ [blocks, m]
    projection: tuple[np.ndarray | None, np.ndarray | None]  # for new items
    whitening: dict[str, np.ndarray]
    encoders: dict[tuple, list]  # loaded modalities, by where their encoders are

    @classmethod
    def of(cls, export: Export, engine: Engine) -> _Snapshot:
        config, weights = export.config, export.weights
        # The engine has the blocks' weights; keep the others.
        return cls(
            config,
            export.folder,
            engine,
            Catalogue(export.items, engine.table(export).with_room(), export.removed),
            model_name(config),
            eigenvalues_of(weights, config["num_blocks"]),
            (weights.get("projection.weight"), weights.get("projection.bias")),
            {name: value for name, value in weights.items() if name.startswith("whitening.")},
            {},
        )


def model_name(config: Mapping[str, Any]) -> str:
    """Return a name of a model: its run, its size and a fingerprint of its weights.

    The item table has no part in it: states stay valid while items are added, updated and removed.
    """
    content = [config["files"][WEIGHTS]["sha256"], list(config["sizes"]), config["num_blocks"]]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    return f"{config.get('run', 'a run')}, size {config['size']}, weights {fingerprint}"


class Recommender:
    """Recommends from an export; `from_pretrained` opens one."""

    def __init__(self, export: Export, engine: Engine) -> None:
        self._now = _Snapshot.of(export, engine)  # read it once per call
        self._lock = threading.Lock()  # held by whoever replaces it
        self._opened: tuple[Path, str | None, int] = (export.folder, None, 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, engine: str | None = None, threads: int = 1) -> Recommender:
        """Open an export.

        engine: "torch" or "onnx"; None: onnx if the folder has graphs, else torch.
        threads: of onnxruntime, 0: one per core. Requests are small, so more threads than the default of one mostly
        spend CPU time waiting; raise it for large batches or catalogues.
        Raises InputError if a file is missing, damaged or of another version, or the engine is not available.
        """
        path = Path(folder) / CONFIG
        before = path.read_bytes() if path.exists() else None
        try:
            export = read_folder(folder)
            opened = cls(export, open_engine(export, engine, threads))
        finally:
            if before is not None and (not path.exists() or path.read_bytes() != before):
                raise InputError(f"{folder} was replaced while it was being opened; open it again")
        opened._opened = (Path(folder).absolute(), engine, threads)
        return opened

    def reload(self) -> bool:
        """Open the folder again if its export changed; return whether it did. Calls meanwhile get the old answers.

        Items that were added, updated or removed since, and not saved, are as in the folder afterwards.
        Raises InputError as `from_pretrained` does; the open model then stays.
        """
        folder, engine, threads = self._opened
        with self._lock:
            path = folder / CONFIG
            if path.exists() and read_json(path, HINT).get("sha256") == self._now.config.get("sha256"):
                return False
            self._now = Recommender.from_pretrained(folder, engine, threads)._now
            return True

    @property
    def config(self) -> dict[str, Any]:
        """The export's config.json."""
        return self._now.config

    @property
    def items(self) -> Catalogue:
        """The catalogue at this moment; it stays as it is while items change."""
        return self._now.catalogue

    @property
    def model(self) -> str:
        """The name of the model, which its states carry."""
        return self._now.model

    def __len__(self) -> int:
        """The number of items that can be recommended."""
        return self.items.count

    def __contains__(self, item: ItemId) -> bool:
        """Return whether an item can be recommended."""
        catalogue = self.items
        number = catalogue.number(item)
        return number > 0 and not catalogue.is_removed(number)

    # ---------------------------------------------------------------------------------------------------- recommend

    def recommend(
        self,
        histories: Iterable[Sequence[ItemId] | State],
        top_k: int = 10,
        exclude_history: bool = True,
        candidates: Filter | Sequence[ItemId] | Sequence[Sequence[ItemId]] | None = None,
        boost: np.ndarray | None = None,
    ) -> list[Recommendation]:
        """Return the `top_k` best items for each history (items, oldest first) or State.

        exclude_history: do not recommend items of the history.
        candidates: rank only these items: one list for all histories, a list for each, or a `filter`; None: all.
        boost: numbers added to the scores of items 1, 2, ...; give it to `filter` if it is used again.
        Unknown ids are skipped, only the last `max_len` items of a history are read, and an answer is shorter if fewer
        items are left to rank; the answer's `notes` say so. Of items with the same score the lower number comes first.
        """
        now = self._now
        requests = [_request(now, history) for history in _listed(histories, "histories", "[['id', 'id'], []]")]
        _check_top_k(top_k)
        filters = _filters(now.catalogue, candidates, boost, len(requests))
        choices = [each.choice(now.catalogue) for each in filters]
        answers: dict[int, Recommendation] = {}
        for rows in _batches(requests, choices, len(now.catalogue) + 1):
            batch = [requests[row] for row in rows]
            own = choices if len(choices) == 1 else [choices[row] for row in rows]
            had = [frozenset(request.items) if exclude_history else frozenset() for request in batch]
            counts = [choice.count for choice in own] * (len(batch) if len(own) == 1 else 1)
            # Rank enough items that the history can be left out afterwards.
            k = max(min(count, top_k + len(items)) for count, items in zip(counts, had, strict=True))
            scores, items = _ranked(now, batch, own, k)
            for at, row in enumerate(rows):
                ranked = zip(items[at].tolist(), scores[at].tolist(), strict=True)
                best = [(i, score) for i, score in ranked if score > -np.inf and i not in had[at]][:top_k]
                notes = [*batch[at].notes, *filters[row if len(filters) > 1 else 0].notes]
                answers[row] = _answer(now.catalogue, best, top_k, notes, batch[at].unknown)
        return [answers[row] for row in range(len(requests))]

    def similar_items(
        self, items: Sequence[ItemId], top_k: int = 10, candidates: Filter | Sequence[ItemId] | None = None
    ) -> list[Recommendation]:
        """Return for each item the `top_k` others whose vectors have the largest cosine with its own.

        candidates: as in `recommend`, for all items. Raises InputError for an unknown id.
        """
        now = self._now
        catalogue, table = now.catalogue, now.catalogue.table
        numbers = _known(catalogue, items, "items")
        _check_top_k(top_k)
        [chosen] = _filters(catalogue, candidates, None, 1)
        choice = chosen.choice(catalogue)
        among = np.arange(1, len(catalogue) + 1) if choice.numbers is None else choice.numbers
        allowed = catalogue.bias[0, among] == 0
        answers = []
        for number in numbers:
            own = table.vectors(np.array([number]))[0]
            scores = np.full(len(among), -np.inf, dtype=np.float32)
            for start in range(0, len(among), CHUNK):
                part = among[start : start + CHUNK]
                whole = choice.numbers is None
                rows = table.vectors(slice(part[0], part[-1] + 1) if whole else part)
                norms = np.sqrt(np.einsum("nm,nm->n", rows, rows) * (own @ own))
                scores[start : start + CHUNK] = rows @ own / np.maximum(norms, np.finfo(np.float32).tiny)
            scores[~allowed | (among == number)] = -np.inf
            least = np.partition(scores, -min(top_k, len(scores)))[-min(top_k, len(scores))] if len(scores) else 0
            best = np.flatnonzero((scores >= least) & (scores > -np.inf))
            best = best[np.argsort(-scores[best], kind="stable")][:top_k]
            pairs = list(zip(among[best].tolist(), scores[best].tolist(), strict=True))
            answers.append(_answer(catalogue, pairs, top_k, list(chosen.notes)))
        return answers

    def filter(self, items: Sequence[ItemId] | np.ndarray | None = None, boost: np.ndarray | None = None) -> Filter:
        """Return a filter to give to `recommend` as candidates, again and again.

        items: ids, or a mask [N] of items 1..N; None: all. Items that are added later are not allowed by a mask or ids.
        boost [N]: numbers added to the scores; items that are added later get 0.
        """
        return _filter(self.items, items, boost)

    # ------------------------------------------------------------------------------------------------------- vectors

    def item_vectors(self, items: Sequence[ItemId] | None = None) -> np.ndarray:
        """Return vectors [n, m] float32 of some items, or of items 1..N. A score is a user's vector times an item's."""
        catalogue = self.items
        if items is None:
            return catalogue.table.vectors(slice(1, None)).copy()
        return catalogue.table.vectors(np.array(_known(catalogue, items, "items"), dtype=np.int64))

    def user_vectors(self, histories: Iterable[Sequence[ItemId] | State]) -> np.ndarray:
        """Return vectors [n, m] float32 of users; histories as in `recommend`, unknown items are skipped."""
        now = self._now
        requests = [_request(now, history) for history in _listed(histories, "histories", "[['id', 'id'], []]")]
        vectors = np.zeros((len(requests), now.config["size"]), dtype=np.float32)
        for rows in _batches(requests, [], 1):
            vectors[rows] = _vectors(now, [requests[row] for row in rows])
        return vectors

    # ------------------------------------------------------------------------------------------------ events one by one

    def start(self, history: Sequence[ItemId] = ()) -> State:
        """Return the state after a history of any length, empty by default. Raises InputError for an unknown id.

        Up to `max_len` items, `recommend` gives the state the same answer as the history, up to rounding.
        """
        now = self._now
        numbers = _known(now.catalogue, history, "a history")
        items = np.array([numbers or [0]], dtype=np.int64)
        z, hidden = encode(now.engine, now.catalogue.table, now.eigenvalues, items)
        return State(hidden[0], z[0], tuple(numbers), now.model)

    def step(self, state: State, item: ItemId) -> State:
        """Return the state after one more item, at constant cost. Raises InputError for an unknown id."""
        now = self._now
        _check_state(now, state)
        number = now.catalogue.number(item)
        if not number:
            raise InputError(f"{now.catalogue.unknown([item])}; the state is unchanged")
        z, hidden = now.engine.step(np.array([number]), state.hidden[None], now.catalogue.table)
        return State(hidden[0], z[0], (*state.items, number), now.model)

    # ----------------------------------------------------------------------------------------------- a living catalogue

    def add_items(self, ids: Sequence[str], features: np.ndarray, titles: Sequence[str] | None = None) -> None:
        """Add new products with their features [n, F], from `embed_items` or the feature cache. No training is needed.

        Features are whitened here if the model was trained on whitened ones. An id that was removed comes back under
        its old number. The table has room for 1 in 32 more items; only when it is full is it copied.
        Raises InputError, and adds nothing, for an id that exists or occurs twice, for features of another shape, and
        if features or the resulting embeddings are not finite.
        """
        ids = list(_listed(ids, "ids", "['id', 'id']"))
        more = make_items(ids, [""] * len(ids) if titles is None else _listed(titles, "titles", "['title', 'title']"))
        with self._lock:
            embeddings = _embeddings(self._now, ids, features)
            self._now = replace(self._now, catalogue=self._now.catalogue.added(more, embeddings))

    def update_items(
        self, ids: Sequence[ItemId], features: np.ndarray | None = None, titles: Sequence[str] | None = None
    ) -> None:
        """Give items other features [n, F] or titles; None: as they are. Items keep their numbers.

        Update many at once: each call with features copies the item table. Raises InputError, and changes nothing, for
        an unknown, removed or repeated id and for features that `add_items` refuses.
        """
        with self._lock:
            catalogue = self._now.catalogue
            numbers = np.array(_known(catalogue, ids, "ids"), dtype=np.int64)
            names = [catalogue.id(number) for number in numbers]
            checked = make_items(names, [""] * len(names) if titles is None else _listed(titles, "titles", "['title']"))
            if (removed := catalogue.is_removed(numbers)).any():
                raise InputError(f"item {names[int(removed.argmax())]!r} is removed; bring it back by add_items")
            embeddings = None if features is None else _embeddings(self._now, names, features)
            titles = None if titles is None else [checked.title(i) for i in range(1, len(checked) + 1)]
            self._now = replace(self._now, catalogue=catalogue.updated(numbers, embeddings, titles))

    def remove_items(self, ids: Sequence[ItemId]) -> None:
        """Never recommend these items again. Histories may still hold them, and `add_items` may bring them back.

        Raises InputError, and removes nothing, for an unknown id.
        """
        with self._lock:
            catalogue = self._now.catalogue
            numbers = np.array(_known(catalogue, ids, "ids"), dtype=np.int64)
            self._now = replace(self._now, catalogue=catalogue.without(numbers))

    def embed_items(
        self, products: Any, language_encoder: str | None = None, img_encoder: str | None = None
    ) -> np.ndarray:
        """Return features [n, F] of new products, encoded as in training. Encoders are loaded once.

        products: a pandas DataFrame or a list of dicts with the text attributes (title, brand, ...); if the model uses
        pictures, the path `picture`; and if it uses features from files, a list of numbers under the name of each. A
        missing picture or list gives zeros, as in training.
        language_encoder, img_encoder: where the encoders of the training are now, if they moved.
        The lexical encoder needs NumPy, pixel needs Pillow, all others need the packages of the extra `encoders`.
        Raises InputError for an encoder other than in training, a missing package, and a product without text.
        """
        if hasattr(products, "to_dict"):
            products = products.to_dict("records")
        records = list(_listed(products, "products", "[{'title': 'Rose soap'}]"))
        now, key = self._now, (language_encoder, img_encoder)
        try:
            from datasets.features import description  # the only place where serving uses encoders

            if key not in now.encoders:
                encoders = {"language_encoder": language_encoder, "img_encoder": img_encoder}
                now.encoders[key] = description.described_modalities(now.config["features"], encoders)
            features = description.embed_records(records, now.config["features"], now.encoders[key])
        except ImportError as error:
            raise InputError(
                f"an encoder of this model needs a package that is not installed ({error}); in a clone run pip install "
                f"-r requirements.txt, or pip install '.[encoders]' for the package ('.[pictures]' for pixel alone)"
            ) from error
        if not now.config["features"]["image"] and any(isinstance(r.get("picture"), str | Path) for r in records):
            warnings.warn("this model was trained on texts alone: the pictures are not used", stacklevel=2)
        return features

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write this model with its catalogue as it is now, as a new export. Removed items stay removed."""
        now = self._now
        config, catalogue = now.config, now.catalogue
        table, scale = catalogue.table.rows(), catalogue.table.row_scales()
        if config["quantize"] == "int8" and scale is None:
            raise InputError("the torch engine has dequantized this int8 export; save it from engine='onnx'")
        if config["quantize"] == "float16":
            table = table.astype(np.float16)
        files: dict[str, bytes | Path] = {
            name: now.folder / name for name in (WEIGHTS, *GRAPHS) if name in config["files"]
        }
        files[ITEMS] = pack_items(catalogue.all_items(), table, scale, catalogue.removed)
        changed = {"num_items": len(catalogue)}
        if len(catalogue.removed) or "num_removed" in config:
            changed["num_removed"] = len(catalogue.removed)
        write_folder(Path(folder), config | changed, files, overwrite)


# ----------------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class _Request:
    state: State | None
    items: tuple[int, ...]  # known items, oldest first
    notes: list[str]
    unknown: int = 0


def _request(now: _Snapshot, history: Sequence[ItemId] | State) -> _Request:
    longest, notes = now.config["max_len"], []
    if isinstance(history, State):
        _check_state(now, history)
        if len(history.items) > longest:
            notes.append(f"the state remembers {len(history.items)} items, training had at most {longest}")
        return _Request(history, history.items, notes)
    items, unknown = now.catalogue.known(_listed(history, "each of the histories", "['id', 'id']"))
    if unknown:
        notes.append(f"{now.catalogue.unknown(unknown)}; skipped")
    if unknown and not items:
        notes.append("no item of the history is known: this is the answer for an empty history")
    if len(items) > longest:
        notes.append(f"the last {longest} of {len(items)} items are read, as in training")
    return _Request(None, tuple(items), notes, len(unknown))


def _check_state(now: _Snapshot, state: State) -> None:
    if state.model != now.model:
        raise InputError(
            f"the state was made by the model {state.model!r}, this is {now.model!r}; encode the history again: start()"
        )
    if (largest := max(state.items, default=0)) > len(now.catalogue):
        raise InputError(
            f"the state remembers item {largest}, this catalogue has {len(now.catalogue)}; reload the catalogue that "
            f"the state was made with, or encode the history again: start()"
        )


def _check_top_k(top_k: Any) -> None:
    if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 1:
        raise InputError(f"top_k {top_k!r} must be a whole number from 1")


def _known(catalogue: Catalogue, items: Any, what: str) -> list[int]:
    """Return the numbers of items. Raises InputError if one is unknown."""
    numbers, unknown = catalogue.known(_listed(items, what, "['id', 'id']"))
    if unknown:
        raise InputError(f"{catalogue.unknown(unknown)}; leave unknown items out")
    return numbers


def _filters(catalogue: Catalogue, candidates: Any, boost: Any, users: int) -> list[Filter]:
    """Return one filter for all users, or one for each."""
    if isinstance(candidates, Filter):
        if boost is not None:
            raise InputError("candidates is a filter, so give the boost to it: filter(items, boost)")
        return [candidates]
    if candidates is not None:
        candidates = list(_listed(candidates, "candidates", "['id', 'id'], or a list of them for each history"))
        if candidates and not any(isinstance(each, str | int | np.integer | np.bool_) for each in candidates):
            if len(candidates) != users:
                raise InputError(f"{len(candidates)} lists of candidates for {users} histories; give one for each")
            return [_filter(catalogue, _listed(each, "each of the candidates", "['id']"), boost) for each in candidates]
    chosen = _filter(catalogue, candidates, boost)
    if candidates is not None and not len(chosen.numbers if chosen.numbers is not None else ()):
        raise InputError("no candidate is known, so there is nothing to rank; give ids of this catalogue")
    return [chosen]


def _filter(catalogue: Catalogue, items: Any, boost: Any) -> Filter:
    numbers, notes = None, []
    if items is not None:
        items = items if isinstance(items, np.ndarray) else list(_listed(items, "items", "['id', 'id']"))
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
        boost = np.asarray(boost)
        if boost.ndim != 1 or boost.dtype.kind not in "iuf" or len(boost) > len(catalogue):
            raise InputError(f"boost must be an array of at most {len(catalogue)} numbers, one for each item")
        boost = boost.astype(np.float32)
        if not np.isfinite(boost).all():
            raise InputError("boost must be finite; leave items out by a mask: filter(mask, boost)")
    return Filter(numbers, boost, notes)


# ------------------------------------------------------------------------------------------------------------ batches


def _batches(requests: list[_Request], choices: list[Choice], whole: int) -> Iterable[list[int]]:
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


def _filled(now: _Snapshot, batch: list[_Request]) -> np.ndarray:
    """Return [B, L]: the last items of each history, left-padded with 0."""
    longest = min(now.config["max_len"], max([1, *(len(request.items) for request in batch)]))
    filled = np.zeros((len(batch), longest), dtype=np.int64)
    for row, request in enumerate(batch):
        if request.items:
            filled[row, -len(request.items[-longest:]) :] = request.items[-longest:]
    return filled


def _vectors(now: _Snapshot, batch: list[_Request]) -> np.ndarray:
    """Return z [B, m] of a batch, which has only states or only histories."""
    if states := [request.state for request in batch if request.state]:
        return np.stack([state.z for state in states])
    return encode(now.engine, now.catalogue.table, now.eigenvalues, _filled(now, batch))[0]


def _ranked(now: _Snapshot, batch: list[_Request], choices: list[Choice], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, item numbers), both [B, k], best first; items that are not allowed have -inf.

    choices: one for all users, or one for each. Few items are gathered into a table of their own.
    """
    if k == 0:
        return np.zeros((len(batch), 0), dtype=np.float32), np.zeros((len(batch), 0), dtype=np.int64)
    table, read = now.catalogue.table, None
    histories = None if batch[0].state else _filled(now, batch)
    if len(choices) == 1 and choices[0].bias is not None:
        bias, boosted = choices[0].bias, choices[0].boost is not None
    else:
        numbers = [choice.listed(now.catalogue) for choice in choices]
        boosted = choices[0].boost is not None
        own_items = np.zeros(1, np.int64) if histories is None else histories.ravel()
        read = np.unique(np.concatenate([np.zeros(1, np.int64), *numbers, own_items]))
        read = np.append(read, np.full(max(0, FEWEST_COLUMNS - len(read)), read[-1]))
        table = table.gathered(read)
        bias = np.full((len(choices), table.width), -np.inf, dtype=np.float32)
        for row, (choice, own) in enumerate(zip(choices, numbers, strict=True)):
            bias[row, np.searchsorted(read, own)] = choice.boost_of(own)
        histories = None if histories is None else np.searchsorted(read, histories)
    if histories is not None and not (boosted and table.scale is not None):
        scores, items = now.engine.recommend(histories, table, bias, k)
    else:
        z = _vectors(now, batch)
        scores, items = now.engine.rank(z, table, bias_before_scaling(z, table, bias) if boosted else bias, k)
    return scores, items if read is None else read[items]


def _answer(
    catalogue: Catalogue, best: list[tuple[int, float]], top_k: int, notes: list[str], unknown: int = 0
) -> Recommendation:
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


def _embeddings(now: _Snapshot, ids: list[str], features: Any) -> np.ndarray:
    """Return embeddings [n, m] of items with these features, rounded as the table is stored."""
    weight, bias = now.projection
    if weight is None:
        raise InputError("this model's item table was learned without features, so no items can be added")
    try:
        features = np.asarray(features, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(f"features must be an array of numbers, not {features!r:.80}") from None
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


def _listed(values: Any, what: str, example: str) -> Iterable:
    """Return `values` if it is list-like. Raises InputError for a string, a dict or a single value."""
    if isinstance(values, str | bytes | State | Mapping) or not isinstance(values, Iterable):
        raise InputError(f"{what} must be a list such as {example}, not {values!r:.80}")
    return values
