"""A frozen encoder: texts or pictures in, L2-normalised feature vectors out. B batch, F feature width."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # --encoder_precision -> torch dtype


class Encoder:
    """Base of all encoders: `encode` is `forward(prepare(tokenize(batch)))`.

    `prepare` holds no weights and can be pickled, so worker processes may call it. It reads its batch one by one, so
    only one picture is in memory decoded. Encoders without weights do everything in `prepare`.
    """

    dim: int  # F
    fingerprint: dict[str, Any]  # everything that features depend on besides the input
    prepare: Callable[[Iterable[Any]], Any]
    slow_to_prepare = True  # `prepare` takes long compared with `forward`, so worker processes pay
    on_gpu = False
    note = ""  # how it reads its inputs, said when it encodes

    def forward(self, prepared: Any) -> np.ndarray:
        """Return [B, F] float32, rows of length 1, for a batch from `prepare`."""
        return prepared

    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        """Return [B, F] float32, rows of length 1, for texts or pictures."""
        return self.forward(self.prepare(self.tokenize(batch)))

    def tokenize(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Return the inputs as `prepare` takes them: texts as tokens, pictures unchanged."""
        return batch


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Scale rows [B, F] to length 1, in float32; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def best_precision(device: Any) -> str:
    """Return the fastest precision of a device: bf16; without it fp16 on a GPU, fp32 on a CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def offline_without_network() -> None:
    """Make the hub's client use its local cache if the hub's name does not resolve.

    Otherwise the client retries for most of a minute, for every file.
    """
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # the proxy resolves it
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def digest(paths: list[Path]) -> str:
    """Return the SHA-256 of the files' names, sizes and contents."""
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
