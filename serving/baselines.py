"""The baselines of an export, in NumPy: a shop can compare them with fMRLRec in the same Recommender.

lrurec and sasrec compute what model/baselines/ says. sasrec needs the whole history, so it has no states. popularity
and itemknn have the item table [N+1, 2]: an item's number, and its score by popularity. So the rows of some items alone
still say which items they are. z is the row of the history's last item.

B users, L steps, N items, m the size, S = 2m states of the LRU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.engines import Table, best_columns, filled_up
from serving.folder import Export
from serving.states import decays_of
from serving.weights import COUNTING, Weights

ROWS = 4  # the fewest rows of a product: fewer take other routines, which round differently


class BaselineEngine:
    """An Engine (serving/engines.py) for one of BASELINES."""

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
        x, after = self._norm(table.values[filled_up(item, ROWS)], "norm"), []
        before = filled_up(hidden, ROWS).reshape(len(x), self._config["num_blocks"], 2, 2, -1)  # halves, re and im
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
        history = filled_up(history, ROWS)
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
        return (filled_up(z, ROWS) @ table.values.T)[: len(z)]

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
