"""An exported model that answers "what next for this user"; runs without torch where the export has ONNX graphs.

    r = Recommender.from_pretrained("exports/beauty-64")
    r.recommend([["B004756YJA", "B004ZT0SSG"], []], top_k=10)      # one answer per history
    state = r.step(r.start(), "B004756YJA")                          # a user whose events come one by one
    r.recommend([state])
    r.add_items(["NEW1"], r.embed_items([{"title": "Rose soap"}]))   # new products, no retraining

N items, m the size, F feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

SCORES = 1 << 21  # user-item scores that are held at once, beside the users' biases of the same size
TOGETHER = 64  # histories that are encoded at once; more of them fill each other up without being faster


@dataclass(frozen=True)
class Recommendation:
    """The answer for one history, best first."""

    ids: list[str]
    numbers: list[int]  # of the items, from 1 on
    titles: list[str]
    scores: list[float]
    notes: list[str]  # what of the history was not understood or not used


@dataclass(frozen=True, eq=False)
class State:
    """A user's history as the recurrence remembers it, all of it, where `recommend` reads the last `max_len` items of a
    list. `step` makes a new one; none is ever changed."""

    hidden: np.ndarray  # [blocks, 2, m]: the real and the imaginary part of every block's state
    z: np.ndarray  # [m]: what the history asks for next
    items: tuple[int, ...]  # all items so far


class Recommender:
    """Recommends from an export. `from_pretrained` opens one."""

    def __init__(self, export: Export, engine: Engine) -> None:
        self.config = export.config
        self.items = export.items
        self._folder, self._engine = export.folder, engine
        # The blocks' weights are the engine's now.
        self._projection = tuple(export.weights.get(f"projection.{part}") for part in ("weight", "bias"))
        self._whitening = {name: value for name, value in export.weights.items() if name.startswith("whitening.")}
        self._table: Table = engine.table(export)

    @classmethod
    def from_pretrained(cls, folder: str | Path, engine: str | None = None, threads: int = 0) -> Recommender:
        """Open an exported folder. engine: "torch" or "onnx"; None takes onnx where the folder has graphs. threads: of
        onnxruntime, 0 for one a core.

        Raises InputError where a file is missing, damaged or of a newer format, and where the engine cannot be had.
        """
        path = Path(folder) / CONFIG
        before = path.read_bytes() if path.exists() else None
        try:
            export = read_folder(folder)
            opened = cls(export, open_engine(export, engine, threads))
        finally:
            if before is not None and (not path.exists() or path.read_bytes() != before):
                raise InputError(f"{folder} was replaced while it was opened; open it again")
        return opened

    def __len__(self) -> int:
        """The number of items."""
        return len(self.items)

    def __contains__(self, item: ItemId) -> bool:
        """Whether an item id, or an item's number, is known."""
        return self.items.number(item) > 0

    # ---------------------------------------------------------------------------------------------------- recommend

    def recommend(
        self,
        histories: Iterable[Sequence[ItemId] | State],
        top_k: int = 10,
        exclude_history: bool = True,
        candidates: Sequence[ItemId] | None = None,
    ) -> list[Recommendation]:
        """The `top_k` best items for each history (item ids, oldest first) or State.

        exclude_history: never recommend what the user had. candidates: rank these alone. Unknown ids are skipped and
        noted; of a history longer than the trained length the last items are read, and that is noted. Of items with the
        same score the one of lower number comes first. Raises InputError where fewer than top_k items are left to rank.
        """
        requests = [self._request(history) for history in _listed(histories, "histories", "[['id', 'id'], []]")]
        notes: list[str] = []
        bias, allowed = self._bias(candidates, notes)
        if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or not 1 <= top_k <= allowed:
            raise InputError(f"top_k {top_k!r} must be a whole number from 1 to {allowed}, the items there are to rank")
        answers: dict[int, Recommendation] = {}
        for rows in self._batches(requests):
            batch = [requests[row] for row in rows]
            own = bias if not exclude_history else self._without_history(bias, batch, rows, allowed, top_k)
            if states := [r.state for r in batch if r.state]:  # of a batch all are, or none is
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

    # ------------------------------------------------------------------------------------------------ event by event

    def start(self, history: Sequence[ItemId] = ()) -> State:
        """The state after a history, an empty one by default. Unknown ids raise InputError.

        While the history fits into the trained length, `recommend` answers the state as it answers the history; of an
        export in eight bits nearly so, since each is rounded on its own way.
        """
        hidden = np.zeros((1, self.config["num_blocks"], 2, self.config["size"]), dtype=np.float32)
        begin = np.zeros(1, dtype=np.int64)  # token 0, whose state is not carried on
        z, _ = self._engine.step(begin, hidden, self._table)
        state = State(hidden[0], z[0], ())
        for item in _listed(history, "a history", "['id', 'id']"):
            state = self.step(state, item)
        return state

    def step(self, state: State, item: ItemId) -> State:
        """The state after one more item, at the cost of one step whatever came before. Raises InputError for an unknown
        id."""
        self._check_state(state)
        number = self.items.number(item)
        if not number:
            raise InputError(f"{self.items.unknown([item])}; the state stays as it is")
        z, hidden = self._engine.step(np.array([number]), state.hidden[None], self._table)
        return State(hidden[0], z[0], (*state.items, number))

    # ----------------------------------------------------------------------------------------------------- new items

    def add_items(self, ids: Sequence[str], features: np.ndarray, titles: Sequence[str] | None = None) -> None:
        """Make new products recommendable, with features [n, F] as `embed_items` or the cache of features gives them;
        they are whitened here where the training's were. Add many at once: every call copies the item table.

        Raises InputError, with nothing added, for ids that are there already or stand twice, for features of another
        shape, and where features or what the model makes of them are not finite.
        """
        weight, bias = self._projection
        if weight is None:
            raise InputError("this model's item table was learned without features, so items cannot be added to it")
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
            raise InputError(f"item {known[0]!r} is there already; remove it from the new ones")
        with np.errstate(over="ignore", invalid="ignore"):
            embeddings = rounded(whitened(features, self._whitening) @ weight + bias, self.config["quantize"])
        bad = ~(np.isfinite(features).all(axis=1) & np.isfinite(embeddings).all(axis=1))
        if bad.any():
            raise InputError(f"the features of item {ids[int(bad.argmax())]!r} are not finite, or far too large")
        self._table, self.items = self._table.extended(embeddings), self.items.extended(more)

    def embed_items(
        self, frame: Any, language_encoder: str | None = None, img_encoder: str | None = None
    ) -> np.ndarray:
        """Return features [n, F] of products, for `add_items`. Embed many at once: every call loads the encoders.

        frame: a pandas DataFrame or a list of dicts. A product has the attributes of items' texts (title, brand, ...);
        if the model read pictures, the path of one as `picture`; and if it read features from files, a list of numbers
        under the name of each. A missing picture or list gives zeros, as in training. language_encoder, img_encoder:
        where the encoders' files are now, if they moved since training; other encoders are refused. Needs torch and
        the encoders' packages. Raises InputError if an encoder cannot be loaded or a product cannot be read.
        """
        records = frame.to_dict("records") if hasattr(frame, "to_dict") else list(_listed(frame, "products", "[{...}]"))
        try:
            from datasets.features.description import embed_records

            encoders = {"language_encoder": language_encoder, "img_encoder": img_encoder}
            return embed_records(records, self.config["features"], encoders)
        except ImportError as error:
            raise InputError(
                f"embedding needs what training needs ({error}): pip install -r requirements.txt"
            ) from error

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write this model, items added since included, as an export of its own."""
        table = self._table.rows()
        if self.config["quantize"] == "int8" and self._table.scale is None:
            raise InputError("the torch engine reads an export in eight bits as float32; save it from engine='onnx'")
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
            notes.append("nothing of the history is known: this is the answer for an empty one")
        if len(items) > longest:
            notes.append(f"the last {longest} of {len(items)} items are read, as in training")
        return _Request(None, tuple(items), notes)

    def _check_state(self, state: State) -> None:
        shape = (self.config["num_blocks"], 2, self.config["size"])
        if state.hidden.shape != shape or max(state.items, default=0) > len(self):
            raise InputError("the state is of another model; make one with start()")

    def _bias(self, candidates: Sequence[ItemId] | None, notes: list[str]) -> tuple[np.ndarray, int]:
        """([1, N+1]: 0 for what may be recommended and -inf for the rest, how many may be)."""
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
        """[B, N+1]: `bias`, which allows so many items, for every user without what they had."""
        own = np.repeat(bias, len(batch), axis=0)
        for at, (row, request) in enumerate(zip(rows, batch, strict=True)):
            had = list(set(request.items))
            left = allowed - np.count_nonzero(bias[0, had] == 0)
            if left < top_k:
                raise InputError(
                    f"history {row}: {left} items are left to rank without those of the history, fewer than top_k "
                    f"{top_k}; ask for fewer, give more candidates, or exclude_history=False"
                )
            own[at, had] = -np.inf
        return own

    def _batches(self, requests: list[_Request]) -> Iterable[list[int]]:
        """Rows that are answered together: states apart from histories, histories of like length."""
        together = max(1, min(TOGETHER, SCORES // (len(self) + 1)))
        for states in (True, False):
            rows = [row for row, request in enumerate(requests) if (request.state is not None) == states]
            rows.sort(key=lambda row: len(requests[row].items))
            yield from (rows[start : start + together] for start in range(0, len(rows), together))

    def _filled(self, histories: list[tuple[int, ...]]) -> np.ndarray:
        """[B, L]: the last items of every history, zeros in front."""
        longest = min(self.config["max_len"], max([1, *map(len, histories)]))
        filled = np.zeros((len(histories), longest), dtype=np.int64)
        for row, items in enumerate(histories):
            if items:
                filled[row, -len(items[-longest:]) :] = items[-longest:]
        return filled


@dataclass(frozen=True)
class _Request:
    state: State | None
    items: tuple[int, ...]  # all that are known, oldest first
    notes: list[str]


def _listed(values: Any, what: str, example: str) -> Iterable:
    """`values`, if it can be a list of something. Raises InputError otherwise."""
    if isinstance(values, str | bytes | State) or not isinstance(values, Iterable):
        raise InputError(f"{what} must be a list such as {example}, not {values!r:.80}")
    return values
