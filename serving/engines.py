"""Engines run an export's model on NumPy arrays. The item table, onnxruntime, users' states, baselines in NumPy.

    recommend(history [B, L], table, bias, k)      -> scores [B, k], items [B, k]
    step(item [B], hidden [B, blocks, 2, m], table) -> z [B, m], hidden
    rank(z [B, m], table, bias, k)                 -> scores [B, k], items [B, k]

history: item numbers, oldest first, left-padded with 0; all zeros: an empty history. bias [1 or B, table.width]: 0
for candidates, -inf for all other items, for row 0 and from N+1 on. Other numbers are added to the scores, except by
onnxruntime with int8 (bias_before_scaling). B users, L steps, N items, m the size.

An export of two widths has a table [N+1, w]. `rank` then takes z [B, w], and the encoder reads `table.wide` [N+1, m].

Engines know neither users nor item ids. They agree up to rounding. With int8, onnxruntime multiplies integers and torch
multiplies dequantized float32.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np

from common.errors import InputError, shown
from serving.folder import GRAPHS, HINT, Export, spare_rows
from serving.weights import COUNTING, MATRICES, STEPS, Weights, dequantize, quantize, rounded

ENGINES = ("torch", "onnx")


class Engine(Protocol):
    """What the Recommender calls; see the top of this file for the shapes."""

    def table(self, export: Export) -> Table: ...
    def recommend(
        self, history: np.ndarray, table: Table, bias: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def step(self, item: np.ndarray, hidden: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]: ...
    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


@runtime_checkable
class Encoder(Protocol):
    """An engine that encodes histories without states."""

    def encode(self, history: np.ndarray, table: Table) -> np.ndarray: ...


@runtime_checkable
class VectorEngine(Protocol):
    """An engine that returns z [B, m] of histories [B, L], as needed for an index and for two widths."""

    def vectors(self, history: np.ndarray, table: Table) -> np.ndarray: ...


def open_engine(export: Export, name: str | None, threads: int) -> Engine:
    """Return the engine of this name; None: onnx if the export has graphs, else torch; a baseline has its own.

    threads: of onnxruntime, 0: one per core. torch uses the process's threads.
    Raises InputError if the engine is unknown, lacks a package, or the export has no valid graphs.
    """
    if baseline := export.config.get("model"):
        if name is not None:
            raise InputError(f"{export.folder} is a {baseline}, which NumPy serves; leave out engine {shown(name)}")
        return BaselineEngine(export)
    name = name or ("onnx" if export.has_graphs else "torch")
    if name not in ENGINES:
        raise InputError(f"engine {shown(name)} is unknown; use one of {', '.join(ENGINES)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise InputError(f"threads {shown(threads)} must be a whole number, 0 for one per core")
    if name == "onnx":
        return OnnxEngine(export, threads)
    try:
        from serving.torch_engine import TorchEngine
    except ImportError as error:
        raise InputError(
            f"the torch engine needs torch and a clone of the repository ({error}); the onnx engine needs neither: "
            f"export with --format onnx"
        ) from error
    return TorchEngine(export)


# ----------------------------------------------------------------------------------------------------------- item table


class Growing:
    """The first rows of an array that has room for more. Neither they nor their number ever change.

    `extended` writes into the room, so that both share the memory. One thread at a time may extend.
    """

    def __init__(self, buffer: np.ndarray, length: int, used: list[int] | None = None) -> None:
        """buffer: its first `length` rows count. used: [rows written so far], shared by all that share the buffer."""
        self.buffer, self.length = buffer, length
        self._used = [length] if used is None else used

    @property
    def values(self) -> np.ndarray:
        return self.buffer[: self.length]

    def with_room(self, least: int = 1) -> Growing:
        """Return the same rows with room for `least` more, copied if there is none."""
        has_room = self._used[0] == self.length and self.length + least <= len(self.buffer)
        return self if has_room else self.copied(least)

    def copied(self, least: int = 1) -> Growing:
        """Return a copy of the rows with room for `least` more at least."""
        shape = (self.length + least + spare_rows(self.length), *self.buffer.shape[1:])
        buffer = np.zeros(shape, self.buffer.dtype, order="C" if self.buffer.flags.c_contiguous else "F")
        buffer[: self.length] = self.values
        return Growing(buffer, self.length)

    def extended(self, more: np.ndarray) -> Growing:
        """Return these rows with `more` appended, copied only if there is no room."""
        grown = self.with_room(len(more))
        end = self.length + len(more)
        grown.buffer[self.length : end] = more
        grown._used[0] = end
        return Growing(grown.buffer, end, grown._used)


class WideRows:
    """The rows [N+1, m] that the encoder of an export of two widths reads. They never change.

    The exported ones stay in their memory-mapped file; added and replaced rows are in memory.
    """

    def __init__(self, exported: np.ndarray, users: np.ndarray, items: np.ndarray, stored_as: str) -> None:
        """users, items [m, w]: map z and rows to vectors of width w. stored_as: as serving/weights.py."""
        self.exported, self.users, self.items, self.stored_as = exported, users, items, stored_as
        self._more = Growing(np.zeros((64, exported.shape[1]), np.float32), 0)
        self._replaced: dict[int, np.ndarray] = {}

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """Return rows in float32, in the shape of `numbers` and m."""
        rows = np.empty((numbers.size, self.exported.shape[1]), np.float32)
        flat, first = numbers.ravel(), len(self.exported)
        rows[flat < first] = self.exported[flat[flat < first]]
        rows[flat >= first] = self._more.values[flat[flat >= first] - first]
        for at in np.flatnonzero(np.isin(flat, list(self._replaced))) if self._replaced else ():
            rows[at] = self._replaced[int(flat[at])]
        return rows.reshape(*numbers.shape, -1)

    def all(self) -> np.ndarray:
        """Return all rows [N+1, m] in the type of the export."""
        return self.vectors(np.arange(len(self.exported) + self._more.length)).astype(self.exported.dtype)

    def gathered(self, numbers: np.ndarray) -> Table:
        """Return the table of some rows."""
        return Table(self.vectors(numbers), None)

    def narrow(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows [n, w] of the table for rows [n, m], rounded as the table is stored."""
        return rounded(rows @ self.items, self.stored_as)

    def extended(self, rows: np.ndarray) -> WideRows:
        return self._with(self._more.extended(rows), self._replaced)

    def replaced(self, numbers: np.ndarray, rows: np.ndarray) -> WideRows:
        return self._with(self._more, self._replaced | dict(zip(numbers.tolist(), rows.copy(), strict=True)))

    def _with(self, more: Growing, replaced: dict[int, np.ndarray]) -> WideRows:
        wide = WideRows.__new__(WideRows)
        wide.__dict__ |= self.__dict__ | {"_more": more, "_replaced": replaced}
        return wide


class Table:
    """The item table in memory: float32 [N+1, m], or int8 [m, width] with a scale per item. It never changes.

    int8 is stored transposed because onnxruntime's integer product reads it fastest that way. Room for more rows is
    then a part of the columns: width >= N+1.
    """

    def __init__(
        self,
        table: np.ndarray,
        scale: np.ndarray | None,
        buffer: np.ndarray | None = None,
        wide: WideRows | None = None,
    ) -> None:
        """table: [N+1, m], int8 with `scale` [N+1] or float32 without. buffer: begins with a float32 `table` and has
        room for more rows. wide: the encoder's rows, if they have another width."""
        if scale is not None:
            table = np.asfortranarray(table)
        self._rows = Growing(table if buffer is None else buffer, len(table))
        self._scale = None if scale is None else Growing(scale, len(scale))
        self._replaced = np.zeros(0, dtype=np.int64)  # numbers, sorted
        self._wide = wide

    def _of(self, rows: Growing, scale: Growing | None, wide: WideRows | None) -> Table:
        table = Table.__new__(Table)
        table._rows, table._scale, table._replaced, table._wide = rows, scale, self._replaced, wide
        return table

    @classmethod
    def of(cls, export: Export) -> Table:
        """Return the table of an export, as it is stored."""
        wide = None
        if export.rows is not None:
            users, items = export.weights["cut.users"], export.weights["cut.items"]
            wide = WideRows(export.rows, users, items, export.config["quantize"])
        return cls(export.table, export.scale, export.buffer if export.scale is None else None, wide)

    @property
    def wide(self) -> WideRows | Table:
        """The rows that the encoder reads: these, unless the export has two widths."""
        return self if self._wide is None else self._wide

    def vectors_to_rank(self, z: np.ndarray) -> np.ndarray:
        """Return z [B, m] as vectors [B, w] to rank this table with: the same, unless the export has two widths."""
        return z if self._wide is None else z @ self._wide.users

    def __len__(self) -> int:
        return self._rows.length

    @property
    def width(self) -> int:
        """The number of scores per user. Those from N+1 on are of no item, so the bias must be -inf there."""
        return len(self) if self._scale is None else len(self._rows.buffer)

    @property
    def values(self) -> np.ndarray:
        """[N+1, m] float32, or [m, width] int8."""
        return self._rows.values if self._scale is None else self._rows.buffer.T

    @property
    def scale(self) -> np.ndarray | None:
        """The scale of each column [width] of an int8 table."""
        return None if self._scale is None else self._scale.buffer

    def inputs(self) -> dict[str, np.ndarray]:
        """Return the table as inputs of the graphs (serving/graphs.py)."""
        return {"table": self.values} if self.scale is None else {"table": self.values, "table_scale": self.scale}

    def rows(self) -> np.ndarray:
        """Return [N+1, m], the layout of an export."""
        return self._rows.values

    def row_scales(self) -> np.ndarray | None:
        """Return [N+1] of an int8 table."""
        return None if self._scale is None else self._scale.values

    def vectors(self, numbers: np.ndarray | slice) -> np.ndarray:
        """Return rows in float32."""
        rows = self.rows()[numbers]
        return rows if self._scale is None else dequantize(rows, self._scale.values[numbers], axis=1)

    def changed_since(self, exported: int) -> np.ndarray:
        """Return the numbers of rows that were replaced, or added to the first `exported`."""
        return np.concatenate([self._replaced, np.arange(exported, len(self))])

    def gathered(self, numbers: np.ndarray) -> Table:
        """Return the table of some rows."""
        return Table(self.rows()[numbers], None if self._scale is None else self._scale.values[numbers])

    def with_room(self, least: int = 1) -> Table:
        """Return this table with room for `least` more rows; copied if there is none."""
        rows = self._rows.with_room(least)
        return self if rows is self._rows else self._of(rows, self._scale and self._scale_for(rows), self._wide)

    def _scale_for(self, rows: Growing) -> Growing:
        """Return a copy of the scales with the same room as `rows`."""
        assert self._scale is not None
        scale = np.zeros(len(rows.buffer), np.float32)  # 0: scores of the room are 0, so a bias of -inf excludes them
        scale[: len(self)] = self._scale.values
        return Growing(scale, len(self))

    def extended(self, embeddings: np.ndarray) -> Table:
        """Return a table with the rows `embeddings` [n, m] float32 appended in the same storage.

        Both share their memory if there is room.
        """
        table, wide = self.with_room(len(embeddings)), self._wide
        if wide is not None:
            embeddings, wide = wide.narrow(embeddings), wide.extended(embeddings)
        if table._scale is None:
            return self._of(table._rows.extended(embeddings), None, wide)
        more, more_scale = quantize(embeddings, axis=1)
        return self._of(table._rows.extended(more), table._scale.extended(more_scale), wide)

    def replaced(self, numbers: np.ndarray, embeddings: np.ndarray) -> Table:
        """Return a copy with other rows [n, m] float32 at `numbers`."""
        rows, scale, wide = self._rows.copied(), self._scale, self._wide
        if wide is not None:
            embeddings, wide = wide.narrow(embeddings), wide.replaced(numbers, embeddings)
        if scale is None:
            rows.values[numbers] = embeddings
        else:
            scale = self._scale_for(rows)
            rows.values[numbers], scale.values[numbers] = quantize(embeddings, axis=1)
        table = self._of(rows, scale, wide)
        table._replaced = np.union1d(self._replaced, numbers)
        return table


# --------------------------------------------------------------------------------------------------- what engines share


def bias_before_scaling(z: np.ndarray, table: Table, bias: np.ndarray) -> np.ndarray:
    """Return the bias [B, width] for `rank` that adds `bias` to the scores; of an int8 table, ranked by onnxruntime.

    The graph multiplies a user's scores by the scale of the user's activations after it adds the bias.
    """
    if table.scale is None:
        return bias
    return bias / np.maximum(np.abs(z).max(axis=1, keepdims=True) / np.float32(STEPS), np.float32(1e-30))


def filled_up(rows: np.ndarray, fewest: int) -> np.ndarray:
    """Add rows of zeros until there are `fewest`."""
    missing = fewest - len(rows)
    return rows if missing <= 0 else np.concatenate([rows, np.zeros_like(rows, shape=(missing, *rows.shape[1:]))])


def best_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of each row's k largest scores [B, min(k, columns)]; of equal scores the first comes first."""
    k = min(k, scores.shape[1])
    least = np.partition(scores, -k, axis=1)[:, -k]
    rows = []
    for row, low in zip(scores, least, strict=True):
        at = np.flatnonzero(row >= low)
        rows.append(at[np.argsort(-row[at], kind="stable")[:k]])
    return np.stack(rows)


# ---------------------------------------------------------------------------------------------------------- onnxruntime

ONNX_ROWS = 2  # the fewest rows of a product: one alone takes other routines, which round differently


class OnnxEngine:
    """onnxruntime on the CPU."""

    def __init__(self, export: Export, threads: int) -> None:
        if not export.has_graphs:
            raise InputError(f"{export.folder} has no ONNX graphs; export it with --format onnx, or use engine torch")
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"the onnx engine needs onnxruntime ({error}): pip install onnxruntime") from error

        # Share the weights that were read and checked between both graphs; the file may change later.
        names = [name for name in export.weights if any(f".{matrix}" in name for matrix in MATRICES)]
        weights = [onnxruntime.OrtValue.ortvalue_from_numpy(export.weights[name]) for name in names]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads

        def load(graph: str) -> onnxruntime.InferenceSession:
            path = str(export.folder / graph)
            try:
                return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's exceptions share no base class
                reason = str(error).strip().splitlines()[0]
                raise InputError(
                    f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__} ({reason}); update onnxruntime, "
                    f"or {HINT}"
                ) from error

        # Load all graphs now: if the folder is replaced later, its graphs must not be used with this table.
        recommend, step, rank = GRAPHS
        self._max_len: int = export.config["max_len"]
        self._size: int = export.config["size"]
        self._rank = load(rank)
        options.add_external_initializers(names, weights)
        self._recommend, self._step = load(recommend), load(step)

    def table(self, export: Export) -> Table:
        return Table.of(export)

    def recommend(self, history: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, items = np.empty((len(history), k), np.float32), np.empty((len(history), k), np.int64)
        for rows, read in self._of_one_length(history):
            own = bias if len(bias) == 1 else bias[rows]
            scores[rows], items[rows] = self._ranked(self._recommend, "history", read, table, own, k)
        return scores, items

    def vectors(self, history: np.ndarray, table: Table) -> np.ndarray:
        """Return z [B, m] of histories [B, L]. Graphs of exports before the index have no such output."""
        z = np.empty((len(history), self._size), np.float32)
        needed = np.unique(np.append(history, 0))
        few, bias = table.wide.gathered(needed), np.zeros((1, len(needed)), np.float32)
        for rows, read in self._of_one_length(np.searchsorted(needed, history)):
            inputs = {"history": filled_up(read, ONNX_ROWS), "bias": bias, "k": np.ones(1, np.int64), **few.inputs()}
            z[rows] = _run(self._recommend, inputs, ["z"])[0][: len(rows)]
        return z

    def _of_one_length(self, history: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows, their histories) in lengths of powers of two: the sum over a longer one rounds differently."""
        length = np.where(history > 0, np.arange(history.shape[1], 0, -1), 1).max(axis=1)
        steps = np.minimum(2 ** np.ceil(np.log2(length)).astype(np.int64), self._max_len)
        for n in np.unique(steps):
            rows = np.flatnonzero(steps == n)
            yield rows, np.pad(history[rows, -n:], ((0, 0), (max(0, n - history.shape[1]), 0)))

    def step(self, item: np.ndarray, hidden: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
        if table.wide is not table:
            needed, item = np.unique(item, return_inverse=True)
            table = table.wide.gathered(needed)
        z, hidden = _run(self._step, {"item": item, "hidden": hidden, **table.inputs()})
        return z, hidden

    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._ranked(self._rank, "z", z, table, bias, k)

    @staticmethod
    def _ranked(
        session: Any, name: str, rows: np.ndarray, table: Table, bias: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        bias = bias if len(bias) == 1 else filled_up(bias, ONNX_ROWS)
        inputs = {name: filled_up(rows, ONNX_ROWS), "bias": bias, "k": np.array([k], dtype=np.int64), **table.inputs()}
        scores, items = _run(session, inputs, ["scores", "items"])
        return scores[: len(rows)], items[: len(rows)]


def _run(session: Any, inputs: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    """Run a graph. Raises InputError if it does not take the inputs that every export's graphs take."""
    try:
        return session.run(outputs, inputs)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise InputError(f"an ONNX graph of the export failed ({str(error).splitlines()[0]:.300}); {HINT}") from error


# --------------------------------------------------------------------------------------------------------------- states
# All that a recommender keeps of a user, and how the steps of an engine make it from a history.

STEP_ROWS = 2048  # steps that an engine computes at once
HEADER = struct.Struct("<4sBBHHI")  # magic, version, blocks, size, bytes of the model's name, items
MAGIC, VERSION = b"fMRL", 1


@dataclass(frozen=True, eq=False)
class State:
    """The recurrence's state after a user's whole history. Immutable: `Recommender.step` returns a new one.

    Keep it in a key-value store as `to_bytes()`; about 1.5 kB at size 64 with two blocks and 40 items.
    """

    hidden: np.ndarray  # [blocks, 2, m]: real and imaginary part of each block's state
    z: np.ndarray  # [m]: the sequence representation
    items: tuple[int, ...]  # item numbers so far
    model: str  # the model that made it, as Recommender.model

    def to_bytes(self) -> bytes:
        """Return the state as bytes: little-endian numbers and a checksum, nothing pickled."""
        blocks, _, size = self.hidden.shape
        name = self.model.encode()
        body = [
            HEADER.pack(MAGIC, VERSION, blocks, size, len(name), len(self.items)),
            name,
            self.hidden.astype("<f4").tobytes(),
            self.z.astype("<f4").tobytes(),
            np.array(self.items, dtype="<u4").tobytes(),
        ]
        content = b"".join(body)
        return content + struct.pack("<I", zlib.crc32(content))

    @classmethod
    def from_bytes(cls, content: bytes) -> State:
        """Return the state that `to_bytes` wrote. Raises InputError if the bytes are damaged or no state."""
        try:
            magic, version, blocks, size, name, items = HEADER.unpack_from(content)
        except (struct.error, TypeError):
            magic = version = None
        if magic != MAGIC or version != VERSION:
            raise InputError(f"these bytes are not a state of version {VERSION}; encode the history again: start()")
        ends = np.cumsum([HEADER.size, name, blocks * 2 * size * 4, size * 4, items * 4]).tolist()
        if len(content) != ends[-1] + 4 or content[ends[-1] :] != struct.pack("<I", zlib.crc32(content[: ends[-1]])):
            raise InputError("the bytes of the state are damaged; encode the history again: start()")
        model, *arrays, numbers = (content[start:end] for start, end in pairwise(ends))
        hidden, z = (np.frombuffer(part, dtype="<f4").astype(np.float32) for part in arrays)
        return cls(
            hidden.reshape(blocks, 2, size),
            z,
            tuple(np.frombuffer(numbers, dtype="<u4").tolist()),
            model.decode("utf-8", "replace"),
        )


def encode_by_steps(
    engine: Engine, table: Table, eigenvalues: np.ndarray, history: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (z [B, m], hidden [B, blocks, 2, m]) after histories [B, L], left-padded with 0.

    eigenvalues: λ [blocks, m]. Each block's recurrence h_t = u_t + λ h_{t-1} runs here. The engine computes the inputs
    u_t of all steps at once: it steps from states whose earlier blocks are known and whose block i is zero. So it takes
    blocks + 1 calls for up to 2048 steps.
    """
    users, blocks = len(history), len(eigenvalues)
    hidden = np.zeros((users, blocks, 2, eigenvalues.shape[1]), dtype=np.float32)
    z = np.zeros((users, eigenvalues.shape[1]), dtype=np.float32)
    at_once = max(1, STEP_ROWS // max(1, users))
    for start in range(0, history.shape[1], at_once):
        items = history[:, start : start + at_once]
        before = np.zeros((*items.shape, *hidden.shape[1:]), dtype=np.float32)
        before[:, 0] = hidden
        for i, decay in enumerate(eigenvalues):
            _, after = engine.step(items.ravel(), before.reshape(-1, *hidden.shape[1:]), table)
            u = after[:, i].reshape(*items.shape, *hidden.shape[2:])
            h = u[:, :, 0] + 1j * u[:, :, 1]
            h[items == 0] = 0  # padding, or the empty history's token
            for t in range(1, items.shape[1]):
                h[:, t] += decay * h[:, t - 1] * (items[:, t] > 0)[:, None]
            before[:, 1:, i, 0], before[:, 1:, i, 1] = h.real[:, :-1], h.imag[:, :-1]
        z, hidden = engine.step(items[:, -1], before[:, -1], table)
        hidden = hidden * (items[:, -1] > 0)[:, None, None, None]
    return z, hidden


def state_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the shape of State.hidden. The 2m states of lrurec's blocks take two rows each."""
    return config["num_blocks"] * (2 if config.get("model") == "lrurec" else 1), 2, config["size"]


def decays_of(weights: Weights, config: Mapping[str, Any]) -> np.ndarray:
    """Return λ = exp(-exp(ν) + i exp(θ)) of each row of a state [rows, m], complex64; 0 for models without an LRU."""
    shape = state_shape(config)[::2]
    if config.get("model", "lrurec") != "lrurec":
        return np.zeros(shape, dtype=np.complex64)
    nu, theta = (
        np.exp(np.stack([weights[f"blocks.{i}.lru.{part}"] for i in range(config["num_blocks"])]).astype(np.float64))
        for part in ("nu_log", "theta_log")
    )
    return np.exp(-nu + 1j * theta).astype(np.complex64).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ baselines
# In NumPy: a shop can compare them with fMRLRec in the same Recommender.
#
# lrurec and sasrec compute what model/baselines/ says. sasrec needs the whole history, so it has no states.
# popularity and itemknn have the item table [N+1, 2]: an item's number, and its score by popularity. So the rows of
# some items alone still say which items they are. z is the row of the history's last item.
# S = 2m states of the LRU.

PRODUCT_ROWS = 4  # the fewest rows of a product: fewer take other routines, which round differently


class BaselineEngine:
    """An Engine for one of BASELINES."""

    def __init__(self, export: Export) -> None:
        self._weights: Weights = export.weights
        self._config = export.config
        self._name: str = export.config["model"]
        self._decays = decays_of(export.weights, export.config).reshape(export.config["num_blocks"], -1)

    def table(self, export: Export) -> Table:
        return Table(export.table, None, export.buffer)

    def recommend(self, history: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rank(self.encode(history, table), table, bias, k)

    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = (self._counted(z, table) if self._name in COUNTING else self._products(z, table)) + bias
        best = best_columns(scores, k)
        return np.take_along_axis(scores, best, axis=1), best

    def step(self, item: np.ndarray, hidden: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
        if self._name in COUNTING:
            return table.values[item], hidden
        x, after = self._norm(table.values[filled_up(item, PRODUCT_ROWS)], "norm"), []
        halves = len(x), self._config["num_blocks"], 2, 2, -1  # of the states, each re and im
        before = filled_up(hidden, PRODUCT_ROWS).reshape(halves)
        for i, decay in enumerate(self._decays):
            h = (before[:, i, :, 0] + 1j * before[:, i, :, 1]).reshape(len(x), -1)
            h = self._inputs(x, f"blocks.{i}") + decay * h
            after.append(h.reshape(len(x), 2, -1))
            x = self._lru_block(x, h, f"blocks.{i}")
        stacked = np.stack(after, axis=1).reshape(len(x), -1, self._config["size"])
        new = np.stack([stacked.real, stacked.imag], axis=2).astype(np.float32)
        return x[: len(item)], new[: len(item)]

    def encode(self, history: np.ndarray, table: Table) -> np.ndarray:
        """Return z [B, m] of histories [B, L], left-padded with 0."""
        if self._name in COUNTING:
            return table.values[history[:, -1]]
        if self._name == "sasrec":
            return np.stack([self._attended(row[row > 0] if row.any() else row[-1:], table) for row in history])
        users, steps = len(history), history.shape[1]
        history = filled_up(history, PRODUCT_ROWS)
        x = self._norm(table.values[history], "norm")
        for i, decay in enumerate(self._decays):
            h = self._inputs(x, f"blocks.{i}")
            for t in range(1, steps):
                h[:, t] += decay * h[:, t - 1] * (history[:, t - 1] > 0)[:, None]
            x = self._lru_block(x, h, f"blocks.{i}")
        return x[:users, -1]

    # ------------------------------------------------------------------------------------------------ lrurec and sasrec

    def _inputs(self, x: np.ndarray, block: str) -> np.ndarray:
        """Return γ (B x + b): [..., m] -> [..., S], complex64."""
        w = {part: self._weights[f"{block}.lru.{part}"] for part in ("B_re", "B_im", "B_bias_re", "B_bias_im")}
        u = x @ w["B_re"].T + w["B_bias_re"] + 1j * (x @ w["B_im"].T + w["B_bias_im"])
        return (u * np.exp(self._weights[f"{block}.lru.gamma_log"])).astype(np.complex64)

    def _lru_block(self, x: np.ndarray, h: np.ndarray, block: str) -> np.ndarray:
        """Return the block's output of its inputs x [..., m] and states h [..., S]."""
        w = self._weights
        y = h.real @ w[f"{block}.lru.C_re"].T - h.imag @ w[f"{block}.lru.C_im"].T + w[f"{block}.lru.C_bias"]
        x = self._norm(x + y, f"{block}.norm1")
        return self._norm(x + self._feed_forward(x, block, gelu), f"{block}.norm2")

    def _attended(self, items: np.ndarray, table: Table) -> np.ndarray:
        """Return z [m] of one history of SASRec."""
        w, n, heads = self._weights, len(items), self._config["num_heads"]
        x = table.values[items] * np.float32(np.sqrt(self._config["size"])) + w["positions"][n - 1 :: -1][:n]
        later = np.triu(np.full((n, n), -np.inf, dtype=np.float32), 1)
        for i in range(self._config["num_blocks"]):
            block = f"blocks.{i}"
            query = self._norm(x, f"{block}.norm1", 1e-8)
            q, k, v = (
                (of @ w[f"{block}.attention.W_{part}.weight"].T).reshape(n, heads, -1).swapaxes(0, 1)
                for part, of in (("Q", query), ("K", x), ("V", x))
            )
            logits = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(q.shape[-1])) + later
            weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
            attended = (weight / weight.sum(axis=-1, keepdims=True)) @ v
            f = self._norm(query + attended.swapaxes(0, 1).reshape(n, -1), f"{block}.norm2", 1e-8)
            x = f + self._feed_forward(f, block, lambda y: np.maximum(y, 0))
        return self._norm(x[-1], "norm", 1e-8)

    def _norm(self, x: np.ndarray, name: str, epsilon: float = 1e-5) -> np.ndarray:
        scaled = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + np.float32(epsilon))
        return scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]

    def _feed_forward(self, x: np.ndarray, block: str, activation: Any) -> np.ndarray:
        w = self._weights
        hidden = activation(x @ w[f"{block}.W1.weight"].T + w[f"{block}.W1.bias"])
        return hidden @ w[f"{block}.W2.weight"].T + w[f"{block}.W2.bias"]

    @staticmethod
    def _products(z: np.ndarray, table: Table) -> np.ndarray:
        return (filled_up(z, PRODUCT_ROWS) @ table.values.T)[: len(z)]

    # --------------------------------------------------------------------------------------------------------- counting

    def _counted(self, z: np.ndarray, table: Table) -> np.ndarray:
        """Return scores [B, rows of the table] for last items z [B, 2]."""
        w, numbers = self._weights, table.values[:, 0].astype(np.int64)
        scores = np.tile(table.values[:, 1], (len(z), 1))
        dense = np.empty(len(w["begins"]) - 1, dtype=np.float32)
        for row, last in enumerate(z[:, 0].astype(np.int64)):
            dense.fill(np.nan)
            part = slice(w["begins"][last], w["begins"][last + 1])
            dense[w["neighbours"][part]] = w["alike"][part]
            alike = dense[numbers]
            scores[row] = np.where(np.isnan(alike), scores[row], alike)
        return scores


def gelu(x: np.ndarray) -> np.ndarray:
    """Return x Φ(x), with erf by formula 7.1.26 of Abramowitz and Stegun, whose error is at most 1.5e-7."""
    y = np.abs(x.astype(np.float64)) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * y)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return (x * (1 + np.sign(x) * (1 - series * np.exp(-y * y))) / 2).astype(np.float32)
