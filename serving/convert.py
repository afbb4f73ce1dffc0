"""Convert a model to the weights of an export (serving/weights.py), and back. Needs torch."""

from __future__ import annotations

import numpy as np
import torch

from config import ModelSettings
from model import FMRLRec
from model.baselines.counting import Popularity
from model.baselines.lrurec import LRURec
from model.baselines.sasrec import SASRec
from model.sizes import nested_mask
from serving.quantize import quantize
from serving.weights import MATRICES, VECTORS, float_weight


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
    """Return (item table, weights) of a baseline, as serving/baselines.py reads them."""
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
