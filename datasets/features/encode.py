"""Frozen encoders, and inputs to features batch by batch, read ahead by worker processes.

B batch, F feature width, n inputs.
"""

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from common import processes
from common.errors import InputError

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


# --------------------------------------------------------------------------------------------------------------- encode
# Inputs to features, batch by batch, read ahead by worker processes. B batch, F feature width, n inputs.

BATCHES_A_WORKER = 32  # a worker takes about six seconds to start, so it is not started for fewer
AHEAD = 2  # batches that a worker has ready; bounds memory for any number of pictures


def in_order(count: int, batch_size: int) -> list[np.ndarray]:
    """Return the rows of each batch, in order."""
    return np.split(np.arange(count), range(batch_size, count, batch_size))


def longest_first(texts: Sequence[Any], batch_size: int) -> list[np.ndarray]:
    """Return the rows of each batch of tokenized texts, longest first, so that little padding is read."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    return np.split(order, range(batch_size, len(texts), batch_size))


def encode_batches(
    encoder: Encoder, read: Callable, batches: Iterable[list[Any]], *, workers: int = 0
) -> Iterator[np.ndarray]:
    """Yield features [B, F] float32 of each batch, in order; zeros for inputs that cannot be read.

    read: of a modality. workers: processes that read ahead of the encoder; 0 reads in this process. The bits do not
    depend on it. Raises InputError if features are not finite or a worker was killed.
    """
    for size, kept, prepared in _ahead(partial(read, encoder.prepare), batches, workers, encoder.on_gpu):
        features = np.zeros((size, encoder.dim), dtype=np.float32)
        if kept:
            features[kept] = encoder.forward(prepared)
        if not np.isfinite(features).all():
            raise InputError(
                f"the encoder {encoder.fingerprint} gave features that are not finite; its weights are damaged, or "
                f"need --encoder_precision fp32"
            )
        yield features


def encode_all(encoder: Encoder, read: Callable, items: Sequence[Any], rows: list[np.ndarray]) -> np.ndarray:
    """Return features [n, F] of all items, encoded in batches of these rows."""
    features = np.zeros((len(items), encoder.dim), dtype=np.float32)
    batches = ([items[row] for row in batch] for batch in rows)
    for batch, encoded in zip(rows, encode_batches(encoder, read, progress(batches, len(rows))), strict=True):
        features[batch] = encoded
    return features


def progress(batches: Iterable[Any], count: int) -> Iterable[Any]:
    """Yield the batches, with a progress bar on rank 0."""
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, "encoding", count, unit="batch", disable=True if processes.rank() else None)


def num_workers(workers: int, batches: int) -> int:
    """Return the number of workers worth starting, at most `workers`, for this rank's batches and cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(workers, cores // processes.local_world_size() - 1, batches // BATCHES_A_WORKER))


def _ahead(read: Callable, batches: Iterable[list[Any]], workers: int, pin_memory: bool) -> Iterator[Any]:
    """Yield `read(batch)` for each batch."""
    if not workers:
        yield from map(read, batches)
        return
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Itself(),  # type: ignore[arg-type]  # DataLoader takes anything with __getitem__
        sampler=batches,
        batch_size=None,
        collate_fn=read,
        num_workers=workers,
        prefetch_factor=AHEAD,
        multiprocessing_context="spawn",  # a fork of a process that has computed with threads may hang
        pin_memory=pin_memory,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # an error in `read` names the worker further on
            raise
        raise InputError(
            f"a process that reads ahead of the encoder was killed ({str(error).splitlines()[0]}), probably because "
            f"memory ran out; give fewer --encoder_workers (0 for none) or a smaller --encoder_batch_size. Finished "
            f"batches are kept"
        ) from error


class _Itself:
    """The data set that DataLoader asks for: the sampler yields whole batches, so no worker holds all items."""

    def __getitem__(self, batch: list[Any]) -> list[Any]:
        return batch
