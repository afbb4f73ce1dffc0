"""The torch side of serving: a model to the weights of an export and back, and the torch engine. For clones only."""

from __future__ import annotations

import numpy as np
import torch

from config import ModelSettings
from model import FMRLRec
from model.base import nested_mask
from model.baselines.counting import Popularity
from model.baselines.lrurec import LRURec
from model.baselines.sasrec import SASRec
from serving.engines import Table, filled_up
from serving.folder import Export
from serving.weights import MATRICES, VECTORS, dequantize, float_weight, quantize

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


# -------------------------------------------------------------------------------------------------------------- convert
# Convert a model to the weights of an export (serving/weights.py), and back. Needs torch.


def serving_weights(model: FMRLRec, quantized: bool) -> dict[str, np.ndarray]:
    """Return the weights of a (sliced) model in float32, or with the blocks' matrices in int8."""
    weights: dict[str, np.ndarray] = {}
    with torch.no_grad():
        mask = nested_mask(model.sizes).to(next(model.parameters()))
        for i, block in enumerate(model.each_block()):
            lru, ffn, gamma = block.lru, block.ffn, torch.exp(block.lru.gamma_log)
            zeros = torch.zeros_like(gamma)
            parts = {
                **{name: block.get_parameter(name) for name in VECTORS},
                "lru.B": torch.cat([(w * mask * gamma[:, None]).T for w in (lru.B_re, lru.B_im)], dim=1),
                "lru.B_bias": torch.cat([zeros if b is None else b * gamma for b in (lru.B_bias_re, lru.B_bias_im)]),
                "lru.C": torch.cat([(lru.C_re * mask).T, -(lru.C_im * mask).T]),
                "lru.C_bias": zeros if lru.C_bias is None else lru.C_bias,
                "ffn.expand": torch.cat([(linear.weight * mask).T for linear in (ffn.G, ffn.W1)], dim=1),
                "ffn.expand_bias": torch.cat(
                    [zeros if linear.bias is None else linear.bias for linear in (ffn.G, ffn.W1)]
                ),
                "ffn.reduce": (ffn.W2.weight * mask).T,
                "ffn.reduce_bias": zeros if ffn.W2.bias is None else ffn.W2.bias,
            }
            weights |= {f"blocks.{i}.{name}": _numpy(value) for name, value in parts.items()}
        if model.norm is not None:
            weights |= {f"norm.{name}": _numpy(value) for name, value in model.norm.named_parameters()}
        if model.items.parts:
            scale = model.items.new_item_scale()  # serving projects new items only
            weights["projection.weight"] = _numpy(scale * model.items.projection.weight.T)
            weights["projection.bias"] = _numpy(scale * model.items.projection.bias)
        for i, (mean, matrix) in enumerate(model.items.whitening.transforms() if model.items.whitening else ()):
            weights |= {f"whitening.{i}.mean": _numpy(mean), f"whitening.{i}.matrix": _numpy(matrix)}
    if quantized:
        for name in [f"blocks.{i}.{matrix}" for i in range(len(model.blocks)) for matrix in MATRICES]:
            weights[name], weights[f"{name}.scale"] = quantize(weights[name], axis=0)
    return weights


def baseline_weights(model: LRURec | SASRec | Popularity) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return (item table, weights) of a baseline, as serving/engines.py reads them."""
    with torch.no_grad():
        if isinstance(model, Popularity):
            numbers = np.arange(model.num_items + 1, dtype=np.float32)
            popularity = _numpy(model.scores(torch.zeros(1, dtype=torch.long))[0])  # of an empty history
            weights: dict[str, np.ndarray] = {
                "begins": np.zeros(model.num_items + 2, np.int64),
                "neighbours": np.zeros(0, np.int64),
                "alike": np.zeros(0, np.float32),
            }
            weights |= {name: value.numpy() for name, value in model.state_dict().items() if name != "counts"}
            return np.stack([numbers, popularity], axis=1), weights
        weights = {name: _numpy(w) for name, w in model.state_dict().items() if not name.startswith("items.")}
        m = model.sizes[-1]
        for i in range(len(model.blocks)) if isinstance(model, LRURec) else ():
            widths = {"B_bias_re": 2 * m, "B_bias_im": 2 * m, "C_bias": m}  # zeros if trained without biases
            weights |= {
                f"blocks.{i}.lru.{name}": weights.get(f"blocks.{i}.lru.{name}", np.zeros(n, np.float32))
                for name, n in widths.items()
            }
        return _numpy(model.item_table()), weights


def model_from(weights: dict[str, np.ndarray], sizes: tuple[int, ...], num_blocks: int) -> FMRLRec:
    """Return the FMRLRec with these weights. It has no items: `encode` and `step` are given rows of the item table."""
    m = sizes[-1]
    with torch.random.fork_rng(devices=[]):  # keep the caller's random state
        model = FMRLRec(
            0,
            None,
            ModelSettings(mrl_hidden_sizes=tuple(sizes), lru_num_blocks=num_blocks, post_norm="norm.weight" in weights),
        )

    def weight(i: int, name: str) -> torch.Tensor:
        return torch.from_numpy(float_weight(weights, f"blocks.{i}.{name}"))

    with torch.no_grad():
        if model.norm is not None:
            model.norm.load_state_dict({name: torch.from_numpy(weights[f"norm.{name}"]) for name in ("weight", "bias")})
        for i, block in enumerate(model.blocks):
            B, B_bias, C = weight(i, "lru.B").T, weight(i, "lru.B_bias"), weight(i, "lru.C").T
            expand, expand_bias = weight(i, "ffn.expand").T, weight(i, "ffn.expand_bias")
            block.load_state_dict(
                {
                    **{name: weight(i, name) for name in VECTORS},
                    "lru.gamma_log": torch.zeros(m),  # γ is in B
                    "lru.B_re": B[:m],
                    "lru.B_im": B[m:],
                    "lru.B_bias_re": B_bias[:m],
                    "lru.B_bias_im": B_bias[m:],
                    "lru.C_re": C[:, :m],
                    "lru.C_im": -C[:, m:],
                    "lru.C_bias": weight(i, "lru.C_bias"),
                    "ffn.G.weight": expand[:m],
                    "ffn.G.bias": expand_bias[:m],
                    "ffn.W1.weight": expand[m:],
                    "ffn.W1.bias": expand_bias[m:],
                    "ffn.W2.weight": weight(i, "ffn.reduce").T,
                    "ffn.W2.bias": weight(i, "ffn.reduce_bias"),
                }
            )
    return model.eval()


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())
