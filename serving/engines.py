"""Engines run an export's model on NumPy arrays; they know neither users nor item ids.

    recommend(history [B, L], table, bias, k)      -> scores [B, k], items [B, k]
    step(item [B], hidden [B, blocks, 2, m], table) -> z [B, m], hidden
    rank(z [B, m], table, bias, k)                 -> scores [B, k], items [B, k]

history: item numbers, oldest first, left-padded with 0; all zeros: an empty history. bias [1 or B, N+1]: 0 for
candidates, -inf for all other items and for row 0. B users, L steps, N items, m the size.

The engines agree up to rounding. With int8, onnxruntime multiplies integers and torch multiplies dequantized float32.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from common.errors import InputError
from serving.folder import GRAPHS, HINT, Export
from serving.quantize import quantize
from serving.weights import MATRICES

ENGINES = ("torch", "onnx")
ONNX_ROWS = 2  # the fewest rows of a product: one alone takes other routines, which round differently


class Table:
    """The item table in memory: float32 [N+1, m], or int8 [m, N+1] with a scale per item.

    int8 is stored transposed because onnxruntime's integer product reads it fastest that way.
    """

    def __init__(self, table: np.ndarray, scale: np.ndarray | None) -> None:
        """table: [N+1, m], int8 with `scale` [N+1] or float32 without."""
        self.values = table if scale is None else np.ascontiguousarray(table.T)
        self.scale = scale

    def __len__(self) -> int:
        return self.values.shape[0 if self.scale is None else 1]

    def inputs(self) -> dict[str, np.ndarray]:
        """Return the table as inputs of the graphs (serving/graphs.py)."""
        return {"table": self.values} if self.scale is None else {"table": self.values, "table_scale": self.scale}

    def rows(self) -> np.ndarray:
        """Return [N+1, m], the layout of an export."""
        return self.values if self.scale is None else self.values.T

    def extended(self, embeddings: np.ndarray) -> Table:
        """Return a new table with the rows `embeddings` [n, m] float32 appended in the same storage."""
        if self.scale is None:
            return Table(np.concatenate([self.values, embeddings]), None)
        more, more_scale = quantize(embeddings, axis=1)
        return Table(np.concatenate([self.values.T, more]), np.concatenate([self.scale, more_scale]))


class Engine(Protocol):
    """What the Recommender calls; see the top of this file for the shapes."""

    def table(self, export: Export) -> Table: ...
    def recommend(
        self, history: np.ndarray, table: Table, bias: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def step(self, item: np.ndarray, hidden: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]: ...
    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


def open_engine(export: Export, name: str | None, threads: int) -> Engine:
    """Return the engine of this name; None: onnx if the export has graphs, else torch.

    threads: of onnxruntime, 0: one per core. torch uses the process's threads.
    Raises InputError if the engine is unknown, lacks a package, or the export has no valid graphs.
    """
    name = name or ("onnx" if export.has_graphs else "torch")
    if name not in ENGINES:
        raise InputError(f"engine {name!r} is unknown; use one of {', '.join(ENGINES)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise InputError(f"threads {threads!r} must be a whole number, 0 for one per core")
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
        self._rank = load(rank)
        options.add_external_initializers(names, weights)
        self._recommend, self._step = load(recommend), load(step)

    def table(self, export: Export) -> Table:
        return Table(export.table, export.scale)

    def recommend(self, history: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Histories run in lengths of their own, powers of two: the sum over a longer one rounds differently."""
        length = np.where(history > 0, np.arange(history.shape[1], 0, -1), 1).max(axis=1)
        steps = np.minimum(2 ** np.ceil(np.log2(length)).astype(np.int64), self._max_len)
        scores, items = np.empty((len(history), k), np.float32), np.empty((len(history), k), np.int64)
        for n in np.unique(steps):
            rows = np.flatnonzero(steps == n)
            read = np.pad(history[rows, -n:], ((0, 0), (max(0, n - history.shape[1]), 0)))
            own = bias if len(bias) == 1 else bias[rows]
            scores[rows], items[rows] = self._ranked(self._recommend, "history", read, table, own, k)
        return scores, items

    def step(self, item: np.ndarray, hidden: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
        return self._step.run(None, {"item": item, "hidden": hidden, **table.inputs()})

    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._ranked(self._rank, "z", z, table, bias, k)

    @staticmethod
    def _ranked(
        session: Any, name: str, rows: np.ndarray, table: Table, bias: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        bias = bias if len(bias) == 1 else filled_up(bias, ONNX_ROWS)
        inputs = {name: filled_up(rows, ONNX_ROWS), "bias": bias, "k": np.array([k], dtype=np.int64), **table.inputs()}
        scores, items = session.run(None, inputs)
        return scores[: len(rows)], items[: len(rows)]


def filled_up(rows: np.ndarray, fewest: int) -> np.ndarray:
    """Add rows of zeros until there are `fewest`."""
    missing = fewest - len(rows)
    return rows if missing <= 0 else np.concatenate([rows, np.zeros_like(rows, shape=(missing, *rows.shape[1:]))])
