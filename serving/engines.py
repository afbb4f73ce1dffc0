"""What runs a served model: torch or onnxruntime; neither knows of users or item ids. Both compute the same, but for
exports in eight bits: onnxruntime multiplies in eight bits, torch in float32.

An engine's methods take and return numpy arrays. `Table` holds the catalogue as the engine reads it.

    recommend(history [B, L], table, bias, k)   -> scores [B, k], items [B, k]
    step(item [B], hidden [B, blocks, 2, m], table) -> z [B, m], hidden
    rank(z [B, m], table, bias, k)              -> scores [B, k], items [B, k]

history: item numbers, oldest first, zeros in front; zeros alone: empty. bias [1 or B, N+1]: 0 for candidates, -inf for
the rest. B users, L steps, N items, m the size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from common.errors import InputError
from serving.folder import GRAPHS, Export
from serving.quantize import dequantize, quantize
from serving.weights import MATRICES

if TYPE_CHECKING:
    import torch

ENGINES = ("torch", "onnx")
RANKED = 1 << 16  # items whose scores the torch engine holds at once, per user
# The fewest rows of a product: fewer take other routines, which round differently, also between equal items.
TORCH_ROWS, ONNX_ROWS = 4, 2


class Table:
    """The item table in memory: [N+1, m] float32, or [m, N+1] int8 with a scale per item, which is what an integer
    product reads fastest."""

    def __init__(self, table: np.ndarray, scale: np.ndarray | None) -> None:
        """table: [N+1, m], int8 with `scale` [N+1] or float32 without."""
        self.values = table if scale is None else np.ascontiguousarray(table.T)
        self.scale = scale

    def __len__(self) -> int:
        return self.values.shape[0 if self.scale is None else 1]

    def inputs(self) -> dict[str, np.ndarray]:
        """As the graphs of serving/graphs.py name them."""
        return {"table": self.values} if self.scale is None else {"table": self.values, "table_scale": self.scale}

    def rows(self) -> np.ndarray:
        """[N+1, m] as an export stores it."""
        return self.values if self.scale is None else self.values.T

    def extended(self, embeddings: np.ndarray) -> Table:
        """This table and then `embeddings` [n, m] float32, stored as the others are."""
        if self.scale is None:
            return Table(np.concatenate([self.values, embeddings]), None)
        more, more_scale = quantize(embeddings, axis=1)
        return Table(np.concatenate([self.values.T, more]), np.concatenate([self.scale, more_scale]))


class Engine(Protocol):
    """What the Recommender asks of an engine."""

    def table(self, export: Export) -> Table: ...
    def recommend(
        self, history: np.ndarray, table: Table, bias: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def step(self, item: np.ndarray, hidden: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]: ...
    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


def open_engine(export: Export, name: str | None, threads: int) -> Engine:
    """The engine of this name; None: onnxruntime where the export has graphs, else torch. threads: of onnxruntime, 0
    for one a core; torch's are the process's. Raises InputError where the engine cannot be had."""
    name = name or ("onnx" if export.has_graphs else "torch")
    if name not in ENGINES:
        raise InputError(f"engine {name!r} is unknown; take one of {', '.join(ENGINES)}")
    if name == "onnx" and not export.has_graphs:
        raise InputError(f"{export.folder} has no ONNX graphs; export it with --format onnx, or take the torch engine")
    package = {"torch": "torch", "onnx": "onnxruntime"}[name]
    try:
        return TorchEngine(export) if name == "torch" else OnnxEngine(export, threads)
    except ImportError as error:
        raise InputError(f"the {name} engine needs {package}: pip install {package}") from error


class OnnxEngine:
    """onnxruntime on the CPU."""

    def __init__(self, export: Export, threads: int) -> None:
        import onnxruntime

        # The weights that were read and checked, not the file as it may be by now; both graphs share them.
        names = [name for name in export.weights if any(f".{matrix}" in name for matrix in MATRICES)]
        weights = [onnxruntime.OrtValue.ortvalue_from_numpy(export.weights[name]) for name in names]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads

        def opened(graph: str) -> onnxruntime.InferenceSession:
            path = str(export.folder / graph)
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        # All at once: a folder that is replaced later must not lend its graphs to this table.
        recommend, step, rank = GRAPHS
        self._max_len: int = export.config["max_len"]
        self._rank = opened(rank)
        options.add_external_initializers(names, weights)
        self._recommend, self._step = opened(recommend), opened(step)

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
        bias = bias if len(bias) == 1 else _filled_up(bias, ONNX_ROWS)
        inputs = {name: _filled_up(rows, ONNX_ROWS), "bias": bias, "k": np.array([k], dtype=np.int64), **table.inputs()}
        scores, items = session.run(None, inputs)
        return scores[: len(rows)], items[: len(rows)]


def _filled_up(rows: np.ndarray, fewest: int) -> np.ndarray:
    """Add rows of zeros until there are `fewest`."""
    missing = fewest - len(rows)
    return rows if missing <= 0 else np.concatenate([rows, np.zeros_like(rows, shape=(missing, *rows.shape[1:]))])


class TorchEngine:
    """The model of model/fmrlrec.py itself, in float32 on the CPU."""

    def __init__(self, export: Export) -> None:
        from serving.weights import model_from

        self.model = model_from(export.weights, tuple(export.config["sizes"]), export.config["num_blocks"])

    def table(self, export: Export) -> Table:
        """In float32, also of an export in eight bits."""
        return Table(export.table if export.scale is None else dequantize(export.table, export.scale, axis=1), None)

    def recommend(self, history: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        users, history = len(history), _filled_up(history, TORCH_ROWS)
        live = history > 0
        live[:, -1] = True  # an empty history is token 0 alone
        lengths = live.sum(axis=1)
        position = (np.arange(history.shape[1]) - (history.shape[1] - lengths)[:, None])[live]
        x, last = table.values[history[live]], np.cumsum(lengths) - 1
        with torch.inference_mode():
            z = self.model.encode(
                torch.from_numpy(x), torch.from_numpy(position), int(lengths.max()), torch.from_numpy(last)
            )
        return self.rank(z.numpy()[:users], table, bias, k)

    def step(self, item: np.ndarray, hidden: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            z, after = self.model.step(*map(torch.from_numpy, (table.values[item], hidden)))
        return z.numpy(), after.numpy()

    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact, by chunks of the catalogue, of which the best k are carried on."""
        import torch

        with torch.inference_mode():
            scores, items = torch.empty(len(z), 0), torch.empty(len(z), 0, dtype=torch.long)
            filled = torch.from_numpy(_filled_up(z, TORCH_ROWS))
            width = -(-len(table) // -(-len(table) // RANKED))  # chunks of like width: none of a few columns
            for start in range(0, len(table), width):
                part = slice(start, start + width)
                product = (filled @ torch.from_numpy(table.values[part]).T)[: len(z)]
                chunk = product + torch.from_numpy(bias[:, part])
                best = _best(chunk, k)
                scores = torch.cat([scores, chunk.gather(1, best)], dim=1)
                items = torch.cat([items, best + start], dim=1)
                best = _best(scores, k)
                scores, items = scores.gather(1, best), items.gather(1, best)
        return scores.numpy(), items.numpy()


def _best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k largest of each row are, [B, min(k, columns)], largest first, the first of equal ones first."""
    import torch

    least = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    rows = []
    for row, low in zip(scores, least, strict=True):  # topk alone would take any of those that equal the k-th
        at = (row >= low).nonzero()[:, 0]
        rows.append(at[row[at].argsort(descending=True, stable=True)[:k]])
    return torch.stack(rows)
