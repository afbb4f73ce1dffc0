"""Weights and item tables in fewer bits; in eight: w ≈ q · scale, one scale per output or item."""

import numpy as np

TABLES = ("none", "float16", "int8")  # how an export stores its item table; int8 its weights as well


def quantize(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(q int8, scale float32) with values ≈ q * scale and |q| <= 127; `axis` is reduced: it shares a scale."""
    scale = np.abs(values).max(axis=axis, keepdims=True).astype(np.float32) / 127
    scale[scale < np.finfo(np.float32).tiny] = 1  # zeros, or too small to be divided by
    return np.rint(values / scale).astype(np.int8), scale.squeeze(axis)


def dequantize(q: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """The float32 values that `quantize` stands for."""
    return q.astype(np.float32) * np.expand_dims(scale, axis)


def rounded(rows: np.ndarray, stored_as: str) -> np.ndarray:
    """Rows of an item table as they come back from an export that stores them so, one of TABLES."""
    if stored_as == "float16":
        return rows.astype(np.float16).astype(np.float32)
    return dequantize(*quantize(rows, axis=1), axis=1) if stored_as == "int8" else rows
