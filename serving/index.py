"""Exact retrieval by an int8 scan: the ids of the float32 table, proven for each answer, at a fraction of its time.

t_i: item i's row, t̂_i: its int8 row times its scale, e_i = |t_i - t̂_i|; z: a user's vector, ẑ: its two int8 parts

    |z·t_i - ẑ·t̂_i|  <=  |z| e_i + |z - ẑ| |t̂_i|  =:  b_i                                    (Cauchy and Schwarz)
    z·t_i >= ẑ·t̂_i - b_i,  so the k-th largest of these is at most the k-th best score, L;
    an item with ẑ·t̂_i + b_i < L is not among the best k.

The scan (serving/graphs.py) returns the others, some dozens of a million, and their scores are computed in float32.
ẑ has two parts of 63 steps a side, of which the second holds the rounding error of the first, so |z - ẑ| is small.
Rows that were added or changed since the export have no int8 row: their scores are always computed.

N items, m the size, B users.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from common.errors import InputError
from serving.engines import Table, best_columns
from serving.folder import HINT, INDEX, SCAN
from serving.quantize import STEPS, dequantize, quantize

ROUNDING = 4e-6  # of the float32 operations, relative to |z| |t|


def build_index(table: np.ndarray) -> bytes:
    """Return the bytes of index.safetensors for a table [N+1, m] float32: codes [m, N+1], scale and bound [N+1]."""
    codes, scale = quantize(table, axis=1)
    bound = np.empty(len(table), dtype=np.float32)
    for start in range(0, len(table), 1 << 16):
        part = slice(start, start + (1 << 16))
        error = table[part].astype(np.float64) - dequantize(codes[part], scale[part], axis=1)
        bound[part] = np.linalg.norm(error, axis=1) * (1 + 1e-6)  # rounded up
    return save({"codes": np.ascontiguousarray(codes.T), "scale": scale, "bound": bound})


class Int8Index:
    """The int8 rows of an export's table, and the scan over them."""

    def __init__(self, folder: Path, shape: tuple[int, ...], threads: int) -> None:
        """shape: of the table, [N+1, m]. Raises InputError if the index is of another table."""
        import onnxruntime

        path = folder / INDEX
        parts = load(path.read_bytes())
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
            # Not by @, which may sum equal rows in another order.
            exact = np.einsum("nm,m->n", table.vectors(among), user) + own[among]
            best = best_columns(exact[None], k)[0]
            scores[row, : len(best)], items[row, : len(best)] = exact[best], among[best]
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
