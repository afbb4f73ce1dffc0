"""Inputs to features, batch by batch, read ahead by worker processes. B batch, F feature width, n inputs."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from common import processes
from common.errors import InputError
from datasets.features.encoder import Encoder

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
