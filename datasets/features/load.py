"""Features of a catalogue's items, computed once and cached. N items, F feature width.

The cache has one array per dataset and modality below <features_root>/<dataset>/, with a JSON file beside it
(cache.py). Both carry a key of everything that the features depend on: the encoder, its weights and precision, and the
ordered items with their inputs. A changed input changes the key. A damaged file fails its checksum and is made again.
Encoding continues after a kill, and under torchrun each rank encodes a share.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common import processes
from config import FeatureSettings
from datasets.catalog import Catalog
from datasets.features import cache, encoder
from datasets.features.modality import Job, Modality, digest
from datasets.features.registry import modalities


def load_features(
    settings: FeatureSettings,
    catalog: Catalog,
    device: Any,
    trained_on: Collection[str] = (),
) -> list[np.memmap]:
    """Return features [N, F] of items 1..N for each modality: text, pictures, then files in the given order.

    Each array is mapped copy-on-write from its file, which is made first if it is missing: float16, or float32 if an
    earlier version made it. Under torchrun all ranks call this, and all return the same.

    trained_on: names of the files that a run was trained on; those are preferred. Raises InputError if an encoder or a
    file cannot be read, no item has an input, texts or files differ from those of `trained_on` (changed pictures are
    only reported, because their times count too), or the disk is full.
    """
    processes.start()
    job = Job(settings, catalog, device, trained_on)
    asked = modalities(settings)
    inputs = [modality.inputs(job) for modality in asked]  # all are checked before one is encoded
    keys = [modality.key(job, given) for modality, given in zip(asked, inputs, strict=True)]
    for modality, key in zip(asked, keys, strict=True):
        if not any(file.path.exists() for file in _candidates(modality, key, job)):
            processes.on_main_process(modality.check_name)
    return [_load(*given, job) for given in zip(asked, keys, inputs, strict=True)]


def _load(modality: Modality, key: dict[str, Any], inputs: Sequence[Any], job: Job) -> np.memmap:
    file = _cached(modality, key, inputs, job)
    modality.note(file, job)
    return np.load(file.path, mmap_mode="c")


def _cached(modality: Modality, key: dict[str, Any], inputs: Sequence[Any], job: Job) -> cache.File:
    """Return the cached file, made first if it is missing."""
    from filelock import FileLock

    def find(report: bool = False) -> cache.File:
        return cache.find(_candidates(modality, key, job), modality.commit(), job.trained_on, report)

    def compare_and_find() -> cache.File:
        names = [file.path.name for file in _candidates(modality, key, job)]
        if job.trained_on and not set(names) & set(job.trained_on):
            modality.refuse_change(job)
        return find()

    found = processes.on_main_process(compare_and_find)
    if found.header:
        return found
    lock = FileLock(_path(modality, key, job).with_suffix(".lock"))

    def find_alone() -> cache.File:
        cache.acquire(lock)
        return find(report=True)  # again: another process may have made it meanwhile

    try:
        found = processes.on_main_process(find_alone)
        return found if found.header else replace(found, header=modality.make(found, inputs, job))
    finally:
        lock.release()


def _candidates(modality: Modality, key: dict[str, Any], job: Job) -> list[cache.File]:
    """Return the files that would do; the first is made if none exists."""
    former = modality.former_key(key)
    keys = [key] if former == key else [key, former]
    if modality.has_precision():
        precisions = [job.settings.encoder_precision]
        if precisions == ["auto"]:
            best = encoder.best_precision(job.device)
            precisions = [best, *(p for p in encoder.DTYPES if p != best)]
        keys = [k | {"precision": p} for k in keys for p in precisions]
    return [cache.File(_path(modality, k, job), k) for k in keys]


def _path(modality: Modality, key: dict[str, Any], job: Job) -> Path:
    name = modality.cache_name(key)
    last = Path(name).name or name
    short = re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-") or "encoder"
    return (
        job.cache_root
        / job.catalog.name
        / f"{modality.kind}-{short}-{digest([json.dumps(key, sort_keys=True)])[:16]}.npy"
    )
