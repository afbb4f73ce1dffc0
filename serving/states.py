"""A user's state: all that a recommender keeps of a user. B users, L steps, m the size."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from common.errors import InputError
from serving.engines import Engine, Table
from serving.weights import Weights

ROWS = 2048  # steps that an engine computes at once
HEADER = struct.Struct("<4sBBHHI")  # magic, version, blocks, size, bytes of the model's name, items
MAGIC, VERSION = b"fMRL", 1


@dataclass(frozen=True, eq=False)
class State:
    """The recurrence's state after a user's whole history. Immutable: `Recommender.step` returns a new one.

    Keep it in a key-value store as `to_bytes()`; about 1.5 kB at size 64 with two blocks and 40 items.
    """

    hidden: np.ndarray  # [blocks, 2, m]: real and imaginary part of each block's state
    z: np.ndarray  # [m]: the sequence representation
    items: tuple[int, ...]  # item numbers so far
    model: str  # the model that made it, as Recommender.model

    def to_bytes(self) -> bytes:
        """Return the state as bytes: little-endian numbers and a checksum, nothing pickled."""
        blocks, _, size = self.hidden.shape
        name = self.model.encode()
        body = [
            HEADER.pack(MAGIC, VERSION, blocks, size, len(name), len(self.items)),
            name,
            self.hidden.astype("<f4").tobytes(),
            self.z.astype("<f4").tobytes(),
            np.array(self.items, dtype="<u4").tobytes(),
        ]
        content = b"".join(body)
        return content + struct.pack("<I", zlib.crc32(content))

    @classmethod
    def from_bytes(cls, content: bytes) -> State:
        """Return the state that `to_bytes` wrote. Raises InputError if the bytes are damaged or no state."""
        try:
            magic, version, blocks, size, name, items = HEADER.unpack_from(content)
        except (struct.error, TypeError):
            magic = version = None
        if magic != MAGIC or version != VERSION:
            raise InputError(f"these bytes are not a state of version {VERSION}; encode the history again: start()")
        ends = np.cumsum([HEADER.size, name, blocks * 2 * size * 4, size * 4, items * 4]).tolist()
        if len(content) != ends[-1] + 4 or content[ends[-1] :] != struct.pack("<I", zlib.crc32(content[: ends[-1]])):
            raise InputError("the bytes of the state are damaged; encode the history again: start()")
        model, *arrays, numbers = (content[start:end] for start, end in pairwise(ends))
        hidden, z = (np.frombuffer(part, dtype="<f4").astype(np.float32) for part in arrays)
        return cls(
            hidden.reshape(blocks, 2, size),
            z,
            tuple(np.frombuffer(numbers, dtype="<u4").tolist()),
            model.decode("utf-8", "replace"),
        )


def encode(engine: Engine, table: Table, eigenvalues: np.ndarray, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (z [B, m], hidden [B, blocks, 2, m]) after histories [B, L], left-padded with 0.

    eigenvalues: λ [blocks, m]. Each block's recurrence h_t = u_t + λ h_{t-1} runs here. The engine computes the inputs
    u_t of all steps at once: it steps from states whose earlier blocks are known and whose block i is zero. So it takes
    blocks + 1 calls for up to 2048 steps.
    """
    users, blocks = len(history), len(eigenvalues)
    hidden = np.zeros((users, blocks, 2, eigenvalues.shape[1]), dtype=np.float32)
    z = np.zeros((users, eigenvalues.shape[1]), dtype=np.float32)
    at_once = max(1, ROWS // max(1, users))
    for start in range(0, history.shape[1], at_once):
        items = history[:, start : start + at_once]
        before = np.zeros((*items.shape, *hidden.shape[1:]), dtype=np.float32)
        before[:, 0] = hidden
        for i, decay in enumerate(eigenvalues):
            _, after = engine.step(items.ravel(), before.reshape(-1, *hidden.shape[1:]), table)
            u = after[:, i].reshape(*items.shape, *hidden.shape[2:])
            h = u[:, :, 0] + 1j * u[:, :, 1]
            h[items == 0] = 0  # padding, or the empty history's token
            for t in range(1, items.shape[1]):
                h[:, t] += decay * h[:, t - 1] * (items[:, t] > 0)[:, None]
            before[:, 1:, i, 0], before[:, 1:, i, 1] = h.real[:, :-1], h.imag[:, :-1]
        z, hidden = engine.step(items[:, -1], before[:, -1], table)
        hidden = hidden * (items[:, -1] > 0)[:, None, None, None]
    return z, hidden


def state_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the shape of State.hidden. The 2m states of lrurec's blocks take two rows each."""
    return config["num_blocks"] * (2 if config.get("model") == "lrurec" else 1), 2, config["size"]


def decays_of(weights: Weights, config: Mapping[str, Any]) -> np.ndarray:
    """Return λ = exp(-exp(ν) + i exp(θ)) of each row of a state [rows, m], complex64; 0 for models without an LRU."""
    shape = state_shape(config)[::2]
    if config.get("model", "lrurec") != "lrurec":
        return np.zeros(shape, dtype=np.complex64)
    nu, theta = (
        np.exp(np.stack([weights[f"blocks.{i}.lru.{part}"] for i in range(config["num_blocks"])]).astype(np.float64))
        for part in ("nu_log", "theta_log")
    )
    return np.exp(-nu + 1j * theta).astype(np.complex64).reshape(shape)
