"""Quantization: float16, or int8 with one float32 scale per output or item (w ≈ q · scale)."""

import numpy as np

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
