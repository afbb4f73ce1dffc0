"""The torch engine: the model of model/fmrlrec.py itself, float32 on the CPU. It works in a clone only."""

from __future__ import annotations

import numpy as np
import torch

from model import FMRLRec
from serving.convert import model_from
from serving.engines import Table, filled_up
from serving.folder import Export
from serving.quantize import dequantize

CHUNK = 1 << 16  # items whose scores are held at once, per user
ROWS = 4  # the fewest rows of a product: fewer take other routines, which round differently, also between equal items


class TorchEngine:
    """An Engine (serving/engines.py) that runs FMRLRec. An int8 export is dequantized first."""

    def __init__(self, export: Export) -> None:
        self.model: FMRLRec = model_from(export.weights, tuple(export.config["sizes"]), export.config["num_blocks"])

    def table(self, export: Export) -> Table:
        if export.scale is None:
            return Table.of(export)
        return Table(dequantize(export.table, export.scale, axis=1), None)

    def recommend(self, history: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rank(self.vectors(history, table), table, bias, k)

    def vectors(self, history: np.ndarray, table: Table) -> np.ndarray:
        """Return z [B, m] of histories [B, L]."""
        users, history = len(history), filled_up(history, ROWS)
        live = history > 0
        live[:, -1] = True  # an empty history is token 0 alone
        lengths = live.sum(axis=1)
        position = (np.arange(history.shape[1]) - (history.shape[1] - lengths)[:, None])[live]
        x, last = table.wide.vectors(history[live]), np.cumsum(lengths) - 1
        with torch.inference_mode():
            z = self.model.encode(
                torch.from_numpy(x), torch.from_numpy(position), int(lengths.max()), torch.from_numpy(last)
            )
        return z.numpy()[:users]

    def step(self, item: np.ndarray, hidden: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            z, after = self.model.step(*map(torch.from_numpy, (table.wide.vectors(item), hidden)))
        return z.numpy(), after.numpy()

    def rank(self, z: np.ndarray, table: Table, bias: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rank exactly, in chunks of the catalogue, keeping the best k so far."""
        with torch.inference_mode():
            scores, items = torch.empty(len(z), 0), torch.empty(len(z), 0, dtype=torch.long)
            filled = torch.from_numpy(filled_up(z, ROWS))
            width = -(-len(table) // -(-len(table) // CHUNK))  # chunks of like width: none of a few columns
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
    """Return the columns of each row's k largest scores [B, min(k, columns)]; of equal scores the first comes first."""
    least = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    rows = []
    for row, low in zip(scores, least, strict=True):  # topk alone may take any of those equal to the k-th
        at = (row >= low).nonzero()[:, 0]
        rows.append(at[row[at].argsort(descending=True, stable=True)[:k]])
    return torch.stack(rows)
