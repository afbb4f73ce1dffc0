"""Recommend the next items from an export. Needs no torch if the export has ONNX graphs.

    r = Recommender.from_pretrained("exports/beauty-64")
    r.recommend([["B004756YJA", "B004ZT0SSG"], []], top_k=10)      # one answer per history
    state = r.step(r.start(), "B004756YJA")                          # a user's events one by one
    r.recommend([state])
    r.add_items(["NEW1"], r.embed_items([{"title": "Rose soap"}]))   # new products, no retraining

N items, m the size, F feature width. The settings of the export are in `r.config`, ids and titles in `r.items`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from serving.engines import Engine, Table, open_engine
from serving.folder import CONFIG, GRAPHS, ITEMS, WEIGHTS, Export, pack_items, read_folder, write_folder
from serving.items import ItemId, make_items
from serving.quantize import rounded
from serving.weights import whitened

SCORES = 1 << 21  # user-item scores held at once; the biases of the same size come on top
TOGETHER = 64  # histories encoded at once; larger batches add padding and are no faster


@dataclass(frozen=True)
class Recommendation:
    """The recommendations for one history, best first."""

    ids: list[str]
    numbers: list[int]  # item numbers, 1-based
    titles: list[str]
    scores: list[float]
    notes: list[str]  # which parts of the request were skipped


@dataclass(frozen=True, eq=False)
class State:
    """The recurrence's state after a user's whole history. Immutable: `step` returns a new one."""

    hidden: np.ndarray  # [blocks, 2, m]: real and imaginary part of each block's state
    z: np.ndarray  # [m]: the sequence representation
    items: tuple[int, ...]  # item numbers so far


class Recommender:
    """Recommends from an export; `from_pretrained` opens one."""

    def __init__(self, export: Export, engine: Engine) -> None:
        self.config = export.config
        self.items = export.items
        self._folder, self._engine = export.folder, engine
        # Keep only the weights for new items; the engine has the blocks'.
        self._projection = tuple(export.weights.get(f"projection.{part}") for part in ("weight", "bias"))
        self._whitening = {name: value for name, value in export.weights.items() if name.startswith("whitening.")}
        self._table: Table = engine.table(export)

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
        return opened

    def __len__(self) -> int:
        """The number of items."""
        return len(self.items)

    def __contains__(self, item: ItemId) -> bool:
        """Return whether an item, by id or number, is in the catalogue."""
        return self.items.number(item) > 0

    # ---------------------------------------------------------------------------------------------------- recommend

    def recommend(
        self,
        histories: Iterable[Sequence[ItemId] | State],
        top_k: int = 10,
        exclude_history: bool = True,
        candidates: Sequence[ItemId] | None = None,
    ) -> list[Recommendation]:
        """Return the `top_k` best items for each history (item ids or numbers, oldest first) or State.

        exclude_history: do not recommend items of the history. candidates: rank only these items; None: all.
        Unknown ids are skipped, and only the last `max_len` items of a history are read; the answer's `notes` say so.
        Of items with the same score the lower number comes first.
        Raises InputError if fewer than `top_k` items are left to rank.
        """
        requests = [self._request(history) for history in _listed(histories, "histories", "[['id', 'id'], []]")]
        notes: list[str] = []
        bias, allowed = self._bias(candidates, notes)
        if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or not 1 <= top_k <= allowed:
            raise InputError(f"top_k {top_k!r} must be a whole number from 1 to {allowed}, the number of items to rank")
        answers: dict[int, Recommendation] = {}
        for rows in self._batches(requests):
            batch = [requests[row] for row in rows]
            own = bias if not exclude_history else self._without_history(bias, batch, rows, allowed, top_k)
            if states := [r.state for r in batch if r.state]:  # a batch has only states or only histories
                scores, items = self._engine.rank(np.stack([s.z for s in states]), self._table, own, top_k)
            else:
                scores, items = self._engine.recommend(self._filled([r.items for r in batch]), self._table, own, top_k)
            for row, request, score, item in zip(rows, batch, scores, items, strict=True):
                answers[row] = Recommendation(
                    [self.items.id(i) for i in item],
                    item.tolist(),
                    [self.items.title(i) for i in item],
                    score.tolist(),
                    [*request.notes, *notes],
                )
        return [answers[row] for row in range(len(requests))]

    # ------------------------------------------------------------------------------------------------ events one by one

    def start(self, history: Sequence[ItemId] = ()) -> State:
        """Return the state after a history, empty by default. Raises InputError for an unknown id.

        Up to `max_len` items, `recommend` gives the state the same answer as the history (with int8 up to rounding).
        """
        hidden = np.zeros((1, self.config["num_blocks"], 2, self.config["size"]), dtype=np.float32)
        begin = np.zeros(1, dtype=np.int64)  # token 0; its state is not carried on
        z, _ = self._engine.step(begin, hidden, self._table)
        state = State(hidden[0], z[0], ())
        for item in _listed(history, "a history", "['id', 'id']"):
            state = self.step(state, item)
        return state

    def step(self, state: State, item: ItemId) -> State:
        """Return the state after one more item, at constant cost. Raises InputError for an unknown id."""
        self._check_state(state)
        number = self.items.number(item)
        if not number:
            raise InputError(f"{self.items.unknown([item])}; the state is unchanged")
        z, hidden = self._engine.step(np.array([number]), state.hidden[None], self._table)
        return State(hidden[0], z[0], (*state.items, number))

    # ----------------------------------------------------------------------------------------------------- new items

    def add_items(self, ids: Sequence[str], features: np.ndarray, titles: Sequence[str] | None = None) -> None:
        """Add new products with their features [n, F], from `embed_items` or the feature cache. No training is needed.

        Features are whitened here if the model was trained on whitened ones. Add many at once: each call copies the
        item table. Raises InputError, and adds nothing, for an id that exists or occurs twice, for features of another
        shape, and if features or the resulting embeddings are not finite.
        """
        weight, bias = self._projection
        if weight is None:
            raise InputError("this model's item table was learned without features, so no items can be added")
        ids = list(_listed(ids, "ids", "['id', 'id']"))
        more = make_items(ids, [""] * len(ids) if titles is None else _listed(titles, "titles", "['title', 'title']"))
        try:
            features = np.asarray(features, dtype=np.float32)
        except (TypeError, ValueError):
            raise InputError(f"features must be an array of numbers, not {features!r:.80}") from None
        if features.shape != (len(ids), len(weight)):
            raise InputError(
                f"features of shape {list(features.shape)} for {len(ids)} items: must be {[len(ids), len(weight)]}"
            )
        known = [item for item in ids if self.items.number(item)]
        if known:
            raise InputError(f"item {known[0]!r} exists already; leave it out")
        with np.errstate(over="ignore", invalid="ignore"):
            embeddings = rounded(whitened(features, self._whitening) @ weight + bias, self.config["quantize"])
        bad = ~(np.isfinite(features).all(axis=1) & np.isfinite(embeddings).all(axis=1))
        if bad.any():
            raise InputError(f"the features of item {ids[int(bad.argmax())]!r} are not finite, or far too large")
        self._table, self.items = self._table.extended(embeddings), self.items.extended(more)

    def embed_items(
        self, products: Any, language_encoder: str | None = None, img_encoder: str | None = None
    ) -> np.ndarray:
        """Return features [n, F] of new products, encoded as in training. Embed many at once: each call loads encoders.

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
        try:
            from datasets.features.description import embed_records  # the only place where serving uses encoders

            encoders = {"language_encoder": language_encoder, "img_encoder": img_encoder}
            features = embed_records(records, self.config["features"], encoders)
        except ImportError as error:
            raise InputError(
                f"an encoder of this model needs a package that is not installed ({error}); in a clone run pip install "
                f"-r requirements.txt, or pip install '.[encoders]' for the package ('.[pictures]' for pixel alone)"
            ) from error
        if not self.config["features"]["image"] and any(isinstance(r.get("picture"), str | Path) for r in records):
            warnings.warn("this model was trained on texts alone: the pictures are not used", stacklevel=2)
        return features

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write this model, including added items, as a new export."""
        table = self._table.rows()
        if self.config["quantize"] == "int8" and self._table.scale is None:
            raise InputError("the torch engine has dequantized this int8 export; save it from engine='onnx'")
        if self.config["quantize"] == "float16":
            table = table.astype(np.float16)
        source = self._folder
        files: dict[str, bytes | Path] = {
            name: source / name for name in (WEIGHTS, *GRAPHS) if name in self.config["files"]
        }
        files[ITEMS] = pack_items(self.items, table, self._table.scale)
        write_folder(Path(folder), self.config | {"num_items": len(self)}, files, overwrite)

    # ------------------------------------------------------------------------------------------------------ batches

    def _request(self, history: Sequence[ItemId] | State) -> _Request:
        longest, notes = self.config["max_len"], []
        if isinstance(history, State):
            self._check_state(history)
            if len(history.items) > longest:
                notes.append(f"the state remembers {len(history.items)} items, training had at most {longest}")
            return _Request(history, history.items, notes)
        items, unknown = self.items.known(_listed(history, "each of the histories", "['id', 'id']"))
        if unknown:
            notes.append(f"{self.items.unknown(unknown)}; skipped")
        if unknown and not items:
            notes.append("no item of the history is known: this is the answer for an empty history")
        if len(items) > longest:
            notes.append(f"the last {longest} of {len(items)} items are read, as in training")
        return _Request(None, tuple(items), notes)

    def _check_state(self, state: State) -> None:
        shape = (self.config["num_blocks"], 2, self.config["size"])
        if state.hidden.shape != shape or max(state.items, default=0) > len(self):
            raise InputError("the state is of another model; make one with start()")

    def _bias(self, candidates: Sequence[ItemId] | None, notes: list[str]) -> tuple[np.ndarray, int]:
        """Return (bias [1, N+1]: 0 for candidates, -inf for the rest; number of candidates)."""
        bias = np.zeros((1, len(self) + 1), dtype=np.float32)
        allowed = len(self)
        if candidates is not None:
            numbers, unknown = self.items.known(_listed(candidates, "candidates", "['id', 'id']"))
            if unknown:
                notes.append(f"candidates {self.items.unknown(unknown)}; skipped")
            if not numbers:
                raise InputError("no candidate is known, so there is nothing to rank; give ids of this catalogue")
            bias[:] = -np.inf
            bias[0, numbers] = 0
            allowed = len(set(numbers))
        bias[0, 0] = -np.inf
        return bias, allowed

    def _without_history(
        self, bias: np.ndarray, batch: list[_Request], rows: list[int], allowed: int, top_k: int
    ) -> np.ndarray:
        """Return [B, N+1]: `bias`, which allows `allowed` items, with each user's history excluded."""
        own = np.repeat(bias, len(batch), axis=0)
        for at, (row, request) in enumerate(zip(rows, batch, strict=True)):
            had = list(set(request.items))
            left = allowed - np.count_nonzero(bias[0, had] == 0)
            if left < top_k:
                raise InputError(
                    f"history {row}: {left} items are left to rank without the history, fewer than top_k {top_k}; "
                    f"lower top_k, give more candidates, or pass exclude_history=False (--keep_history)"
                )
            own[at, had] = -np.inf
        return own

    def _batches(self, requests: list[_Request]) -> Iterable[list[int]]:
        """Yield the rows of each batch: states apart from histories, histories sorted by length."""
        together = max(1, min(TOGETHER, SCORES // (len(self) + 1)))
        for states in (True, False):
            rows = [row for row, request in enumerate(requests) if (request.state is not None) == states]
            rows.sort(key=lambda row: len(requests[row].items))
            yield from (rows[start : start + together] for start in range(0, len(rows), together))

    def _filled(self, histories: list[tuple[int, ...]]) -> np.ndarray:
        """Return [B, L]: the last items of each history, left-padded with 0."""
        longest = min(self.config["max_len"], max([1, *map(len, histories)]))
        filled = np.zeros((len(histories), longest), dtype=np.int64)
        for row, items in enumerate(histories):
            if items:
                filled[row, -len(items[-longest:]) :] = items[-longest:]
        return filled


@dataclass(frozen=True)
class _Request:
    state: State | None
    items: tuple[int, ...]  # known items, oldest first
    notes: list[str]


def _listed(values: Any, what: str, example: str) -> Iterable:
    """Return `values` if it is list-like. Raises InputError for a string, a dict or a single value."""
    if isinstance(values, str | bytes | State | Mapping) or not isinstance(values, Iterable):
        raise InputError(f"{what} must be a list such as {example}, not {values!r:.80}")
    return values
