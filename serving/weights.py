"""A model's weights as they are served, and back: no masks, no complex numbers, nothing to compute before the first
multiplication. m: the size, F: feature width. Matrices are [inputs, outputs], so that a layer is x W + b.

    norm.weight, .bias                  [m]       of what is read, with post-norm (of a block, norm1 and norm2 then are)
    blocks.i.norm1.weight, .bias        [m]       as in model/fmrl.py
    blocks.i.lru.nu_log, .theta_log     [m]       λ = exp(-exp(ν) + i exp(θ))
    blocks.i.lru.B, .B_bias             [m, 2m]   real and imaginary part of γ (B x + b), side by side
    blocks.i.lru.C, .C_bias             [2m, m]   Re(C h + c) of h_re and h_im, side by side
    blocks.i.norm2.weight, .bias        [m]
    blocks.i.ffn.expand, .expand_bias   [m, 2m]   G and W1 side by side
    blocks.i.ffn.reduce, .reduce_bias   [m, m]    W2
    projection.weight, .bias            [F, m]    features -> a new item; absent where the table was learned outright
    whitening.i.mean, .matrix           [F_i], [F_i, F_i]   of each encoder's features before that, where they are
                                                  whitened (model/extensions/whitening.py)

In eight bits, a block's matrix is int8 and `<name>.scale` has one scale per output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from serving.quantize import dequantize, quantize

if TYPE_CHECKING:
    import torch

    from model import FMRLRec

MATRICES = ("lru.B", "lru.C", "ffn.expand", "ffn.reduce")
VECTORS = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "lru.nu_log", "lru.theta_log")  # as trained


def serving_weights(model: FMRLRec, quantized: bool) -> dict[str, np.ndarray]:
    """The weights of a (sliced) model in the form above, float32 or with its blocks' matrices in eight bits."""
    import torch

    from model.sizes import nested_mask

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
                "ffn.expand_bias": torch.cat([ffn.G.bias, ffn.W1.bias]),
                "ffn.reduce": (ffn.W2.weight * mask).T,
                "ffn.reduce_bias": ffn.W2.bias,
            }
            weights |= {f"blocks.{i}.{name}": _numpy(value) for name, value in parts.items()}
        if model.norm is not None:
            weights |= {f"norm.{name}": _numpy(value) for name, value in model.norm.named_parameters()}
        if model.items.parts:
            scale = model.items.new_item_scale()  # no other items are projected where it is served
            weights["projection.weight"] = _numpy(scale * model.items.projection.weight.T)
            weights["projection.bias"] = _numpy(scale * model.items.projection.bias)
        for i, (mean, matrix) in enumerate(model.items.whitening.transforms() if model.items.whitening else ()):
            weights |= {f"whitening.{i}.mean": _numpy(mean), f"whitening.{i}.matrix": _numpy(matrix)}
    if quantized:
        for name in [f"blocks.{i}.{matrix}" for i in range(len(model.blocks)) for matrix in MATRICES]:
            weights[name], weights[f"{name}.scale"] = quantize(weights[name], axis=0)
    return weights


def expected_shapes(
    size: int,
    num_blocks: int,
    feature_dim: int,
    quantized: bool,
    whitened: Sequence[int] = (),
    post_norm: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight. feature_dim: 0 where the table was learned outright; whitened: the widths of the
    features that are whitened."""
    m = size
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (m,), "norm.bias": (m,)} if post_norm else {}
    for i in range(num_blocks):
        matrices = {"lru.B": (m, 2 * m), "lru.C": (2 * m, m), "ffn.expand": (m, 2 * m), "ffn.reduce": (m, m)}
        block: dict[str, tuple[int, ...]] = dict.fromkeys(VECTORS, (m,))
        for name, shape in matrices.items():
            block |= {name: shape, f"{name}_bias": shape[1:]}
            if quantized:
                block[f"{name}.scale"] = shape[1:]
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    if feature_dim:
        shapes |= {"projection.weight": (feature_dim, m), "projection.bias": (m,)}
    for i, width in enumerate(whitened):
        shapes |= {f"whitening.{i}.mean": (width,), f"whitening.{i}.matrix": (width, width)}
    return shapes


def whitened(features: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Features [n, F] as the projection reads them; the twin of model/extensions/whitening.py without torch."""
    parts: list[np.ndarray] = []
    start = 0
    while f"whitening.{len(parts)}.mean" in weights:
        mean, matrix = (weights[f"whitening.{len(parts)}.{name}"] for name in ("mean", "matrix"))
        rows = features[:, start : start + len(mean)]
        y = (rows - mean) @ matrix * rows.any(axis=1, keepdims=True)
        parts.append(y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), np.finfo(np.float32).tiny))
        start += len(mean)
    return np.concatenate(parts, axis=1) if parts else features


def float_weight(weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A weight in float32, whatever it is stored as."""
    scale = weights.get(f"{name}.scale")
    return weights[name] if scale is None else dequantize(weights[name], scale, axis=0)


def model_from(weights: dict[str, np.ndarray], sizes: tuple[int, ...], num_blocks: int) -> FMRLRec:
    """The FMRLRec of these weights, without items: `encode` and `step` take the item table from outside."""
    import torch

    from config import ModelSettings
    from model import FMRLRec

    m = sizes[-1]
    with torch.random.fork_rng(devices=[]):  # its weights are replaced: no draws of the caller's are used up
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
