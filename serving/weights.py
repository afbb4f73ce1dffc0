"""The weights of an export: names and shapes, quantization, the cut to a narrower item table. NumPy only.

Weights are real, masked and ready to multiply. Matrices are [inputs, outputs], so a layer is x W + b.
serving/torch_engine.py makes them from a model. m: the size, F: feature width.

    norm.weight, .bias                  [m]       input norm; with post-norm only
    blocks.i.norm1.weight, .bias        [m]       as in model/fmrl.py
    blocks.i.lru.nu_log, .theta_log     [m]       λ = exp(-exp(ν) + i exp(θ))
    blocks.i.lru.B, .B_bias             [m, 2m]   γ (B x + b): real and imaginary part side by side
    blocks.i.lru.C, .C_bias             [2m, m]   Re(C h + c) from h_re and h_im side by side
    blocks.i.norm2.weight, .bias        [m]
    blocks.i.ffn.expand, .expand_bias   [m, 2m]   G and W1 side by side
    blocks.i.ffn.reduce, .reduce_bias   [m, m]    W2
    projection.weight, .bias            [F, m]    features -> new item; absent if the model has no features
    cut.users, .items                   [m, w]    z and item -> vectors of width w; with --table_width w only
    whitening.i.mean, .matrix           [F_i], [F_i, F_i]   encoder i's whitening (model/extensions/item_table.py),
                                                  applied before the projection; absent without whitening

With int8, each matrix of a block is int8 and `<name>.scale` holds one scale per output.

A baseline's weights have the names of the model's (model/baselines/), without the item table. popularity and itemknn
have each item's neighbours: `begins` [N+2], `neighbours` and `alike`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MATRICES = ("lru.B", "lru.C", "ffn.expand", "ffn.reduce")
COUNTING = ("popularity", "itemknn")
BASELINES = ("lrurec", "sasrec", *COUNTING)
Weights = Mapping[str, np.ndarray]
VECTORS = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "lru.nu_log", "lru.theta_log")  # as trained


def expected_shapes(
    size: int,
    num_blocks: int,
    feature_dim: int,
    quantized: bool,
    whitened: Sequence[int] = (),
    post_norm: bool = False,
    table_width: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every weight.

    feature_dim: 0 for a model without features. whitened: the width of each encoder's whitened features.
    """
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
    if table_width:
        shapes |= dict.fromkeys(("cut.users", "cut.items"), (m, table_width))
    for i, width in enumerate(whitened):
        shapes |= {f"whitening.{i}.mean": (width,), f"whitening.{i}.matrix": (width, width)}
    return shapes


def baseline_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Return name -> shape of every weight of a baseline's export; None: any length."""
    m, name = config["size"], config["model"]
    if name in COUNTING:
        return {"begins": (config["num_items"] + 2,), "neighbours": (None,), "alike": (None,)}
    shapes: dict[str, tuple[int | None, ...]] = {"norm.weight": (m,), "norm.bias": (m,)}
    layers: dict[str, tuple[int | None, ...]] = {f"norm{n}.{part}": (m,) for n in (1, 2) for part in ("weight", "bias")}
    inner = m if name == "sasrec" else 4 * m
    if name == "sasrec":
        shapes["positions"] = (config["max_len"], m)
        layers |= {f"attention.W_{part}.weight": (m, m) for part in "QKV"}
    else:
        layers |= {f"lru.{part}": (2 * m,) for part in ("nu_log", "theta_log", "gamma_log", "B_bias_re", "B_bias_im")}
        layers |= {f"lru.{part}": (2 * m, m) for part in ("B_re", "B_im")}
        layers |= {f"lru.{part}": (m, 2 * m) for part in ("C_re", "C_im")} | {"lru.C_bias": (m,)}
    layers |= {"W1.weight": (inner, m), "W1.bias": (inner,), "W2.weight": (m, inner), "W2.bias": (m,)}
    return shapes | {f"blocks.{i}.{each}": layers[each] for i in range(config["num_blocks"]) for each in layers}


def whitened(features: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Return features [n, F] as the projection reads them; NumPy twin of model/extensions/item_table.py."""
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
    """Return a weight in float32, dequantized if it is int8."""
    scale = weights.get(f"{name}.scale")
    return weights[name] if scale is None else dequantize(weights[name], scale, axis=0)


# ------------------------------------------------------------------------------------------------------------- quantize
# float16, or int8 with one float32 scale per output or item (w ≈ q · scale).

TABLES = ("none", "float16", "int8")  # storage of the item table; int8 also quantizes the blocks' matrices

# Activations are quantized to 2 * 63 + 1 values. With 255, processors without VNNI would overflow: they add two
# products in 16 bits.
STEPS = 63


def quantize(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (q int8, scale float32) with values ≈ q * scale and |q| <= 127.

    axis: the axis that shares one scale; `scale` lacks it.
    """
    scale = np.abs(values).max(axis=axis, keepdims=True).astype(np.float32) / 127
    scale[scale < np.finfo(np.float32).tiny] = 1  # zeros, or subnormal: too small to divide by
    return np.rint(values / scale).astype(np.int8), scale.squeeze(axis)


def dequantize(q: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """Return q * scale in float32, the inverse of `quantize` up to rounding."""
    return q.astype(np.float32) * np.expand_dims(scale, axis)


def rounded(rows: np.ndarray, stored_as: str) -> np.ndarray:
    """Return item table rows in float32 after a round trip through `stored_as`, one of TABLES."""
    if stored_as == "float16":
        return rows.astype(np.float16).astype(np.float32)
    return dequantize(*quantize(rows, axis=1), axis=1) if stored_as == "int8" else rows


# ----------------------------------------------------------------------------------------------------------- two widths
# The encoder has one size; the item table is cut to a smaller width, without training.
#
# The cut is a PCA weighted by the users' vectors. The scores Z T^T of users Z [U, D] and items T [N, D] are
# Z C^(-1/2) · C^(1/2) T^T with C = Z^T Z. By the SVD C^(1/2) T^T = Q S V^T, the rank-w matrix nearest to all scores of
# these users is Z C^(-1/2) Q[:, :w] · (T C^(1/2) Q[:, :w])^T (Eckart and Young). The encoder stays whole; w numbers per
# user and item are left.

RIDGE = 1e-9  # added to C, relative to its mean eigenvalue, so that it can be inverted


def user_weighted_pca(users: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (A, B), float64 [D, D]: users @ A[:, :w] and items @ B[:, :w] give the best scores of width w.

    users: z of some users [U, D]; items: the item table without token 0 [N, D]. With w = D the scores are the same.
    """
    z, table = users.astype(np.float64), items.astype(np.float64)
    covariance = z.T @ z / len(z)
    values, vectors = np.linalg.eigh(covariance + RIDGE * np.trace(covariance) / len(covariance) * np.eye(z.shape[1]))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    _, basis = np.linalg.eigh(root @ (table.T @ table) @ root)  # Q of the SVD, ascending
    basis = basis[:, ::-1]
    return inverse @ basis, root @ basis
