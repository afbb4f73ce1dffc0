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

import tempfile
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, shown
from common.files import open_regular, read_json
from serving import hub
from serving.catalogue import Catalogue, Snapshot, check_state, project
from serving.engines import Engine, State, WideRows, encode_by_steps, open_engine
from serving.folder import (
    CONFIG,
    FAISS,
    GRAPHS,
    HINT,
    INDEX,
    ITEMS,
    ROWS,
    SCAN,
    WEIGHTS,
    Export,
    ItemId,
    make_items,
    pack_items,
    pack_rows,
    read_folder,
    write_folder,
)
from serving.index import Index, build_faiss, build_index, open_index
from serving.ranking import (
    Filter,
    Recommendation,
    batches,
    filters_of,
    listed,
    make_answer,
    make_filter,
    ranked,
    ranked_histories,
    read_request,
    vectors_of,
)
from serving.weights import COUNTING

CHUNK = 1 << 16  # items compared at once


class Recommender:
    """Recommends from an export; `from_pretrained` opens one."""

    def __init__(self, export: Export, engine: Engine, index: Index | None = None) -> None:
        self._now = Snapshot.of(export, engine, index)  # read it once per call
        self._lock = threading.Lock()  # held by whoever replaces it
        self._opened: tuple[Path, str | None, int] = (export.folder, None, 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, engine: str | None = None, threads: int = 1) -> Recommender:
        """Open an export: a folder, or "user/name" on the Hugging Face Hub.

        engine: "torch" or "onnx"; None: onnx if the folder has graphs, else torch.
        threads: of onnxruntime, 0: one per core. Requests are small, so more threads than the default of one mostly
        spend CPU time waiting; raise it for large batches or catalogues.
        Raises InputError if a file is missing, damaged or of another version, or the engine is not available.
        """
        folder = hub.fetch(str(folder)) if hub.is_repository(folder) else folder
        path = Path(folder) / CONFIG
        before = _content(path)
        try:
            export = read_folder(folder)
            opened_engine = open_engine(export, engine, threads)
            opened = cls(export, opened_engine, open_index(export, opened_engine, threads))
        finally:
            if before is not None and _content(path) != before:
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

        exclude_history: do not recommend items of the history. If they may be recommended, the model's history bias
        is added to their scores.
        candidates: rank only these items: one list for all histories, a list for each, or a `filter`; None: all.
        boost: numbers added to the scores of items 1, 2, ...; give it to `filter` if it is used again.
        Unknown ids are skipped, only the last `max_len` items of a history are read, and an answer is shorter if fewer
        items are left to rank; the answer's `notes` say so. Of items with the same score the lower number comes first.
        """
        now = self._now
        requests = [read_request(now, history) for history in listed(histories, "histories", "[['id', 'id'], []]")]
        _check_top_k(top_k)
        filters = filters_of(now.catalogue, candidates, boost, len(requests))
        choices = [each.choice(now.catalogue, gather=len(filters) > 1) for each in filters]
        answers: dict[int, Recommendation] = {}
        for rows in batches(requests, choices, len(now.catalogue) + 1):
            batch = [requests[row] for row in rows]
            own = choices if len(choices) == 1 else [choices[row] for row in rows]
            biased = not exclude_history and bool(now.config.get("history_bias"))  # then ranked apart
            had = [frozenset(request.items) if exclude_history or biased else frozenset() for request in batch]
            counts = [choice.count for choice in own] * (len(batch) if len(own) == 1 else 1)
            # Rank enough items that the history can be left out afterwards.
            k = max(min(count, top_k + len(items)) for count, items in zip(counts, had, strict=True))
            scores, items = ranked(now, batch, own, k)
            apart = ranked_histories(now, batch, own) if biased else []
            for at, row in enumerate(rows):
                pairs = zip(items[at].tolist(), scores[at].tolist(), strict=True)
                best = [(i, score) for i, score in pairs if score > -np.inf and i not in had[at]][:top_k]
                if biased:
                    best = sorted([*best, *apart[at]], key=lambda pair: (-pair[1], pair[0]))[:top_k]
                notes = [*batch[at].notes, *filters[row if len(filters) > 1 else 0].notes]
                answers[row] = make_answer(now.catalogue, best, top_k, notes, batch[at].unknown)
        return [answers[row] for row in range(len(requests))]

    def similar_items(
        self, items: Sequence[ItemId], top_k: int = 10, candidates: Filter | Sequence[ItemId] | None = None
    ) -> list[Recommendation]:
        """Return for each item the `top_k` others whose vectors have the largest cosine with its own.

        candidates: as in `recommend`, for all items. Raises InputError for an unknown id.
        """
        now = self._now
        _check_vectors(now)
        catalogue, table = now.catalogue, now.catalogue.table
        numbers = _known(catalogue, items, "items")
        _check_top_k(top_k)
        [chosen] = filters_of(catalogue, candidates, None, 1)
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
            answers.append(make_answer(catalogue, pairs, top_k, list(chosen.notes)))
        return answers

    def filter(self, items: Sequence[ItemId] | np.ndarray | None = None, boost: np.ndarray | None = None) -> Filter:
        """Return a filter to give to `recommend` as candidates, again and again.

        items: ids, or a mask [N] of items 1..N; None: all. Items that are added later are not allowed by a mask or ids.
        boost [N]: numbers added to the scores; items that are added later get 0.
        """
        return make_filter(self.items, items, boost)

    # ------------------------------------------------------------------------------------------------------- vectors

    def item_vectors(self, items: Sequence[ItemId] | None = None) -> np.ndarray:
        """Return vectors [n, m] float32 of some items, or of items 1..N. A score is a user's vector times an item's."""
        _check_vectors(self._now)
        catalogue = self.items
        if items is None:
            return catalogue.table.vectors(slice(1, None)).copy()
        return catalogue.table.vectors(np.array(_known(catalogue, items, "items"), dtype=np.int64))

    def user_vectors(self, histories: Iterable[Sequence[ItemId] | State]) -> np.ndarray:
        """Return vectors [n, m] float32 of users; histories as in `recommend`, unknown items are skipped.

        Vectors of users and items have the width w of an export with --table_width w.
        """
        now = self._now
        _check_vectors(now)
        requests = [read_request(now, history) for history in listed(histories, "histories", "[['id', 'id'], []]")]
        width = now.catalogue.table.vectors(slice(1)).shape[1]
        vectors = np.zeros((len(requests), width), dtype=np.float32)
        for rows in batches(requests, [], 1):
            vectors[rows] = vectors_of(now, [requests[row] for row in rows])
        return vectors

    # ------------------------------------------------------------------------------------------------ events one by one

    def start(self, history: Sequence[ItemId] = ()) -> State:
        """Return the state after a history of any length, empty by default. Raises InputError for an unknown id.

        Up to `max_len` items, `recommend` gives the state the same answer as the history, up to rounding.
        """
        now = self._now
        if now.config.get("model") == "sasrec":
            raise InputError("sasrec reads the whole history each time and has no states; give recommend the history")
        numbers = _known(now.catalogue, history, "a history")
        items = np.array([numbers or [0]], dtype=np.int64)
        z, hidden = encode_by_steps(now.engine, now.catalogue.table, now.eigenvalues, items)
        return State(hidden[0], z[0], tuple(numbers), now.model)

    def step(self, state: State, item: ItemId) -> State:
        """Return the state after one more item, at constant cost. Raises InputError for an unknown id."""
        now = self._now
        check_state(now, state)
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
        ids = list(listed(ids, "ids", "['id', 'id']"))
        more = make_items(ids, [""] * len(ids) if titles is None else listed(titles, "titles", "['title', 'title']"))
        with self._lock:
            embeddings = project(self._now, ids, features)
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
            checked = make_items(names, [""] * len(names) if titles is None else listed(titles, "titles", "['title']"))
            if (removed := catalogue.is_removed(numbers)).any():
                raise InputError(f"item {names[int(removed.argmax())]!r} is removed; bring it back by add_items")
            embeddings = None if features is None else project(self._now, names, features)
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
        if baseline := self.config.get("model"):
            raise InputError(f"{baseline} knows items by id alone and cannot embed products; export a run of fmrlrec")
        records = list(listed(products, "products", "[{'title': 'Rose soap'}]"))
        now, key = self._now, (language_encoder, img_encoder)
        try:
            from datasets.features import registry

            if key not in now.encoders:
                encoders = {"language_encoder": language_encoder, "img_encoder": img_encoder}
                now.encoders[key] = registry.described_modalities(now.config["features"], encoders)
            features = registry.embed_records(records, now.config["features"], now.encoders[key])
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
        if INDEX in config["files"]:
            try:
                from serving.graphs import build_scan

                files[INDEX] = packed = build_index(catalogue.table.vectors(slice(None)))
                files[SCAN] = build_scan(packed)
            except ImportError as error:
                message = f"saved without its index, which needs a clone of the repository and onnx ({error})"
                warnings.warn(message, stacklevel=2)
        if FAISS in config["files"]:
            files[FAISS] = build_faiss(catalogue.table.vectors(slice(None)))
        if isinstance(wide := catalogue.table.wide, WideRows):
            files[ROWS] = pack_rows(wide.all())
        files[ITEMS] = pack_items(catalogue.all_items(), table, scale, catalogue.removed)
        changed = {"num_items": len(catalogue)} | ({"whole_number_ids": True} if catalogue.exported.numeric else {})
        if len(catalogue.removed) or "num_removed" in config:
            changed["num_removed"] = len(catalogue.removed)
        write_folder(Path(folder), config | changed, files, overwrite)

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Publish this model with its catalogue as it is now on the Hugging Face Hub; return the address.

        repository: "user/name"; made if it does not exist. Raises InputError if the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(Path(temporary, "export"))
            return hub.push(Path(temporary, "export"), repository, private)


def _check_vectors(now: Snapshot) -> None:
    if (model := now.config.get("model")) in COUNTING:
        raise InputError(f"{model} counts and has no vectors of users and items; export another model")


def _check_top_k(top_k: Any) -> None:
    if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or not 1 <= top_k < 2**31:
        raise InputError(f"top_k {shown(top_k)} must be a whole number from 1 to 2147483647")


def _known(catalogue: Catalogue, items: Any, what: str) -> list[int]:
    """Return the numbers of items. Raises InputError if one is unknown."""
    numbers, unknown = catalogue.known(listed(items, what, "['id', 'id']"))
    if unknown:
        raise InputError(f"{catalogue.unknown(unknown)}; leave unknown items out")
    return numbers


def _content(path: Path) -> bytes | None:
    """Return the bytes of a regular file; None if there is none."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError:
        return None
