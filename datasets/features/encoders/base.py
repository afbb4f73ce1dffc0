"""What all encoders are and share. F: feature width, B: batch."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np


class Encoder:
    """What datasets/features/load.py asks of an encoder. The two without weights do all in `prepare`."""

    dim: int
    fingerprint: dict[str, Any]
    prepare: Callable[[Iterable[Any]], Any]
    slow_to_prepare = True  # beside `forward`: long enough for processes of its own to pay
    on_gpu = False

    def forward(self, prepared: Any) -> np.ndarray:
        """What `prepare` made of a batch -> [B, F] float32, rows of length 1."""
        return prepared

    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        """Texts or pictures -> [B, F] float32, rows of length 1."""
        return self.forward(self.prepare(self.tokenize(batch)))

    def tokenize(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Texts as `prepare` takes them, each as long as there is to read; pictures as they are."""
        return batch


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, zero rows left alone: [B, F] -> [B, F] float32."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of torch, by --encoder_precision


def best_precision(device: Any) -> str:
    """The fastest that the device computes in: bf16, fp16 on a GPU without it, fp32 on a CPU without it."""
    import torch

    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def offline_without_network() -> None:
    """Let the hub's client use its local cache at once where the hub's name does not even resolve; it would ask again
    for most of a minute, for every file."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # the proxy resolves it
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def digest(paths: list[Path]) -> str:
    """SHA-256 of the files' contents."""
    return _digest_once(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()))


@lru_cache
def _digest_once(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
