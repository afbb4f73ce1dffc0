"""Indices of the item table: an exact int8 scan, and an approximate index of faiss.

The int8 scan gives the ids of the float32 table, proven for each answer, at a fraction of its time.

t_i: item i's row, t̂_i: its int8 row times its scale, e_i = |t_i - t̂_i|; z: a user's vector, ẑ: its two int8 parts

    |z·t_i - ẑ·t̂_i|  <=  |z| e_i + |z - ẑ| |t̂_i|  =:  b_i                                    (Cauchy and Schwarz)
    z·t_i >= ẑ·t̂_i - b_i,  so the k-th largest of these is at most the k-th best score, L;
    an item with ẑ·t̂_i + b_i < L is not among the best k.

The scan (serving/graphs.py) returns the others, some dozens of a million, and their scores are computed in float32.
ẑ has two parts of 63 steps a side, of which the second holds the rounding error of the first, so |z - ẑ| is small.
Rows that were added or changed since the export have no int8 row: their scores are always computed.

faiss scans the items' 64 principal components in 4 bits each. Its shortlist is scored in float32. It misses an item now
and then. It is used only where no filter and no boost is given; removed and new items are no filter.

N items, m the width of the table, B users.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file, save

from common.errors import InputError
from serving.engines import Engine, OnnxEngine, Table, best_columns
from serving.folder import FAISS, HINT, INDEX, SCAN, Export
from serving.weights import STEPS, dequantize, quantize

ROUNDING = 4e-6  # of the float32 operations, relative to |z| |t|
COMPONENTS = 64  # principal components that faiss scans
SHORTLIST, TIMES = 4000, 20  # faiss's shortlist has at least 4000 items, and 20 times as many as are asked for
TRAINED_ON = 1 << 16  # rows that faiss's quantizer is trained on
ADDED = 1 << 20  # rows that faiss transforms at once


class Index(Protocol):
    """What `recommend` asks instead of an engine's `rank`."""

    any_bias: bool  # whether it takes filters and boosts

    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


def open_index(export: Export, engine: Engine, threads: int) -> Index | None:
    """Return an export's index; None if it has none, or is served by another engine than onnx."""
    files = export.config["files"]
    if not isinstance(engine, OnnxEngine) or not {INDEX, FAISS} & files.keys():
        return None
    if INDEX in files:
        return Int8Index(export.folder, export.table.shape, threads)
    return FaissIndex(export.folder, export.table.shape)


def build_index(table: np.ndarray) -> bytes:
    """Return the bytes of index.safetensors for a table [N+1, m] float32: codes [m, N+1], scale and bound [N+1]."""
    codes = np.empty(table.shape[::-1], dtype=np.int8)
    scale, bound = (np.empty(len(table), dtype=np.float32) for _ in range(2))
    for start in range(0, len(table), 1 << 16):
        part = slice(start, start + (1 << 16))
        rows, scale[part] = quantize(table[part], axis=1)
        error = table[part].astype(np.float64) - dequantize(rows, scale[part], axis=1)
        codes[:, part], bound[part] = rows.T, np.linalg.norm(error, axis=1) * (1 + 1e-6)  # rounded up
    return save({"codes": codes, "scale": scale, "bound": bound})


class Int8Index:
    """The int8 rows of an export's table, and the scan over them."""

    any_bias = True

    def __init__(self, folder: Path, shape: tuple[int, ...], threads: int) -> None:
        """shape: of the table, [N+1, m]. Raises InputError if the index is of another table."""
        import onnxruntime

        path = folder / INDEX
        parts = load_file(path)
        shapes = {name: part.shape for name, part in parts.items()}
        rows, size = shape
        if shapes != {"codes": (size, rows), "scale": (rows,), "bound": (rows,)}:
            raise InputError(f"{path} is not the index of a table [{rows}, {size}]; {HINT}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # The file may change later: give onnxruntime the arrays that were read.
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(part) for part in parts.values()]
        options.add_external_initializers(list(parts), values)
        self._scan = onnxruntime.InferenceSession(str(folder / SCAN), options, providers=["CPUExecutionProvider"])
        self._rows = rows
        self._largest = float(np.sqrt(size) * 127 * parts["scale"].max())  # at least every |t̂_i|

    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, items) [B, k] as an Engine does. table: the export's, or one that grew or changed since."""
        fresh = table.changed_since(self._rows)
        scores, items = np.full((len(z), k), -np.inf, np.float32), np.zeros((len(z), k), np.int64)
        for row, user in enumerate(z):
            own = bias[row if len(bias) > 1 else 0]
            among = np.union1d(self.shortlist(user, own, k, fresh), fresh)
            exact, best = best_of(user, among, table, own, k)
            scores[row, : len(best)], items[row, : len(best)] = exact, best
        return scores, items

    def shortlist(self, z: np.ndarray, bias: np.ndarray, k: int, without: np.ndarray) -> np.ndarray:
        """Return the items that can be among the best k for z [m], except `without`. bias: [N+1] or longer."""
        bias = bias[: self._rows]
        if len(without):
            bias = bias.copy()
            bias[without[without < len(bias)]] = -np.inf
        step = max(float(np.abs(z).max()) / STEPS, 1e-30)
        first = np.rint(z / step)
        second = np.rint((z - first * step) * (2 * STEPS / step))
        error = np.linalg.norm(z.astype(np.float64) - step * (first + second / (2 * STEPS)))
        length = float(np.linalg.norm(z))
        inputs: dict[str, Any] = {
            "z": (np.stack([first, second]) + STEPS + 1).astype(np.uint8),
            "steps": np.array([[step], [step / (2 * STEPS)]], dtype=np.float32),
            "length": np.array(length * (1 + 1e-6), dtype=np.float32),
            "slack": np.array((error + ROUNDING * length) * self._largest, dtype=np.float32),
            "bias": bias,
            "k": np.array([min(k, len(bias))], dtype=np.int64),
        }
        [found] = self._scan.run(None, inputs)
        return found


def best_of(z: np.ndarray, among: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, items) of the best k of some items, sorted numbers, in float32."""
    # Not by @, which may sum equal rows in another order.
    exact = np.einsum("nm,m->n", table.vectors(among), z) + bias[among]
    best = best_columns(exact[None], k)[0]
    return exact[best], among[best]


def import_faiss() -> Any:
    """Return the module faiss. Raises InputError if it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(f"--index faiss needs the package faiss-cpu ({error}): pip install faiss-cpu") from error
    return faiss


def build_faiss(table: np.ndarray) -> bytes:
    """Return the bytes of index.faiss for a table [N+1, m] float32."""
    faiss = import_faiss()
    (rows, width), bits = table.shape, 4
    if rows < 1 << bits:
        raise InputError(f"--index faiss needs at least {1 << bits} items, this catalogue has {rows - 1}; leave it out")
    rng = np.random.default_rng(0)
    sample = table[np.sort(rng.permutation(rows)[:TRAINED_ON])]
    kept = min(width, COMPONENTS)
    # Not centred, which would change inner products; rotated, so that components of like variance share the bits.
    components = np.linalg.eigh(sample.T.astype(np.float64) @ sample)[1][:, ::-1][:, :kept]
    rotation = np.linalg.qr(rng.standard_normal((kept, kept)))[0]
    transform = faiss.LinearTransform(width, kept, False)
    faiss.copy_array_to_vector((rotation @ components.T).astype(np.float32).ravel(), transform.A)
    transform.is_trained = True
    scan = faiss.IndexPQFastScan(kept, kept, bits, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexPreTransform(transform, scan)
    index.train(sample)
    for start in range(0, rows, ADDED):
        index.add(np.ascontiguousarray(table[start : start + ADDED]))
    return faiss.serialize_index(index).tobytes()


class FaissIndex:
    """faiss's index of an export's table."""

    any_bias = False

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        """shape: of the table, [N+1, m]. Raises InputError if the file is damaged or of another table.

        `read_folder` has compared the file's checksum. faiss parses it and executes nothing of it.
        """
        faiss, path = import_faiss(), folder / FAISS
        try:
            self._index = faiss.deserialize_index(np.frombuffer(path.read_bytes(), np.uint8))
        except RuntimeError as error:
            raise InputError(f"{path} is damaged ({str(error).splitlines()[0]:.200}); {HINT}") from error
        found = self._index.ntotal, self._index.d
        if found != shape or self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise InputError(f"{path} is not the index of a table {list(shape)}; {HINT}")
        self._rows = shape[0]

    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, items) [B, k] as an Engine does. table: the export's, or one that grew or changed since.

        bias [1, N+1]: 0, or -inf for removed items. Rows that were added or changed are scored beside the index.
        """
        fresh = table.changed_since(self._rows)
        scores, items = np.full((len(z), k), -np.inf, np.float32), np.zeros((len(z), k), np.int64)
        for row, user in enumerate(z):
            among = self.shortlist(user, bias[0], k, fresh)
            among = np.union1d(among, fresh) if len(fresh) else among
            exact, best = best_of(user, among, table, bias[0], k)
            scores[row, : len(best)], items[row, : len(best)] = exact, best
        return scores, items

    def shortlist(self, z: np.ndarray, bias: np.ndarray, k: int, without: np.ndarray) -> np.ndarray:
        """Return some max(SHORTLIST, TIMES k) items, sorted, that are likely the best for z [m], except `without`."""
        wanted = asked = min(self._rows, max(SHORTLIST, TIMES * k))
        while True:
            found = self._index.search(z[None], asked)[1][0]
            found = found[found >= 0]
            usable = found[bias[found] > -np.inf]
            usable = np.setdiff1d(usable, without) if len(without) else np.sort(usable)
            if 2 * len(usable) >= wanted or asked == self._rows:
                return usable
            asked = min(self._rows, 2 * asked)
